"""Ranking and routing: ties, odds, vetoes, fair turns, faulty policies."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import pytest
from msgspec import structs

from forebay.api import (
    AdapterKind,
    BackendSettings,
    Capabilities,
    GenerateRequest,
    NoBackend,
    Policy,
    Score,
    Snapshot,
    UnknownModel,
    Unsupported,
)
from forebay.backend import Backend
from forebay.config import Config, Health, Model, Share
from forebay.fleet import Fleet
from forebay.health import Health as HealthState
from forebay.loader import load_plugins
from forebay.prefix_index import PrefixIndex
from forebay.ranking import rank
from forebay.routing import Route, Router, refusal
from forebay.testing import make_snapshot

REQUEST = GenerateRequest(id="r", endpoint="chat", model="m", created=0)


class Fixed(Policy):
    def __init__(self, *scores: Score, odds: Sequence[float] | None = None) -> None:
        self._scores = scores
        self._odds = odds

    def score(self, request: GenerateRequest, snapshot: Snapshot) -> Sequence[Score]:
        return self._scores

    def propensity(self, request: GenerateRequest, snapshot: Snapshot) -> Sequence[float] | None:
        return self._odds


def snapshot(count: int, seed: int = 0) -> Snapshot:
    return make_snapshot(count, seed=seed)


def names(world: Snapshot) -> list[str]:
    return [view.name for view in world.backends]


def test_the_best_score_goes_first_and_none_is_a_veto() -> None:
    world = snapshot(4)
    a, b, c, d = names(world)
    ranking = rank(Fixed(0.2, None, 1.0, 0.5), REQUEST, world)
    assert ranking.order == (c, d, a)
    assert ranking.probability == 1.0
    assert [x.veto for x in ranking.candidates if x.backend == b] == ["policy"]


def test_ties_are_drawn_evenly_by_the_seed_and_say_so() -> None:
    firsts = Counter()
    for seed in range(3000):
        ranking = rank(Fixed(1.0, 1.0, 1.0, 0.0), REQUEST, snapshot(4, seed))
        assert ranking.probability == pytest.approx(1 / 3)
        assert ranking == rank(Fixed(1.0, 1.0, 1.0, 0.0), REQUEST, snapshot(4, seed))
        firsts[ranking.order[0]] += 1
    # Binomial(3000, 1/3): five standard deviations are 129.
    assert all(871 < count < 1129 for count in firsts.values())
    assert len(firsts) == 3


def test_a_policy_that_draws_tells_its_own_odds() -> None:
    ranking = rank(Fixed(1.0, 0.0, odds=[0.7, 0.3]), REQUEST, snapshot(2))
    assert ranking.probability == 0.7


@pytest.mark.parametrize(
    "policy",
    [
        Fixed(1.0),
        Fixed(1.0, 2.0),
        Fixed(1.0, float("nan")),
        Fixed(1.0, -0.1),
        Fixed(1.0, 1.0, odds=[1.0]),
    ],
)
def test_a_faulty_policy_is_replaced_by_the_least_busy(policy: Policy) -> None:
    world = snapshot(2)
    ranking = rank(policy, REQUEST, world)
    assert ranking.fault is not None
    assert set(ranking.order) == set(names(world))


def router(policy: str, **shares: float) -> tuple[Router, Fleet]:
    config = Config(
        backends={name: BackendSettings(adapter="x") for name in shares},
        models={"m": Model(backends={n: Share(weight=w) for n, w in shares.items()})},
    )
    kind = AdapterKind(name="x", settings=BackendSettings, build=lambda settings, context: None)
    backends = {
        name: Backend(name, settings, kind, None, HealthState(Health()))  # type: ignore[arg-type]
        for name, settings in config.backends.items()
    }
    for backend in backends.values():
        backend.health.probe_ok()
        backend.capabilities = Capabilities()
    fleet = Fleet(config, backends)
    route = Route(policy, load_plugins(["policies"]).policy(policy, None))  # type: ignore[arg-type]
    return Router(fleet, {"m": route}, PrefixIndex()), fleet


def test_round_robin_through_the_router_keeps_the_weights() -> None:
    routing, _ = router("round_robin", a=3, b=1)
    chosen = Counter(routing.choose(REQUEST, 0, "").decision.chosen for _ in range(400))
    assert chosen == {"a": 300, "b": 100}


def test_a_backend_that_returns_gets_no_burst() -> None:
    routing, fleet = router("round_robin", a=1, b=1)
    fleet.backends["b"].health.draining = True
    for _ in range(100):
        assert routing.choose(REQUEST, 0, "").decision.chosen == "a"
    fleet.backends["b"].health.draining = False
    chosen = [routing.choose(REQUEST, 0, "").decision.chosen for _ in range(20)]
    assert Counter(chosen) == {"a": 10, "b": 10}


def test_least_connections_counts_what_is_open() -> None:
    routing, fleet = router("least_connections", a=1, b=1)
    fleet.backends["a"].in_flight = 3
    decision = routing.choose(REQUEST, 0, "").decision
    assert decision.order == ("b", "a")
    assert decision.runner_up == "a"


def test_busy_ones_come_last_but_are_better_than_nobody() -> None:
    routing, fleet = router("least_connections", a=1, b=1)
    now = time.monotonic()
    fleet.backends["a"].health.said_busy(now, 5)
    assert routing.choose(REQUEST, 0, "").decision.order == ("b",)
    fleet.backends["b"].health.said_busy(now, 5)
    assert set(routing.choose(REQUEST, 0, "").decision.order) == {"a", "b"}


def test_why_nobody_can_serve() -> None:
    routing, fleet = router("round_robin", a=1, b=1)
    for backend in fleet.backends.values():
        backend.capabilities = Capabilities(endpoints=frozenset({"completions"}))
    assert isinstance(refusal(routing.choose(REQUEST, 0, "").decision), Unsupported)
    fleet.backends["a"].capabilities = Capabilities(slots=1)
    fleet.backends["a"].in_flight = 1
    assert refusal(routing.choose(REQUEST, 0, "").decision) is None, "waiting may help"
    fleet.backends["a"].health.draining = True
    error = refusal(routing.choose(REQUEST, 0, "").decision)
    assert isinstance(error, NoBackend)
    assert "a: draining" in error.message
    with pytest.raises(UnknownModel):
        routing.check_model("other")


def test_more_choices_than_a_backend_gives_go_elsewhere() -> None:
    routing, fleet = router("round_robin", a=1, b=1)
    fleet.backends["a"].capabilities = Capabilities(max_choices=2)
    for n, prompts, order in ((2, (), {"a", "b"}), (3, (), {"b"}), (2, ("x", "y"), {"a", "b"})):
        request = structs.replace(REQUEST, n=n, prompts=prompts)
        assert set(routing.choose(request, 0, "").decision.order) == order
    fleet.backends["b"].capabilities = Capabilities(max_choices=2)
    error = refusal(routing.choose(structs.replace(REQUEST, n=3), 0, "").decision)
    assert isinstance(error, Unsupported)
    assert "a gives at most 2 choices of a prompt" in error.message
