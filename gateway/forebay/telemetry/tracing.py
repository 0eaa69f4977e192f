"""Tracing: one trace from the client's `traceparent` to the backend, one span an attempt.

    SERVER  POST /v1/chat/completions
    ├── INTERNAL  route                      the decision
    ├── CLIENT    chat gemma-3-270m          an attempt that failed (error.type)
    └── CLIENT    chat gemma-3-270m          the next one (http.request.resend_count = 1)
        ├── INTERNAL  queue                  from the backend's own timings, or as seen from
        ├── INTERNAL  prefill                here; forebay.synthetic = true
        └── INTERNAL  decode

Spans are kept in these objects and never made «current»: an async generator that is closed early
ends in another context, where detaching one fails. Nothing here is called for a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import time_ns

from opentelemetry.context import Context
from opentelemetry.trace import (
    Span,
    SpanKind,
    StatusCode,
    Tracer,
    set_span_in_context,
)
from opentelemetry.util.types import AttributeValue

from forebay.api import Decision, Request, Timings, Usage
from forebay.config import Tracing as Settings
from forebay.telemetry import names
from forebay.telemetry.phases import lay_out, observed
from forebay.telemetry.propagation import Incoming, outgoing

Backends = dict[tuple[str, str, str], Mapping[str, AttributeValue]]


class AttemptTrace:
    """One attempt. This class is the one that is not recorded: it only carries headers."""

    __slots__ = ("headers",)

    def __init__(self, headers: Mapping[str, str]) -> None:
        #: `traceparent` and `tracestate` for the backend; empty if there is no trace.
        self.headers = headers

    def first_token(self) -> None:
        """The first byte of the answer has come. Only the first call counts."""

    def end(
        self,
        *,
        usage: Usage | None = None,
        timings: Timings | None = None,
        finish_reasons: tuple[str, ...] = (),
        error: str | None = None,
        synthesise: bool = True,
        lane: str = "",
        model: str = "",
    ) -> None:
        """The attempt is over; ``error`` is the kind of what ended it.

        ``synthesise``: false for backends that export spans of their own, which would show twice.
        ``model``: the one that answered, by the backend's name for it.
        """


class RequestTrace:
    """One request. This class is the one that is not recorded: it passes the trace on."""

    __slots__ = ("headers", "trace_id")

    def __init__(self, trace_id: str, headers: Mapping[str, str]) -> None:
        #: 32 hex digits; empty if tracing is off and the client sent none.
        self.trace_id = trace_id
        self.headers = headers

    def decided(self, decision: Decision, start_ns: int, end_ns: int) -> None:
        """The request was routed, between two times in Unix nanoseconds (``time.time_ns``)."""

    def attempt(
        self, number: int, backend: str, provider: str, address: str, request: Request
    ) -> AttemptTrace:
        """Begin an attempt; ``number`` is 1 for the first. End it in a ``finally``."""
        return AttemptTrace(self.headers)

    def end(self, status: int, decision: Decision | None, error: str | None) -> None:
        """The request is over. ``status`` 499: the client had gone."""


class _RecordedAttempt(AttemptTrace):
    __slots__ = ("_first", "_span", "_start", "_streams", "_tracer")

    def __init__(self, tracer: Tracer, span: Span, start: int, streams: bool) -> None:
        super().__init__(outgoing(span.get_span_context()))
        self._streams = streams
        self._tracer = tracer
        self._span = span
        self._start = start
        self._first: int | None = None

    def first_token(self) -> None:
        if self._first is None:
            self._first = time_ns()

    def end(
        self,
        *,
        usage: Usage | None = None,
        timings: Timings | None = None,
        finish_reasons: tuple[str, ...] = (),
        error: str | None = None,
        synthesise: bool = True,
        lane: str = "",
        model: str = "",
    ) -> None:
        if not self._span.is_recording():
            return
        end = max(time_ns(), self._start)
        attributes = names.usage(usage) if usage is not None else {}
        if finish_reasons:
            attributes[names.FINISH_REASONS] = finish_reasons
        if model:
            attributes[names.RESPONSE_MODEL] = model[: names.LONGEST_NAME]
        if self._first is not None and self._streams:
            attributes[names.TIME_TO_FIRST_CHUNK] = (self._first - self._start) / 1e9
        if lane:
            attributes[names.LANE] = lane
        _fail(self._span, attributes, error, at_fault=True)
        if synthesise:
            self._synthesise(timings or Timings(), end)
        self._span.set_attributes(attributes)
        self._span.end(end)

    def _synthesise(self, timings: Timings, end: int) -> None:
        phases, source = lay_out(timings, self._start, self._first, end), timings.source
        if not phases and self._streams and self._first is not None:
            phases, source = observed(self._start, self._first, end), names.GATEWAY
        attributes: names.Attributes = {names.SYNTHETIC: True, names.TIMING_SOURCE: source}
        context = set_span_in_context(self._span, Context())
        for name, begin, until in phases:
            self._tracer.start_span(
                name, context, SpanKind.INTERNAL, attributes, start_time=begin
            ).end(until)


class _RecordedRequest(RequestTrace):
    __slots__ = ("_backends", "_context", "_decision", "_span", "_tracer")

    def __init__(self, tracer: Tracer, span: Span, backends: Backends) -> None:
        context = span.get_span_context()
        super().__init__(f"{context.trace_id:032x}", outgoing(context))
        self._tracer = tracer
        self._span = span
        self._context = set_span_in_context(span, Context())
        self._backends = backends
        self._decision: Decision | None = None

    def decided(self, decision: Decision, start_ns: int, end_ns: int) -> None:
        self._decision = decision
        self._tracer.start_span(
            names.ROUTE_SPAN,
            self._context,
            SpanKind.INTERNAL,
            names.route(decision),
            start_time=start_ns,
        ).end(end_ns)

    def attempt(
        self, number: int, backend: str, provider: str, address: str, request: Request
    ) -> AttemptTrace:
        name, attributes = names.attempt_span(request)
        key = (backend, provider, address)
        known = self._backends.get(key)
        if known is None:
            known = self._backends[key] = names.backend(*key)
        attributes.update(known)
        if self._decision is not None:
            attributes.update(names.route_on_attempt(self._decision, backend))
        if number > 1:
            attributes[names.RESEND_COUNT] = number - 1
        start = time_ns()
        span = self._tracer.start_span(
            name, self._context, SpanKind.CLIENT, attributes, start_time=start
        )
        return _RecordedAttempt(self._tracer, span, start, request.stream)

    def end(self, status: int, decision: Decision | None, error: str | None) -> None:
        if not self._span.is_recording():
            return
        attributes = names.server_result(status, decision)
        if status == 499:
            error = names.CLIENT_DISCONNECTED
        # A 4xx is the client's mistake; a stream that broke after its 200 is ours.
        _fail(self._span, attributes, error, at_fault=not 400 <= status < 500)
        if error is None and status >= 500:
            _fail(self._span, attributes, str(status), at_fault=True)
        self._span.set_attributes(attributes)
        self._span.end()


class Tracing:
    """The tracer of one gateway process: an own provider, never the global one."""

    def __init__(
        self,
        tracer: Tracer | None,
        environment: Mapping[str, str],
        close: Callable[[], None],
        spans: Callable[[], Mapping[str, int]],
    ) -> None:
        self._tracer = tracer
        self._untraced = RequestTrace("", {})
        # What spans say of a backend, worked out once; as many entries as there are backends.
        self._backends: Backends = {}
        self._close = close
        #: `OTEL_*` variables for processes that adapters start; empty when tracing is off.
        self.environment = environment
        #: How many spans were ``exported``, ``failed`` and ``dropped`` so far.
        self.spans = spans

    @classmethod
    def build(cls, settings: Settings) -> Tracing:
        """From the configuration; without an endpoint nothing is recorded."""
        if not settings.otlp_endpoint:
            return cls(None, {}, lambda: None, dict)
        # The SDK and its exporter take 20 MB of memory: only who traces pays.
        from forebay.telemetry.export import SpanPipe

        pipe = SpanPipe.open(settings)
        return cls(pipe.tracer, pipe.environment, pipe.close, pipe.counts)

    def request(self, route: str, method: str, headers: Mapping[str, str]) -> RequestTrace:
        """Begin a request. ``route`` is the template, not the raw path; header names in lower case.

        A malformed `traceparent` starts a new trace; an unsampled one is passed on as it came.
        """
        incoming = Incoming.read(headers)
        if incoming is not None and (self._tracer is None or not incoming.sampled):
            return RequestTrace(incoming.trace_id, incoming.passed_on())
        if self._tracer is None:
            return self._untraced
        # An explicit context each time: the ambient one belongs to whoever embeds us.
        parent = Context() if incoming is None else set_span_in_context(incoming.span(), Context())
        name, attributes = names.server_span(route, method)
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, attributes)
        if span.is_recording():
            return _RecordedRequest(self._tracer, span, self._backends)
        context = span.get_span_context()
        return RequestTrace(f"{context.trace_id:032x}", outgoing(context))

    def close(self) -> None:
        """Send what is left, for at most five seconds. Blocks: call it from a thread."""
        self._close()


def _fail(span: Span, attributes: names.Attributes, error: str | None, *, at_fault: bool) -> None:
    if error is None:
        return
    kind = attributes[names.ERROR_TYPE] = names.error_type(error)
    if at_fault and kind != names.CLIENT_DISCONNECTED:
        span.set_status(StatusCode.ERROR)
