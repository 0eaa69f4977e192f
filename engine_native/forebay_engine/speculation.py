"""Speculative decoding: guess the next tokens cheaply, and let one step of the model verify them.

The model computes a sequence's guessed tokens beside its last known one, and a token is drawn at
each of these places; guesses are kept as far as they are what was drawn. As the noise of a draw
depends on seed, position and token alone, what is drawn does not depend on what was guessed: the
answer is the same as without guesses, token by token, and so is its distribution. (Leviathan et al.
2022, https://arxiv.org/abs/2211.17192, accept and reject at random instead; for a guess that is
certain of itself, as from a prompt, both accept it with its probability under the model.)

How many guesses are verified is decided anew for each step from how often a sequence's guesses have
come true, and from what steps of each size cost on this machine. Where none pays, none is verified,
but for a single one now and then to see whether that has changed. Plain arithmetic on what
happened: no clock, no chance.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import mul
from typing import Protocol

from forebay_engine.costs import StepCosts, worthwhile
from forebay_engine.step import Row

#: Classes of guesses by the tokens that agree behind them: from this many on they are one class.
_CLASSES = 8
#: Chances that a guess comes true, by class, before anything is known: high, as what is never tried
#: is never learnt.
_PRIOR = tuple((agreed + 1) / (agreed + 2) for agreed in range(_CLASSES + 1))
#: Weight of the newest outcome: among those of a sequence, and of all sequences.
_OWN_RATE, _COMMON_RATE = 1 / 8, 1 / 32
#: Steps without guesses before one is tried again: so many at first, twice as many after each
#: failure, up to the most.
_FIRST_PAUSE, _LONGEST_PAUSE = 8, 512


@dataclass(frozen=True, slots=True)
class Guess:
    """What may follow a sequence's last token."""

    token_ids: tuple[int, ...] = ()
    #: Tokens before it that agree with those before what it was copied from.
    agreed: int = 0


class Proposer(Protocol):
    """Where guesses come from."""

    def guess(self, row: Row, most: int) -> Guess:
        """At most ``most`` tokens to follow ``row.token_ids``; called in every step of the row."""
        ...

    def forget(self, seq_id: int) -> None:
        """The sequence has ended."""
        ...


class Chances:
    """How often guesses came true, by how many tokens agreed behind them."""

    def __init__(self, start: Items[float] = _PRIOR) -> None:
        self._of = list(start)

    def copy(self) -> Chances:
        return Chances(self._of)

    def chain(self, guess: Guess) -> list[float]:
        """Of each guessed token, that it and all before it come true."""
        each = (self._of[_class(guess, at)] for at in range(len(guess.token_ids)))
        return list(accumulate(each, mul))

    def learn(self, guess: Guess, accepted: int, rate: float) -> None:
        """Take in that so many came true; of those behind the first failure nothing is known."""
        for at in range(min(accepted + 1, len(guess.token_ids))):
            kind = _class(guess, at)
            self._of[kind] += rate * ((at < accepted) - self._of[kind])


@dataclass(slots=True)
class _History:
    """What is known of one sequence's guesses."""

    chances: Chances
    guess: Guess = field(default_factory=Guess)
    #: Steps since a guess was verified, and how many until one is tried all the same.
    idle: int = 0
    pause: int = _FIRST_PAUSE


class Speculation:
    """Which guesses each step verifies: at most ``most`` a row."""

    def __init__(
        self,
        proposer: Proposer,
        costs: StepCosts,
        most: int,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._proposer = proposer
        self._costs = costs
        self._most = most
        self._eos = eos_token_ids
        self._common = Chances()
        self._histories: dict[int, _History] = {}

    def extend(self, rows: list[Row], budget: int, spare: Callable[[Row, int], int]) -> list[Row]:
        """The rows of a step with the guesses that are worth verifying.

        :param budget: most tokens in all.
        :param spare: of so many tokens behind a row, how many there is room for.
        """
        drafts = self.drafts(rows, budget)
        return [_extended(row, drafts.get(row.seq_id, ()), spare) for row in rows]

    def drafts(self, rows: Items[Row], budget: int) -> dict[int, tuple[int, ...]]:
        """Guesses worth verifying, by sequence.

        :param rows: of the step, without guesses.
        :param budget: most tokens in all.
        """
        asking = []
        for row in rows:
            history = self._history(row.seq_id)
            history.guess = self._proposer.guess(row, self._room(row))
            history.guess = self._before_end(row, history.guess)
            if history.guess.token_ids:
                asking.append((row, history))
        lengths = worthwhile(
            [history.chances.chain(history.guess) for _, history in asking],
            self._costs,
            tokens=sum(row.count for row in rows),
            draws=sum(row.sample for row in rows),
            budget=budget,
        )
        left = budget - sum(lengths)
        found = {}
        for (row, history), length in zip(asking, lengths, strict=True):
            if not length and left and self._due(history):
                length, left = 1, left - 1
            if length:
                found[row.seq_id] = history.guess.token_ids[:length]
        return found

    def learn(self, row: Row, accepted: int) -> None:
        """Take in how many of a row's guesses came true."""
        history = self._history(row.seq_id)
        guess = Guess(row.draft, history.guess.agreed)
        history.chances.learn(guess, accepted, _OWN_RATE)
        self._common.learn(guess, accepted, _COMMON_RATE)
        history.idle = 0
        history.pause = _FIRST_PAUSE if accepted else min(2 * history.pause, _LONGEST_PAUSE)

    def forget(self, seq_id: int) -> None:
        self._proposer.forget(seq_id)
        self._histories.pop(seq_id, None)

    def _history(self, seq_id: int) -> _History:
        if seq_id not in self._histories:
            self._histories[seq_id] = _History(self._common.copy())
        return self._histories[seq_id]

    def _room(self, row: Row) -> int:
        """Guesses that an answer has room for: the last token is drawn, and never guessed."""
        if not row.sample:
            return 0
        spoken = len(row.token_ids) - row.num_prompt
        return min(self._most, row.sampling.max_tokens - spoken - 1)

    def _before_end(self, row: Row, guess: Guess) -> Guess:
        """Up to a token that would end the answer: that one is drawn as well without a guess."""
        ends = set(row.sampling.stop_token_ids)
        if not row.sampling.ignore_eos:
            ends |= self._eos
        for at, token in enumerate(guess.token_ids):
            if token in ends:
                return Guess(guess.token_ids[:at], guess.agreed)
        return guess

    def _due(self, history: _History) -> bool:
        history.idle += 1
        return history.idle >= history.pause


def _extended(row: Row, draft: tuple[int, ...], spare: Callable[[Row, int], int]) -> Row:
    if not draft:
        return row
    draft = draft[: spare(row, len(draft))]
    return replace(row, draft=draft, count=row.count + len(draft))


def _class(guess: Guess, at: int) -> int:
    return min(guess.agreed + at, _CLASSES)
