"""How often guesses came true, and so how many of them are worth verifying.

Decided anew for each step, from each sequence's own past and from what steps of each size cost on
this machine. Where no guess pays none is verified, but for a single one now and then to see whether
that has changed. Plain arithmetic on what happened: no clock, no chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import accumulate, chain, islice, repeat
from operator import mul

from forebay_engine.costs import StepCosts, worthwhile

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


class Chances:
    """How often guesses came true, by how many tokens agreed behind them."""

    def __init__(self, start: Items[float] = _PRIOR) -> None:
        self._of = list(start)

    def copy(self) -> Chances:
        return Chances(self._of)

    def chain(self, agreed: int, length: int) -> list[float]:
        """Of each of so many guesses, that it and all before it come true."""
        known = self._of[_class(agreed, 0) :]
        return list(accumulate(islice(chain(known, repeat(known[-1])), length), mul))

    def learn(self, guess: Guess, accepted: int, rate: float) -> None:
        """Take in that so many came true; of those behind the first failure nothing is known."""
        for at in range(min(accepted + 1, len(guess.token_ids))):
            kind = _class(guess.agreed, at)
            self._of[kind] += rate * ((at < accepted) - self._of[kind])


@dataclass(slots=True)
class _Past:
    """What is known of one sequence's guesses."""

    chances: Chances
    #: Steps since a guess was verified, and how many until one is tried all the same.
    idle: int = 0
    pause: int = _FIRST_PAUSE


class Acceptance:
    """Of all sequences that run; a new one starts from what came of guesses elsewhere."""

    def __init__(self, costs: StepCosts, guess_costs: StepCosts | None = None) -> None:
        """:param guess_costs: of making one guess a row; None: nothing worth counting."""
        self._costs = costs
        self._guess_costs = guess_costs
        self._common = Chances()
        self._pasts: dict[int, _Past] = {}

    def lengths(
        self, offers: Mapping[int, tuple[int, int]], *, tokens: int, draws: int, budget: int
    ) -> dict[int, int]:
        """How many guesses to verify, by sequence.

        :param offers: the tokens that agree behind a sequence's first guess, and its guesses.
        :param tokens: in the step without guesses.
        :param draws: rows of the step that draw a token.
        :param budget: most guesses in all.
        """
        pasts = {seq_id: self._past(seq_id) for seq_id in offers}
        found = worthwhile(
            [pasts[seq_id].chances.chain(*offer) for seq_id, offer in offers.items()],
            self._costs,
            tokens=tokens,
            draws=draws,
            budget=budget,
            depth_seconds=self._guess_costs.of(draws, 0) if self._guess_costs else 0.0,
        )
        lengths = dict(zip(offers, found, strict=True))
        left = budget - sum(found)
        for seq_id, past in pasts.items():
            if not lengths[seq_id]:
                past.idle += 1
                if left and past.idle >= past.pause:
                    lengths[seq_id], left = 1, left - 1
        return lengths

    def learn(self, seq_id: int, guess: Guess, accepted: int) -> None:
        """Take in how many of a sequence's guesses came true."""
        past = self._past(seq_id)
        past.chances.learn(guess, accepted, _OWN_RATE)
        self._common.learn(guess, accepted, _COMMON_RATE)
        past.idle = 0
        past.pause = _FIRST_PAUSE if accepted else min(2 * past.pause, _LONGEST_PAUSE)

    def forget(self, seq_id: int) -> None:
        self._pasts.pop(seq_id, None)

    def _past(self, seq_id: int) -> _Past:
        if seq_id not in self._pasts:
            self._pasts[seq_id] = _Past(self._common.copy())
        return self._pasts[seq_id]


def _class(agreed: int, at: int) -> int:
    return min(agreed + at, _CLASSES)
