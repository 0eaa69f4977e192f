"""prefix_affinity: the cost, the bound, and the order they make together."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.api import Snapshot
from forebay.testing.policy import make_request, make_snapshot, snapshots
from forebay_policies.prefix_affinity import PrefixAffinity, Settings

REQUEST = make_request()


def score(snapshot: Snapshot, **options: Any) -> list[float]:
    return [float(s or 0) for s in PrefixAffinity(Settings(**options)).score(REQUEST, snapshot)]


def best(options: dict[str, Any] | None = None, **columns: Any) -> int:
    scores = score(make_snapshot(**columns), **(options or {}))
    return scores.index(max(scores))


def test_the_formula() -> None:
    snapshot = make_snapshot(
        prompt_tokens=1000,
        prefix_tokens=[900, 0, 0],
        in_flight=[3, 0, 1],
        queued_tokens=[50, 0, 200],
        weight=[1.0, 1.0, 2.0],
    )
    # (100*(3+2) + 2*50) = 600; (1000*2) = 2000; (1000*3 + 2*200) / 2 = 1700
    assert score(snapshot) == pytest.approx([1.0, 600 / 2000, 600 / 1700])


@pytest.mark.parametrize(
    ("columns", "winner"),
    [
        # A follow-up goes where its history is.
        ({"prefix_tokens": [0, 900], "in_flight": [0, 2]}, 1),
        # A fresh prompt goes where it disturbs nobody.
        ({"prefix_tokens": [0, 0], "in_flight": [3, 1]}, 1),
        # Prompts that wait there count, even where the cache is warm.
        ({"prefix_tokens": [500, 0], "queued_tokens": [2000, 0]}, 1),
        # Other gateways' requests count, if the backend reports them.
        ({"prefix_tokens": [0, 0], "in_flight": [0, 1], "running": [6, None]}, 1),
        ({"prefix_tokens": [0, 0], "in_flight": [1, 0], "waiting": [0, 9], "running": [0, 0]}, 0),
        # Weight is relative speed.
        ({"prefix_tokens": [0, 0], "weight": [1.0, 3.0]}, 1),
        # A hit on the whole prompt still costs a token, so load decides between two.
        ({"prefix_tokens": [1000, 1000], "in_flight": [4, 2]}, 1),
        # An estimate above the prompt's length is a hit on all of it.
        ({"prefix_tokens": [5000, 0], "in_flight": [1, 0]}, 0),
    ],
)
def test_who_wins_a_prompt_of_1000_tokens(columns: dict[str, Any], winner: int) -> None:
    assert best(prompt_tokens=1000, **columns) == winner


def test_an_idle_fleet_is_a_tie() -> None:
    assert score(make_snapshot(4, prompt_tokens=500)) == [1.0] * 4


def test_without_any_estimate_it_balances_by_load() -> None:
    assert best(in_flight=[2, 1, 5]) == 1


def test_ttft_weight_trades_the_stall_for_the_wait() -> None:
    columns = {
        "prompt_tokens": 1000,
        "in_flight": [2, 6],
        "queued_tokens": [3000, 0],
    }
    assert best({"ttft_weight": 0.1}, **columns) == 0
    assert best({"ttft_weight": 2.0}, **columns) == 1


# The bound


def test_a_hot_prefix_does_not_pile_up_on_one_backend() -> None:
    """Without the bound the holder of a prompt this long would get a thousand before another."""
    in_flight, holds = [0, 0], [True, False]
    for _ in range(60):
        snapshot = make_snapshot(
            prompt_tokens=100_000,
            in_flight=in_flight,
            prefix_tokens=[99_900 if held else 0 for held in holds],
        )
        scores = score(snapshot)
        chosen = scores.index(max(scores))
        in_flight[chosen] += 1
        holds[chosen] = True
        assert max(in_flight) <= 1.5 * (sum(in_flight) / 2) + 8
    assert min(in_flight) >= 22


def test_light_traffic_keeps_its_affinity() -> None:
    """In a fleet of eight, a few requests at once may all go where their prefix is."""
    columns: dict[str, Any] = {"prompt_tokens": 4000, "prefix_tokens": [3900, *[0] * 7]}
    assert best(in_flight=[6, *[0] * 7], **columns) == 0
    assert best({"slack": 1}, in_flight=[6, *[0] * 7], **columns) != 0


def test_those_over_the_bound_come_last_but_in_order() -> None:
    snapshot = make_snapshot(
        prompt_tokens=10_000, prefix_tokens=[9_990, 9_000, 0, 0], in_flight=[60, 50, 1, 2]
    )
    scores = score(snapshot)
    order = sorted(range(4), key=lambda index: -scores[index])
    assert order == [2, 3, 0, 1]


def test_the_bound_goes_by_weight() -> None:
    columns: dict[str, Any] = {"prompt_tokens": 10_000, "prefix_tokens": [9_990, 0]}
    assert best(in_flight=[80, 10], weight=[4.0, 1.0], **columns) == 0
    assert best(in_flight=[80, 10], weight=[1.0, 1.0], **columns) == 1


@settings(max_examples=100)
@given(snapshots(), st.floats(1, 3), st.integers(1, 50))
def test_nobody_over_the_bound_is_preferred(snapshot: Snapshot, bound: float, slack: int) -> None:
    scores = score(snapshot, bound=bound, slack=slack)
    busy = [max(b.in_flight, (b.running or 0) + (b.waiting or 0)) for b in snapshot.backends]
    heavy = sum(b.weight for b in snapshot.backends)
    allowed = [bound * b.weight / heavy * (sum(busy) + 1) + slack for b in snapshot.backends]
    over = [count + 1 > most + 1e-6 for count, most in zip(busy, allowed, strict=True)]
    within = [count + 1 <= most - 1e-6 for count, most in zip(busy, allowed, strict=True)]
    assert not all(over)
    worst = min((s for s, ok in zip(scores, within, strict=True) if ok), default=1.0)
    assert all(s <= worst for s, out in zip(scores, over, strict=True) if out)
