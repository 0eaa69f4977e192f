"""Everyone who wants to know about a request, told in one place."""

from __future__ import annotations

from forebay.api import Decision
from forebay.telemetry import logs
from forebay.telemetry.decisions import DecisionStore
from forebay.telemetry.metrics import Metrics
from forebay.telemetry.observers import Observers


class Recorder:
    """Metrics, log, decision store and observers. Nothing here waits or raises."""

    def __init__(self, metrics: Metrics, decisions: DecisionStore, observers: Observers) -> None:
        self._metrics = metrics
        self._decisions = decisions
        self._observers = observers

    def started(self, decision: Decision) -> None:
        self._decisions.put(decision)
        self._observers.started(decision)

    def first_token(self, decision: Decision, seconds: float) -> None:
        self._observers.first_token(decision, seconds)

    def attempt(self, backend: str, error: str | None) -> None:
        self._metrics.attempt(backend, error)

    def refused(self, endpoint: str, error: str) -> None:
        self._metrics.refused(endpoint, error)

    def finished(self, decision: Decision, stream: bool) -> None:
        self._decisions.put(decision)
        self._metrics.finished(decision, stream)
        self._observers.finished(decision)
        logs.request_done(decision)
