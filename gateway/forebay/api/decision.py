"""The Decision: one record per routed request, from which everything else is read."""

from __future__ import annotations

from msgspec import Struct

from forebay.api.messages import Identity, Timings, Usage

__all__ = ["AttemptRecord", "Candidate", "Decision", "Outcome"]


class Candidate(Struct, frozen=True):
    """A backend of the model, with its score or the reason why it was out of the question."""

    backend: str
    score: float | None = None
    #: ``unhealthy``, ``ejected``, ``draining``, ``full``, ``policy``, or the missing capability.
    veto: str | None = None
    in_flight: int = 0
    prefix_tokens: int = 0
    #: Seconds since the backend's own load figures were read; None: it has none.
    load_age: float | None = None


class AttemptRecord(Struct, frozen=True):
    backend: str
    #: Seconds from the request's arrival to the attempt's begin.
    started: float
    #: Seconds the attempt took, until its end or its failure.
    duration: float
    #: Kind of the error that ended it, None if it served the answer.
    error: str | None = None


class Outcome(Struct, frozen=True, kw_only=True):
    #: ok | client_error | shed | upstream_error | upstream_timeout | truncated | client_disconnect
    #: | internal_error
    result: str
    #: HTTP status sent (499: the client had gone).
    status: int = 200
    error: str | None = None
    #: Seconds: in Forebay's queue; to the first token; whole request.
    queue: float = 0.0
    ttft: float | None = None
    duration: float = 0.0
    #: Seconds of the request spent in Forebay itself before the first attempt was sent.
    overhead: float = 0.0
    #: Streamed events, or 1.
    events: int = 0
    finish_reasons: tuple[str, ...] = ()
    usage: Usage | None = None
    timings: Timings | None = None
    #: ``relay`` or ``typed``.
    lane: str = ""


class Decision(Struct, frozen=True, kw_only=True):
    """Who was asked to serve a request, why, and what came of it."""

    request_id: str
    #: Unix seconds of arrival.
    time: float
    endpoint: str
    model: str
    identity: Identity
    policy: str
    policy_version: str
    seed: int
    candidates: tuple[Candidate, ...]
    #: In the order in which they may be tried; empty: nobody was eligible.
    order: tuple[str, ...]
    #: With which the policy chose the first of them.
    probability: float = 1.0
    #: The experiment's arm; empty outside experiments.
    arm: str = ""
    trace_id: str = ""
    attempts: tuple[AttemptRecord, ...] = ()
    #: None while the request is in flight.
    outcome: Outcome | None = None

    @property
    def chosen(self) -> str | None:
        return self.order[0] if self.order else None

    @property
    def runner_up(self) -> str | None:
        return self.order[1] if len(self.order) > 1 else None

    @property
    def served_by(self) -> str | None:
        """The backend whose answer the client got."""
        return next((a.backend for a in self.attempts if a.error is None), None)
