"""Of two backends drawn at random, the less loaded one.

Formula
    load  = (in_flight + 1) / weight
    score = 1                               the drawn pair's lower load (first drawn, if equal)
            0.5 * least load / load         everybody else: they wait in case it fails

Intent
    Nearly the balance of a full scan (Mitzenmacher, "The Power of Two Choices in Randomized Load
    Balancing", 2001) without its herd: gateways that do not see each other's requests, or see old
    figures, do not all run to the same least-loaded backend. In a small fleet with one gateway the
    full scan of ``least_connections`` balances better.

Chance
    Both draws come from ``snapshot.seed`` by arithmetic, so a decision can be replayed.
    ``propensity`` is exact: of the n(n-1)/2 pairs a backend wins those with a busier partner, and
    half of those with an equal one.

Options
    none; ``weight`` belongs to the backend's entry in the model.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from forebay.api import Policy, PolicyKind, Request, Score, Snapshot

__all__ = ["KIND", "PowerOfTwo"]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class PowerOfTwo(Policy):
    """Two distinct draws from the seed, the lower load wins."""

    def score(self, request: Request, snapshot: Snapshot) -> Sequence[Score]:
        loads = _loads(snapshot)
        least = min(loads)
        scores = [0.5 * least / load for load in loads]
        scores[_winner(loads, snapshot.seed)] = 1.0
        return scores

    def propensity(self, request: Request, snapshot: Snapshot) -> Sequence[float] | None:
        loads = _loads(snapshot)
        count = len(loads)
        if count == 1:
            return [1.0]
        ranked = sorted(loads)
        pairs = count * (count - 1) / 2
        chances = []
        for load in loads:
            below, upto = bisect_left(ranked, load), bisect_right(ranked, load)
            busier, equal = count - upto, upto - below - 1
            chances.append((busier + equal / 2) / pairs)
        return chances


def _loads(snapshot: Snapshot) -> list[float]:
    return [(b.in_flight + 1) / b.weight for b in snapshot.backends]


def _winner(loads: Sequence[float], seed: int) -> int:
    count = len(loads)
    first = _draw(seed, 1, count)
    if count == 1:
        return first
    second = _draw(seed, 2, count - 1)
    second += second >= first  # the draw skips the first, so the pair is always distinct
    return min((first, second), key=loads.__getitem__)


def _draw(seed: int, step: int, below: int) -> int:
    """The ``step``-th number of splitmix64 (Steele, Lea, Flood 2014), scaled to ``range(below)``.

    Scaling by multiplication is off from uniform by less than ``below / 2**64``.
    """
    mixed = (seed + step * _GOLDEN) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((mixed ^ (mixed >> 31)) * below) >> 64


KIND = PolicyKind(
    name="power_of_two",
    build=lambda settings: PowerOfTwo(),
    summary="the less loaded of two drawn at random",
)
