"""For authors of policies: :func:`make_snapshot`, :func:`make_request`, :class:`PolicyContract`."""

# ruff: noqa: S101 - a contract is made of assertions

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from forebay.api import (
    BackendView,
    GenerateRequest,
    Identity,
    Message,
    Need,
    Policy,
    Score,
    Snapshot,
)

__all__ = ["PolicyContract", "make_request", "make_snapshot", "snapshots"]


def make_snapshot(
    count: int | None = None,
    *,
    model: str = "model",
    turn: int = 0,
    seed: int = 0,
    prompt_tokens: int = 0,
    **columns: Any,
) -> Snapshot:
    """A snapshot from columns: ``make_snapshot(in_flight=[3, 0], weight=2.0)``.

    Each further keyword is a field of :class:`~forebay.api.BackendView`: a list or tuple with a
    value for each backend, or one value for all. Backends are named ``b0``, ``b1``, … unless
    ``name`` is given. ``count`` is needed only where no column is a list.

    :raises ValueError: columns differ in length, or there is neither a list nor ``count``.
    """
    lengths = {len(column) for column in columns.values() if isinstance(column, list | tuple)}
    if count is not None:
        lengths.add(count)
    if len(lengths) != 1:
        raise ValueError(
            f"cannot tell the number of backends: columns and count say {sorted(lengths)}"
        )
    (size,) = lengths
    columns.setdefault("name", [f"b{index}" for index in range(size)])
    rows: list[dict[str, Any]] = [
        {
            field: column[index] if isinstance(column, list | tuple) else column
            for field, column in columns.items()
        }
        for index in range(size)
    ]
    return Snapshot(
        model=model,
        backends=tuple(BackendView(**row) for row in rows),
        turn=turn,
        seed=seed,
        prompt_tokens=prompt_tokens,
    )


def make_request(
    text: str = "Hello", *, model: str = "model", tenant: str = "default"
) -> GenerateRequest:
    """A chat request with one user message."""
    return GenerateRequest(
        id="req-1",
        endpoint="chat",
        model=model,
        created=0,
        messages=(Message(role="user", content=text),),
        identity=Identity(tenant=tenant),
    )


def snapshots(min_size: int = 1, max_size: int = 64) -> st.SearchStrategy[Snapshot]:
    """Snapshots of any fleet: idle to flooded, any weights, figures reported or not."""
    counts = st.integers(0, 10_000)
    views = st.builds(
        BackendView,
        name=st.just(""),
        adapter=st.sampled_from(["native", "vllm"]),
        weight=st.one_of(st.just(1.0), st.floats(0.01, 100)),
        in_flight=st.one_of(st.integers(0, 3), counts),
        max_in_flight=counts,
        turns=st.one_of(st.just(0.0), st.floats(0, 1e9)),
        queued_tokens=st.integers(0, 10_000_000),
        running=st.none() | counts,
        waiting=st.none() | counts,
        kv_usage=st.none() | st.floats(0, 1),
        load_age=st.none() | st.floats(0, 1e6),
        ttft=st.none() | st.floats(0, 1e4),
        prefix_tokens=st.integers(0, 200_000),
    )
    return st.builds(
        _fleet,
        st.lists(views, min_size=min_size, max_size=max_size),
        turn=st.integers(0, 2**53),
        seed=st.integers(0, 2**64 - 1),
        prompt_tokens=st.integers(0, 200_000),
    )


def _fleet(views: Sequence[BackendView], **figures: int) -> Snapshot:
    named = (msgspec.structs.replace(view, name=f"b{index}") for index, view in enumerate(views))
    return Snapshot(model="model", backends=tuple(named), **figures)


