"""The step contract between scheduler and runner: an immutable plan goes in, a result comes out.

The runner never calls back into the scheduler; all state changes happen where the plan is made and
where the result is applied. So scheduling is testable without a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from forebay_engine.sequence import SamplingParams


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part of a step: ``count`` tokens from position ``start`` on."""

    seq_id: int
    #: All tokens of the sequence so far; the step runs ``token_ids[start : start + count]``.
    #: A live list that the runner reads during the step and must not keep.
    token_ids: Items[int]
    start: int
    count: int
    #: Pages of positions ``0 .. start + count``; page ``p // block_size`` holds position ``p``.
    block_table: Items[int]
    #: Draw the next token from the last position's logits; false in the middle of a prompt.
    sample: bool
    sampling: SamplingParams
    #: Where the answer begins in ``token_ids`` (penalties count the answer only).
    num_prompt: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Decode rows (count 1) first, then prefill rows."""

    rows: tuple[Row, ...]

    @property
    def num_tokens(self) -> int:
        return sum(row.count for row in self.rows)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token drawn for a row with ``sample``."""

    seq_id: int
    token_id: int
    #: Log-probability after temperature 1 and no truncation: of the model itself. None: not asked.
    logprob: float | None = None
    #: The likeliest tokens with their log-probabilities, best first.
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """One entry for each row with ``sample``, in the plan's order."""

    sampled: tuple[Sampled, ...]
