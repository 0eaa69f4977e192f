"""power_of_two: who is drawn, who wins, how often."""

from __future__ import annotations

from collections import Counter
from math import sqrt
from typing import Any

import pytest

from forebay.api import Snapshot
from forebay.testing.policy import make_request, make_snapshot
from forebay_policies.power_of_two import PowerOfTwo

REQUEST = make_request()


def winner(snapshot: Snapshot) -> int:
    scores = PowerOfTwo().score(REQUEST, snapshot)
    assert [score for score in scores if score == 1.0] == [1.0]
    return list(scores).index(1.0)


def test_the_busiest_never_wins_and_two_are_a_full_scan() -> None:
    for seed in range(200):
        assert winner(make_snapshot(in_flight=[0, 9, 1], seed=seed)) != 1
        assert winner(make_snapshot(in_flight=[4, 2], seed=seed)) == 1


def test_the_others_wait_in_order_of_load() -> None:
    for seed in range(50):
        snapshot = make_snapshot(in_flight=[0, 1, 3], seed=seed)
        scores = list(PowerOfTwo().score(REQUEST, snapshot))
        scores[winner(snapshot)] = None
        left = [score for score in scores if score is not None]
        assert left == sorted(left, reverse=True)
        assert max(left) <= 0.5


def test_one_backend_is_chosen_for_certain() -> None:
    snapshot = make_snapshot(1)
    assert PowerOfTwo().score(REQUEST, snapshot) == [1.0]
    assert PowerOfTwo().propensity(REQUEST, snapshot) == [1.0]


@pytest.mark.parametrize(
    ("columns", "chances"),
    [
        ({"in_flight": [5, 3]}, [0, 1]),
        ({"in_flight": [0, 0, 0]}, [1 / 3, 1 / 3, 1 / 3]),
        ({"in_flight": [0, 1, 2, 3]}, [3 / 6, 2 / 6, 1 / 6, 0]),
        ({"in_flight": [0, 2, 2, 7]}, [3 / 6, 1.5 / 6, 1.5 / 6, 0]),
        ({"in_flight": [1, 1, 1], "weight": [1.0, 2.0, 4.0]}, [0, 1 / 3, 2 / 3]),
    ],
)
def test_propensity_is_exact_and_is_what_happens(
    columns: dict[str, Any], chances: list[float]
) -> None:
    assert PowerOfTwo().propensity(REQUEST, make_snapshot(**columns)) == pytest.approx(chances)
    draws = 6000
    wins = Counter(winner(make_snapshot(**columns, seed=seed)) for seed in range(draws))
    for index, chance in enumerate(chances):
        deviation = sqrt(draws * chance * (1 - chance))
        assert abs(wins[index] - draws * chance) <= 5 * deviation


@pytest.mark.parametrize("stride", [1, 2**32, 2**63 + 1])
def test_any_seeds_draw_all_pairs_alike(stride: int) -> None:
    """Counters, high words and the whole range: all serve as seeds."""
    draws = 6000
    pairs = Counter(
        winner(make_snapshot(in_flight=[2, 2, 2, 2], seed=seed * stride)) for seed in range(draws)
    )
    assert all(abs(wins - draws / 4) <= 5 * sqrt(draws * 3 / 16) for wins in pairs.values())
    assert len(pairs) == 4
