"""Speculative decoding: guess the next tokens cheaply, and let one step of the model verify them.

The model computes a sequence's guessed tokens beside its last known one, and a token is drawn at
each of these places; guesses are kept as far as they are what was drawn. As the noise of a draw
depends on seed, position and token alone, what is drawn does not depend on what was guessed: the
answer is the same as without guesses, token by token, and so is its distribution. (Leviathan et al.
2022, https://arxiv.org/abs/2211.17192, accept and reject at random instead; for a guess that is
certain of itself, as from a prompt, both accept it with its probability under the model.)

Guesses come from a prompt's own words in the step that verifies them, or from a draft model at the
end of the step before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Protocol

from msgspec import structs

from forebay_engine.acceptance import Acceptance, Guess
from forebay_engine.step import Guessed, Lookahead, Row, Sampled

#: Of so many tokens behind a row, how many there is room for; takes the pages of these.
Spare = Callable[[Row, int], int]


class Speculation(Protocol):
    """What the scheduler asks, at every step, about all of its rows."""

    def extend(self, rows: list[Row], budget: int, spare: Spare) -> list[Row]:
        """The rows of a step with guesses to verify, at most ``budget`` tokens in all."""
        ...

    def take(
        self,
        rows: Items[Row],
        sampled: Mapping[int, list[Sampled]],
        guessed: Items[Guessed],
    ) -> None:
        """What became of the rows, before their sequences get what was drawn."""
        ...

    def forget(self, seq_id: int) -> None:
        """The sequence has lost its pages."""
        ...


class Proposer(Protocol):
    """Makes guesses at once."""

    def guess(self, row: Row, most: int) -> Guess:
        """At most ``most`` tokens to follow ``row.token_ids``; called in every step of the row."""
        ...

    def forget(self, seq_id: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """How far guesses go: ``most`` a row, and not beyond the answer's end."""

    most: int
    eos_token_ids: frozenset[int] = frozenset()

    def room(self, row: Row, drawn: int = 0) -> int:
        """Guesses for a row once ``drawn`` more tokens are known: the last one is never guessed."""
        if not row.sample:
            return 0
        spoken = len(row.token_ids) - row.num_prompt + drawn
        return max(0, min(self.most, row.sampling.max_tokens - spoken - 1))

    def before_end(self, row: Row, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Up to a token that would end the answer: that one is drawn as well without a guess."""
        ends = row.sampling.ends(self.eos_token_ids)
        for at, token in enumerate(token_ids):
            if token in ends:
                return token_ids[:at]
        return token_ids


class ImmediateSpeculation:
    """Guesses that are made in the step that verifies them."""

    def __init__(self, proposer: Proposer, acceptance: Acceptance, limits: Limits) -> None:
        self._proposer = proposer
        self._acceptance = acceptance
        self._limits = limits
        self._agreed: dict[int, int] = {}

    def extend(self, rows: list[Row], budget: int, spare: Spare) -> list[Row]:
        guesses = {row.seq_id: self._guess(row) for row in rows}
        self._agreed = {seq_id: guess.agreed for seq_id, guess in guesses.items()}
        lengths = self._acceptance.lengths(
            {id: (g.agreed, len(g.token_ids)) for id, g in guesses.items() if g.token_ids},
            tokens=sum(row.count for row in rows),
            draws=sum(row.sample for row in rows),
            budget=budget,
        )
        drafts = {id: guesses[id].token_ids[:length] for id, length in lengths.items()}
        return [with_draft(row, drafts.get(row.seq_id, ()), spare) for row in rows]

    def take(
        self,
        rows: Items[Row],
        sampled: Mapping[int, list[Sampled]],
        guessed: Items[Guessed],
    ) -> None:
        for row in rows:
            if row.draft:
                guess = Guess(row.draft, self._agreed[row.seq_id])
                self._acceptance.learn(row.seq_id, guess, len(sampled[row.seq_id]) - 1)

    def forget(self, seq_id: int) -> None:
        self._proposer.forget(seq_id)
        self._acceptance.forget(seq_id)

    def _guess(self, row: Row) -> Guess:
        guess = self._proposer.guess(row, self._limits.room(row))
        if not guess.token_ids:
            return guess
        return replace(guess, token_ids=self._limits.before_end(row, guess.token_ids))


@dataclass(slots=True)
class _Drafted:
    """How far the draft model is with a sequence."""

    #: First position that it has not computed, if the guesses come true.
    computed: int
    guess: tuple[int, ...] = ()


class DraftSpeculation:
    """Guesses that a draft model makes at the end of a step, for the next one to verify.

    So it is before they are made that their number is decided. Where none are made, the draft model
    falls behind, but catches up before a page is full: pages that are reused so have its keys and
    values as well.
    """

    def __init__(self, acceptance: Acceptance, limits: Limits, block_size: int) -> None:
        self._acceptance = acceptance
        self._limits = limits
        self._block_size = block_size
        self._drafted: dict[int, _Drafted] = {}

    def extend(self, rows: list[Row], budget: int, spare: Spare) -> list[Row]:
        draws = sum(row.sample for row in rows)
        lengths = self._acceptance.lengths(
            {row.seq_id: (0, room) for row in rows if (room := self._limits.room(row, 1))},
            tokens=draws,
            draws=draws,
            budget=max(0, budget + sum(row.count for row in rows) - draws),
        )
        found = []
        for row in rows:
            drafted = self._drafted.setdefault(row.seq_id, _Drafted(row.start))
            guess = drafted.guess[: min(budget, self._limits.room(row))]
            row = with_draft(row, self._limits.before_end(row, guess), spare)
            budget -= len(row.draft)
            found.append(self._with_lookahead(row, lengths.get(row.seq_id, 0), spare))
        return found

    def take(
        self,
        rows: Items[Row],
        sampled: Mapping[int, list[Sampled]],
        guessed: Items[Guessed],
    ) -> None:
        guesses = {item.seq_id: item.token_ids for item in guessed}
        for row in rows:
            drafted, end = self._drafted[row.seq_id], row.start + row.count - len(row.draft)
            if row.sample:
                end += (accepted := len(sampled[row.seq_id]) - 1)
                if row.draft:
                    self._acceptance.learn(row.seq_id, Guess(row.draft), accepted)
            drafted.guess = guesses.get(row.seq_id, ())
            # All guesses but the last are computed, and so is the token drawn before them.
            drafted.computed = (
                end + len(drafted.guess) if row.lookahead else min(drafted.computed, end)
            )

    def forget(self, seq_id: int) -> None:
        self._drafted.pop(seq_id, None)
        self._acceptance.forget(seq_id)

    def _with_lookahead(self, row: Row, wanted: int, spare: Spare) -> Row:
        count = spare(row, wanted) if wanted else 0
        start, end = self._drafted[row.seq_id].computed, row.start + row.count
        if not count and end // self._block_size * self._block_size <= start:
            return row
        return structs.replace(row, lookahead=Lookahead(start, count))


def with_draft(row: Row, draft: tuple[int, ...], spare: Spare) -> Row:
    """The row with as many of these guesses as there is room for."""
    if not draft:
        return row
    draft = draft[: spare(row, len(draft))]
    return structs.replace(row, draft=draft, count=row.count + len(draft))
