"""Prometheus metrics: what happened is counted here, how things stand is read at each scrape.

No label ever holds text that a client chose: a model that is not configured is ``_unknown``, the
other labels are configured names or words from closed sets. ``docs/observability.md`` has the list.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import Metric

from forebay.api import Decision, Outcome
from forebay.telemetry.gauges import (
    FleetRow,
    Reading,
    counters,
    engine_figures,
    fleet_gauges,
    queue_gauge,
)

__all__ = ["FleetRow", "Metrics"]

UNKNOWN_MODEL = "_unknown"

# The GenAI conventions' buckets for servers, and beyond them up to the default total timeout, up to
# a CPU's prefill of a long prompt, and down to the 2.5 ms a token that small models reach.
_DURATION = tuple(0.01 * 2**step for step in range(17))
_TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    30,
    60,
)
_TPOT = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_OVERHEAD = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 1)
_QUEUE = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One registry per gateway. ``models`` are the configured names, the only ones labels show."""

    def __init__(self, models: Iterable[str]) -> None:
        self._models = frozenset(models)
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"forebay_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"forebay_{name}", text, labels, buckets=buckets, registry=registry)

        self._requests = counter(
            "requests_total", "Requests that have ended", "model", "endpoint", "outcome", "stream"
        )
        self._refused = counter(
            "refused_total", "Requests refused before they were routed", "endpoint", "error"
        )
        self._attempts = counter("attempts_total", "Attempts on backends", "backend", "result")
        self._retries = counter("retries_total", "Attempts after a request's first", "model")
        self._tokens = counter("tokens_total", "Tokens", "model", "backend", "direction", "source")
        self._cached = counter(
            "cached_tokens_total", "Input tokens that backends had cached", "model", "backend"
        )
        self._disconnects = counter(
            "client_disconnects_total", "Clients that left before the end", "phase"
        )
        served = ("model", "backend")
        self._duration = histogram(
            "request_duration_seconds", "Whole request, if answered", _DURATION, *served
        )
        self._ttft = histogram(
            "time_to_first_token_seconds", "From arrival to the first byte", _TTFT, *served
        )
        self._tpot = histogram(
            "time_per_output_token_seconds", "Mean after the first token", _TPOT, *served
        )
        self._overhead = histogram(
            "overhead_seconds", "In Forebay before the first attempt, queue excluded", _OVERHEAD
        )
        self._queue = histogram("queue_wait_seconds", "In Forebay's queue", _QUEUE, "model")
        self._served: dict[tuple[str, str], _Served] = {}
        self._children: dict[tuple[Counter | str, ...], Counter] = {}
        self._waits = {model: self._queue.labels(model) for model in (*self._models, UNKNOWN_MODEL)}
        Gauge("forebay_build_info", "Always 1", ("version", "python"), registry=registry).labels(
            version("forebay"), platform.python_version()
        ).set(1)
        ProcessCollector(registry=registry)

    def finished(self, decision: Decision, stream: bool) -> None:
        """A request has ended; ``decision.outcome`` is set."""
        outcome = decision.outcome
        if outcome is None:
            raise ValueError(f"request {decision.request_id} has no outcome yet")
        model = decision.model if decision.model in self._models else UNKNOWN_MODEL
        labels = (model, decision.endpoint, outcome.result, "true" if stream else "false")
        self._child(self._requests, *labels).inc()
        self._waits[model].observe(outcome.queue)
        attempts = decision.attempts
        if outcome.result == "client_disconnect":
            phase = "stream" if outcome.ttft else "prefill" if attempts else "queue"
            self._child(self._disconnects, phase).inc()
        if len(attempts) > 1:
            self._child(self._retries, model).inc(len(attempts) - 1)
        if attempts:
            self._overhead.observe(outcome.overhead)
            self._of(model, attempts[-1].backend).observe(outcome, stream)

    def attempt(self, backend: str, error: str | None) -> None:
        """An attempt has ended: ``error`` is the kind of its failure, None if it served."""
        self._child(self._attempts, backend, error or "ok").inc()

    def refused(self, endpoint: str, error: str) -> None:
        """A request ended without a decision; ``error`` is the kind, e.g. ``model_not_found``."""
        self._child(self._refused, endpoint, error).inc()

    def watch_fleet(self, views: Callable[[], Iterable[FleetRow]]) -> None:
        """Show the backends as ``views`` has them at each scrape."""
        self.registry.register(Reading(lambda: fleet_gauges(views())))
        self.registry.register(Reading(lambda: engine_figures(views())))

    def watch_queues(self, depths: Callable[[], Mapping[str, int]]) -> None:
        """Show how many requests wait, by model."""
        self.registry.register(Reading(lambda: [queue_gauge(depths())]))

    def watch_spans(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Show what became of spans: ``Tracing.spans``."""
        text = "Spans by what became of them"
        self.registry.register(Reading(lambda: [counters("spans", text, "result", counts())]))

    def watch_observers(
        self, failures: Callable[[], Mapping[str, int]], dropped: Callable[[], Mapping[str, int]]
    ) -> None:
        """Show how observers do: ``Observers.failures`` and ``Observers.dropped``."""
        raised, missed = "Calls in which an observer raised", "Events that observers never saw"
        self.registry.register(
            Reading(
                lambda: [
                    counters("observer_failures", raised, "observer", failures()),
                    counters("observer_dropped_events", missed, "event", dropped()),
                ]
            )
        )

    def render(self) -> bytes:
        """Prometheus' text format, version 0.0.4. Runs in a thread as well."""
        return generate_latest(_WithoutCreated(self.registry))

    def _child(self, family: Counter, *labels: str) -> Counter:
        # A plain dict: labels() takes a lock and three times as long.
        key: tuple[Counter | str, ...] = (family, *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = family.labels(*labels)
        return child

    def _of(self, model: str, backend: str) -> _Served:
        served = self._served.get((model, backend))
        if served is None:
            served = self._served[model, backend] = _Served(self, model, backend)
        return served


class _Served:
    """The series of one model on one backend, bound once."""

    def __init__(self, metrics: Metrics, model: str, backend: str) -> None:
        self._duration = metrics._duration.labels(model, backend)
        self._ttft = metrics._ttft.labels(model, backend)
        self._tpot = metrics._tpot.labels(model, backend)
        self._cached = metrics._cached.labels(model, backend)
        self._tokens = {
            (direction, source): metrics._tokens.labels(model, backend, direction, source)
            for direction in ("input", "output")
            for source in ("reported", "counted")
        }

    def observe(self, outcome: Outcome, stream: bool) -> None:
        usage = outcome.usage
        if usage is not None:
            self._tokens["input", usage.source].inc(usage.prompt_tokens)
            self._tokens["output", usage.source].inc(usage.completion_tokens)
            self._cached.inc(usage.cached_tokens or 0)
        if outcome.result != "ok":
            return
        self._duration.observe(outcome.duration)
        if not stream or outcome.ttft is None:
            return  # in an answer in one piece the first byte says nothing of the first token
        self._ttft.observe(outcome.ttft)
        # Choices are generated side by side: each has its share of the tokens.
        per_choice = usage.completion_tokens / max(1, len(outcome.finish_reasons)) if usage else 0.0
        if per_choice > 1:
            self._tpot.observe((outcome.duration - outcome.ttft) / (per_choice - 1))


class _WithoutCreated(CollectorRegistry):
    """A registry's families without their `_created` series, which nobody queries."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__()
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [s for s in family.samples if not s.name.endswith("_created")]
            yield family