class PolicyContract:
    """What the gateway relies on. Derive a test class from it and give it your policy::

        class TestMine(PolicyContract):
            def policy(self) -> Policy:
                return Mine()

    ``policy`` is called several times and must give an equal policy each time.
    """

    #: Fleets tried by each test.
    examples = 50

    def policy(self) -> Policy:
        raise NotImplementedError("return the policy that is to be tested")

    def request(self) -> GenerateRequest:
        """The request that is scored; override it if the policy looks into it."""
        return make_request("A prompt of some length. " * 40)

    def test_declares_what_it_is(self) -> None:
        policy = self.policy()
        assert isinstance(policy, Policy), f"{type(policy).__name__} does not derive from Policy"
        assert isinstance(policy.needs, frozenset), "needs must be a frozenset of Need"
        assert all(isinstance(need, Need) for need in policy.needs), "needs may hold only Need"
        assert isinstance(policy.version, str), "version must be a string"
        assert policy.version, "version must not be empty"

    def test_scores_every_backend_within_0_and_1(self) -> None:
        policy, request = self.policy(), self.request()

        def check(snapshot: Snapshot) -> None:
            scores = policy.score(request, snapshot)
            size = len(snapshot.backends)
            assert len(scores) == size, f"{len(scores)} scores for {size} backends"
            for score in scores:
                assert score is None or _is_share(score), f"score {score!r} is not within 0 to 1"

        self._for_any_fleet(check)

    def test_is_deterministic_and_keeps_no_state(self) -> None:
        used, request = self.policy(), self.request()

        def check(snapshot: Snapshot) -> None:
            scores = list(used.score(request, snapshot))
            again = list(used.score(request, snapshot))
            assert scores == again, f"scored {scores}, then {again}, for the same snapshot"
            fresh = list(self.policy().score(self.request(), snapshot))
            assert scores == fresh, f"scored {scores} after other fleets, {fresh} when new"

        self._for_any_fleet(check)

    def test_leaves_its_input_alone(self) -> None:
        policy, request = self.policy(), self.request()
        sent = msgspec.msgpack.encode(request)

        def check(snapshot: Snapshot) -> None:
            seen = msgspec.msgpack.encode(snapshot)
            policy.score(request, snapshot)
            policy.propensity(request, snapshot)
            assert msgspec.msgpack.encode(snapshot) == seen, "the snapshot was changed"
            assert msgspec.msgpack.encode(request) == sent, "the request was changed"

        self._for_any_fleet(check)

    def test_propensity_sums_to_one_over_the_eligible(self) -> None:
        policy, request = self.policy(), self.request()

        def check(snapshot: Snapshot) -> None:
            chances = policy.propensity(request, snapshot)
            if chances is None:
                return
            scores = policy.score(request, snapshot)
            assert len(chances) == len(scores), f"{len(chances)} chances, {len(scores)} scores"
            assert all(_is_share(chance) for chance in chances), f"{chances} are not within 0 to 1"
            eligible = [score is not None for score in scores]
            total = sum(c for c, ok in zip(chances, eligible, strict=True) if ok)
            assert math.isclose(total, float(any(eligible)), abs_tol=1e-9), f"sum is {total}"
            vetoed = [c for c, ok in zip(chances, eligible, strict=True) if not ok]
            assert not any(vetoed), "a vetoed backend has a chance"

        self._for_any_fleet(check)

    def test_propensity_is_the_frequency_over_seeds(self) -> None:
        """A policy without ``propensity`` must not depend on the seed; others as often as said."""
        policy, request = self.policy(), self.request()

        def check(snapshot: Snapshot) -> None:
            chances = policy.propensity(request, snapshot)
            draws = 3 if chances is None else 400
            rows = [
                policy.score(request, msgspec.structs.replace(snapshot, seed=seed))
                for seed in range(snapshot.seed, snapshot.seed + draws)
            ]
            if chances is None:
                assert all(list(row) == list(rows[0]) for row in rows), (
                    "scores depend on the seed: override propensity"
                )
                return
            for wins, chance in zip(_wins(rows), chances, strict=True):
                # Six standard deviations and a half win for the normal approximation.
                slack = 6 * math.sqrt(draws * chance * (1 - chance)) + 0.5
                assert abs(wins - draws * chance) <= slack, f"{wins} of {draws}, said {chance}"

        # Hundreds of scores a fleet: small fleets, and no time spent on finding a smaller one.
        self._for_any_fleet(check, max_size=6, examples=10, phases=(Phase.generate,))

    def _for_any_fleet(
        self,
        check: Callable[[Snapshot], None],
        *,
        max_size: int = 64,
        examples: int | None = None,
        phases: Sequence[Phase] = (Phase.generate, Phase.shrink),
    ) -> None:
        bounded = settings(
            max_examples=examples or self.examples, phases=phases, deadline=None, database=None
        )
        # Not @given on the test itself: hypothesis refuses one test run by several subclasses.
        bounded(given(snapshots(max_size=max_size))(check))()


def _is_share(number: object) -> bool:
    return isinstance(number, float | int) and not isinstance(number, bool) and 0 <= number <= 1


def _wins(rows: Iterable[Sequence[Score]]) -> list[float]:
    """How often each backend had the best score; equals share the win."""
    totals: list[float] = []
    for row in rows:
        totals = totals or [0.0] * len(row)
        best = max((score for score in row if score is not None), default=None)
        winners = [i for i, score in enumerate(row) if score is not None and score == best]
        for index in winners:
            totals[index] += 1 / len(winners)
    return totals
