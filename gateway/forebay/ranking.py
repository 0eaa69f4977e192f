"""From the frozen world to an ordered list of candidates: plain functions, no I/O."""

from __future__ import annotations

import math
from collections.abc import Sequence

import structlog
from msgspec import Struct

from forebay.api import BackendView, Candidate, Policy, Request, Score, Snapshot

log = structlog.get_logger("forebay.routing")

_MASK = (1 << 64) - 1


class Ranking(Struct, frozen=True):
    """What a policy made of a snapshot."""

    candidates: tuple[Candidate, ...]
    #: Names, best first.
    order: tuple[str, ...]
    #: With which the first was chosen, over all seeds.
    probability: float
    #: Set when the policy failed and the least busy backend was taken instead.
    fault: str | None = None


def rank(policy: Policy, request: Request, snapshot: Snapshot) -> Ranking:
    """Ask the policy; a policy that fails is replaced by least connections for this request.

    Failing open is deliberate: a mistake in somebody's policy must not take the service down. It is
    logged, and the decision names it.
    """
    views = snapshot.backends
    if not views:
        return Ranking((), (), 1.0)
    fault = None
    try:
        scores = policy.score(request, snapshot)
        propensity = policy.propensity(request, snapshot)
        fault = _fault(scores, propensity, len(views))
    except Exception as error:  # noqa: BLE001 - see above
        fault = f"{type(error).__name__}: {error}"
    if fault is not None:
        log.error("policy failed", policy=type(policy).__name__, fault=fault, model=snapshot.model)
        scores, propensity = _least_busy(views), None
    return _ranking(views, scores, propensity, snapshot.seed, fault)


def _least_busy(views: Sequence[BackendView]) -> list[Score]:
    shares = [view.weight / (view.in_flight + 1) for view in views]
    return [share / max(shares) for share in shares]


def _fault(scores: Sequence[Score], propensity: Sequence[float] | None, count: int) -> str | None:
    if len(scores) != count:
        return f"{len(scores)} scores for {count} backends"
    if propensity is not None and len(propensity) != count:
        return f"{len(propensity)} propensities for {count} backends"
    for score in scores:
        if score is not None and not 0.0 <= score <= 1.0:  # NaN too
            return f"score {score!r} is not between 0 and 1"
    return None


def _ranking(
    views: Sequence[BackendView],
    scores: Sequence[Score],
    propensity: Sequence[float] | None,
    seed: int,
    fault: str | None,
) -> Ranking:
    candidates = tuple(
        Candidate(
            view.name,
            score,
            None if score is not None else "policy",
            view.in_flight,
            view.prefix_tokens,
            view.load_age,
        )
        for view, score in zip(views, scores, strict=True)
    )
    eligible = [i for i, score in enumerate(scores) if score is not None]
    eligible.sort(key=lambda i: (-(scores[i] or 0.0), _draw(seed, i)))
    if not eligible:
        return Ranking(candidates, (), 1.0, fault)
    first = eligible[0]
    if propensity is not None:
        probability = propensity[first]
    else:
        probability = 1.0 / sum(1 for score in scores if score == scores[first])
    order = tuple(views[i].name for i in eligible)
    return Ranking(candidates, order, probability if math.isfinite(probability) else 1.0, fault)


def _draw(seed: int, index: int) -> int:
    """splitmix64 of (seed, index): evenly drawn order among equals, the same for equal seeds."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
