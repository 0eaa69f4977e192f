"""The step contract between scheduler and runner: an immutable plan goes in, a result comes out.

The runner never calls back into the scheduler; all state changes happen where the plan is made and
where the result is applied. So scheduling is testable without a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from forebay_engine.sequence import Pooling, SamplingParams

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class Guide(Protocol):
    """What an answer must obey, as far as it has come.

    ``masks`` is called in a step, from a thread beside the forward pass, and the rest between
    steps. The scheduler moves it on where it applies the step's result; a preemption leaves it.
    """

    @property
    def may_end(self) -> bool:
        """Whether the answer would be complete if it ended here."""
        ...

    @property
    def failure(self) -> str | None:
        """Why no token at all is allowed here, in a sentence; None: some are."""
        ...

    def take(self, token_id: int) -> bool:
        """Go on by the token that was drawn; whether the answer is complete and can't go on."""
        ...

    def masks(self, draft: Items[int]) -> npt.NDArray[np.int32]:
        """Allowed tokens at each place: bit ``t % 32`` of word ``t // 32`` stands for token ``t``.

        ``[1 + len(draft), ceil(vocab / 32)]``: after the answer so far, then after each guessed
        token. What follows a guess that is not allowed is never read. The guide stays where it is.
        """
        ...


@dataclass(frozen=True, slots=True)
class Lookahead:
    """What the draft model does at the end of a step: catch up with a row, and guess what follows.

    The row's pages reach as far as the guesses.
    """

    #: First position that it has not computed, if the row's guesses come true.
    start: int
    #: Guesses wanted.
    count: int


# There are hundreds of rows and draws in a step. To make a row takes 0.1 µs as a struct, 0.3 as an
# object of a plain dataclass, and 3.3 of a frozen one. None is ever part of a cycle.
class Row(Struct, frozen=True, gc=False):
    """One sequence's part of a step: ``count`` tokens from position ``start`` on."""

    seq_id: int
    #: All tokens of the sequence so far; the step runs ``token_ids[start : start + count]``.
    #: A live list that the runner reads during the step and must not keep.
    token_ids: Items[int]
    start: int
    count: int
    #: Of each group of layers, pages of positions ``0 .. start + count``; the one at
    #: ``p // block_size`` holds position ``p``, and is negative where no token of the step sees it.
    block_tables: tuple[Items[int], ...]
    #: Draw the next token from the last position's logits; false in the middle of a prompt.
    sample: bool
    sampling: SamplingParams
    #: Where the answer begins in ``token_ids`` (penalties count the answer only).
    num_prompt: int
    #: Tokens guessed to follow ``token_ids``: the step's last ones, counted in ``count``. A token
    #: is drawn after the last known one, and after each guess that came true.
    draft: tuple[int, ...] = ()
    #: None: any token may come.
    guide: Guide | None = None
    #: Wanted of the hidden states: the sequence's last one, or the sum of these tokens'.
    pooling: Pooling | None = None
    #: None: the draft model, if there is one, has nothing to do.
    lookahead: Lookahead | None = None
    #: 1: behind ``token_ids`` stands the token that the step launched last draws for the sequence,
    #: which nobody here knows yet. It is all that the row runs: ``start`` is ``len(token_ids)`` and
    #: ``count`` 1, and there are neither guesses nor a guide. If it is ``NO_TOKEN``, the row is run
    #: for nothing.
    unknown: int = 0


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Rows of one token first, then the longer ones: chunks of prompts, and guesses to verify."""

    rows: tuple[Row, ...]

    @property
    def num_tokens(self) -> int:
        return sum(row.count for row in self.rows)


#: In place of a token: none may come here, as masks, bans and grammar exclude every one.
NO_TOKEN = -1


class Sampled(Struct, frozen=True, gc=False):
    """A token drawn for a row with ``sample``, or ``NO_TOKEN``."""

    seq_id: int
    token_id: int
    #: Log-probability after temperature 1 and no truncation: of the model itself. None: not asked.
    logprob: float | None = None
    #: The likeliest tokens with their log-probabilities, best first.
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Pooled:
    """What a row with ``pooling`` asked for."""

    seq_id: int
    #: Position of the row's first token.
    start: int
    vector: npt.NDArray[np.float32]  # [hidden]


@dataclass(frozen=True, slots=True)
class Guessed:
    """What a draft model guesses to follow the tokens that were just drawn."""

    seq_id: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PromptToken:
    """What the model thought of a token of the prompt, where it stands."""

    seq_id: int
    position: int
    token_id: int
    logprob: float
    #: 1: the likeliest.
    rank: int
    #: The likeliest tokens with their log-probabilities, best first.
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    """For each row with ``sample``, in the plan's order: the guesses that came true, one more."""

    sampled: tuple[Sampled, ...]
    pooled: tuple[Pooled, ...] = ()
    guessed: tuple[Guessed, ...] = ()
    #: Of rows with ``prompt_logprobs``, the tokens that follow those which this step ran.
    prompt: tuple[PromptToken, ...] = ()

    def of(self, rows: Items[Row]) -> list[list[Sampled]]:
        """What was drawn for each of the rows, nothing for those that wanted no sample.

        :raises RuntimeError: not what the rows asked for.
        """
        # A token for each is what most steps are for.
        if [item.seq_id for item in self.sampled] == [row.seq_id for row in rows if row.sample]:
            draws = iter(self.sampled)
            return [[next(draws)] if row.sample else [] for row in rows]
        found: dict[int, list[Sampled]] = {}
        for item in self.sampled:
            found.setdefault(item.seq_id, []).append(item)
        if found.keys() != {row.seq_id for row in rows if row.sample}:
            raise RuntimeError("the result's sequences are not those that the plan sampled")
        for row in rows:
            drawn = [item.token_id for item in found.get(row.seq_id, [])]
            if drawn[:-1] != list(row.draft[: len(drawn) - 1]):
                raise RuntimeError(f"sequence {row.seq_id}: {drawn} do not follow {row.draft}")
        return [found.get(row.seq_id, []) for row in rows]
