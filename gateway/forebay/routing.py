"""The router: freezes the world for one request, asks the model's policy, keeps the record."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping

from msgspec import Struct

from forebay.api import (
    Candidate,
    Decision,
    Need,
    NoBackend,
    Policy,
    Request,
    Snapshot,
    UnknownModel,
    Unsupported,
)
from forebay.backend import BEING_EXAMINED, Backend
from forebay.fleet import Fleet
from forebay.prefix_index import PrefixIndex, PrefixKey
from forebay.ranking import rank

# Vetoes that pass with time; all others are about what a backend can do.
_PASSING = frozenset({"starting", "unhealthy", "ejected", "draining", "busy"})
# Those of them that pass soon: it is worth waiting.
_SOON = frozenset({"full", BEING_EXAMINED})


class Route(Struct, frozen=True):
    """A model's policy under the name by which it was configured."""

    name: str
    policy: Policy


class Choice(Struct, frozen=True):
    """A decision together with what dispatch needs to carry it out."""

    decision: Decision
    #: In the order of the decision.
    backends: tuple[Backend, ...]
    #: What the request costs in uncached prompt tokens on each of them (estimate, at least 1).
    tokens: tuple[int, ...]
    key: PrefixKey | None = None


class Router:
    """Chooses backends. Synchronous: between snapshot and choice nothing else can happen."""

    def __init__(self, fleet: Fleet, routes: Mapping[str, Route], index: PrefixIndex) -> None:
        self._fleet = fleet
        self._routes = routes
        self._index = index
        self._turn = dict.fromkeys(routes, 0)
        self._turns: dict[str, dict[str, float]] = {model: {} for model in routes}
        self._present: dict[str, frozenset[str]] = {model: frozenset() for model in routes}

    def check_model(self, model: str) -> None:
        """:raises UnknownModel: nobody serves it."""
        if model not in self._routes:
            raise UnknownModel(
                f"the model {model!r} does not exist here; GET /v1/models lists those that do",
                param="model",
            )

    def choose(self, request: Request, arrived: float, trace_id: str) -> Choice:
        """Decide who may serve the request, in which order. ``arrived``: Unix seconds."""
        route = self._routes[request.model]
        open_, vetoed = self._sort_out(request)
        seed = random.getrandbits(63)  # spreads load, keeps no secret
        key, prompt_tokens, hits = self._prefixes(route.policy, request, open_)
        turns = self._fair_turns(request.model, open_)
        snapshot = Snapshot(
            model=request.model,
            backends=tuple(
                backend.view(weight, turns.get(backend.name, 0.0), hit)
                for (backend, weight), hit in zip(open_, hits, strict=True)
            ),
            turn=self._turn[request.model],
            seed=seed,
            prompt_tokens=prompt_tokens,
        )
        ranking = rank(route.policy, request, snapshot)
        self._turn[request.model] += 1
        if ranking.order:
            turns[ranking.order[0]] = turns.get(ranking.order[0], 0.0) + 1.0
        hit_of = dict(zip((backend.name for backend, _ in open_), hits, strict=True))
        by_name = {backend.name: backend for backend, _ in open_}
        decision = Decision(
            request_id=request.id,
            time=arrived,
            endpoint=request.endpoint,
            model=request.model,
            identity=request.identity,
            policy=route.name if ranking.fault is None else f"{route.name} (failed)",
            policy_version=route.policy.version,
            seed=seed,
            candidates=ranking.candidates + vetoed,
            order=ranking.order,
            probability=ranking.probability,
            trace_id=trace_id,
        )
        return Choice(
            decision,
            tuple(by_name[name] for name in ranking.order),
            tuple(max(1, prompt_tokens - hit_of[name]) for name in ranking.order),
            key,
        )

    def _sort_out(
        self, request: Request
    ) -> tuple[list[tuple[Backend, float]], tuple[Candidate, ...]]:
        """Split the model's backends into those that may serve now, and the vetoed."""
        now = time.monotonic()
        open_: list[tuple[Backend, float]] = []
        busy: list[tuple[Backend, float]] = []
        vetoes: list[tuple[Backend, str]] = []
        for backend, weight in self._fleet.pool(request.model):
            state = backend.health.state(now)
            veto = backend.lacks(request) or ("full" if backend.full else None)
            if state != "healthy":
                vetoes.append((backend, state))
            elif veto:
                vetoes.append((backend, veto))
            elif backend.health.busy(now):
                busy.append((backend, weight))
            else:
                open_.append((backend, weight))
        if not open_:  # all said "busy": one of them may have changed its mind
            open_ = busy
        else:
            vetoes.extend((backend, "busy") for backend, _ in busy)
        return open_, tuple(
            Candidate(backend.name, None, veto, backend.in_flight, 0, backend.load_age())
            for backend, veto in vetoes
        )

    def _prefixes(
        self, policy: Policy, request: Request, open_: list[tuple[Backend, float]]
    ) -> tuple[PrefixKey | None, int, list[int]]:
        if Need.PREFIX not in policy.needs:
            return None, 0, [0] * len(open_)
        key = self._index.key(request)
        hits = self._index.match(key, [backend.name for backend, _ in open_])
        return key, self._index.prompt_tokens(key), hits

    def _fair_turns(self, model: str, open_: list[tuple[Backend, float]]) -> dict[str, float]:
        """Lift those that (re)join to the least of the others, so that they get no burst."""
        turns = self._turns[model]
        present = frozenset(backend.name for backend, _ in open_)
        joined = present - self._present[model]
        if joined:
            stayed = [
                turns.get(backend.name, 0.0) / weight
                for backend, weight in open_
                if backend.name not in joined
            ]
            for backend, weight in open_:
                if stayed and backend.name in joined:
                    turns[backend.name] = max(turns.get(backend.name, 0.0), min(stayed) * weight)
        self._present[model] = present
        return turns


def refusal(decision: Decision) -> NoBackend | Unsupported | None:
    """Why nobody may serve; None: all that could are full or examined, so waiting may help."""
    vetoes = [candidate.veto or "" for candidate in decision.candidates]
    if not _SOON.isdisjoint(vetoes):
        return None
    lacking = [
        f"{candidate.backend} {candidate.veto}"
        for candidate in decision.candidates
        if candidate.veto and candidate.veto not in _PASSING and candidate.veto != "policy"
    ]
    if lacking and len(lacking) == len(vetoes):
        return Unsupported(f"no backend of {decision.model!r} can do this: {'; '.join(lacking)}")
    states = ", ".join(f"{c.backend}: {c.veto}" for c in decision.candidates)
    return NoBackend(f"no backend of {decision.model!r} is available ({states})", retry_after=1.0)
