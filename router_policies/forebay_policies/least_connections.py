"""The backend with the fewest unfinished answers for its weight.

Formula
    load  = (in_flight + 1) / weight        as if the request were already there
    score = least load / load

Intent
    Even concurrency, so even batches and KV use, with no signal but our own counters. ``in_flight``
    is counted until the stream ends, not until its head has come: a backend that is still writing
    a long answer is busy.

    Against the alternatives on recorded traffic it beats round robin clearly and loses to
    ``prefix_affinity`` wherever prompts share prefixes.

Options
    none; ``weight`` belongs to the backend's entry in the model.
"""

from __future__ import annotations

from collections.abc import Sequence

from forebay.api import Policy, PolicyKind, Request, Score, Snapshot

__all__ = ["KIND", "LeastConnections"]


class LeastConnections(Policy):
    """Weighted least connections; equals are drawn by the gateway."""

    def score(self, request: Request, snapshot: Snapshot) -> Sequence[Score]:
        loads = [(b.in_flight + 1) / b.weight for b in snapshot.backends]
        least = min(loads)
        return [least / load for load in loads]


KIND = PolicyKind(
    name="least_connections",
    build=lambda settings: LeastConnections(),
    summary="fewest unfinished answers, by weight",
)
