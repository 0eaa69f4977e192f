"""round_robin: everyone's share, at every moment."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.testing.policy import make_request, make_snapshot
from forebay_policies.round_robin import RoundRobin

REQUEST = make_request()


def turns(weights: list[float], count: int, had: list[float] | None = None) -> list[int]:
    """Who wins the next ``count`` requests, each win being counted as a turn."""
    had = list(had or [0.0] * len(weights))
    winners = []
    for _ in range(count):
        scores = RoundRobin().score(REQUEST, make_snapshot(weight=weights, turns=had))
        winner = max(range(len(scores)), key=lambda index: scores[index] or 0)
        had[winner] += 1
        winners.append(winner)
    return winners


def test_equals_take_turns_in_order() -> None:
    assert turns([1, 1, 1], 7) == [0, 1, 2, 0, 1, 2, 0]


def test_a_heavy_backend_is_spread_out_not_bunched() -> None:
    assert turns([5, 1, 1], 7) == [0, 0, 0, 1, 0, 0, 2]
    # By deadline alone the first nine would all go to the heavy one.
    assert turns([10, *[1] * 10], 9).count(0) <= 5


def test_failover_goes_on_in_the_order_of_turns() -> None:
    scores = RoundRobin().score(REQUEST, make_snapshot(turns=[2, 1, 1, 2]))
    assert scores == [0.5, 1.0, 0.75, 0.25]


def test_who_rejoins_at_the_others_level_gets_no_burst() -> None:
    winners = turns([1, 1, 1], 9, had=[1000, 1000, 1000])
    assert Counter(winners) == {0: 3, 1: 3, 2: 3}


@settings(max_examples=60)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(1, 80))
def test_nobody_is_ever_a_whole_turn_off_its_share(weights: list[int], count: int) -> None:
    winners = turns([float(weight) for weight in weights], count)
    for seen in range(1, count + 1):
        counts = Counter(winners[:seen])
        for index, weight in enumerate(weights):
            assert abs(counts[index] - seen * weight / sum(weights)) < 1 + 1e-9


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=8),
    st.integers(0, 60),
    st.integers(1, 60),
)
def test_any_window_is_fair(weights: list[int], start: int, length: int) -> None:
    """Both ends of a window are less than a turn off, so the window is less than two off."""
    window = turns([float(weight) for weight in weights], start + length)[start:]
    counts = Counter(window)
    for index, weight in enumerate(weights):
        assert abs(counts[index] - length * weight / sum(weights)) < 2


@pytest.mark.parametrize("size", [1, 2, 7])
def test_in_any_window_equals_differ_by_one_turn_at_most(size: int) -> None:
    winners = turns([1.0] * size, 5 * size)
    for start in range(len(winners)):
        for end in range(start + 1, len(winners) + 1):
            counts = Counter(winners[start:end])
            assert max(counts.values()) - min(counts[i] for i in range(size)) <= 1
