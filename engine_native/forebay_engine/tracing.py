"""The engine's spans: one of the request under the gateway's, with its queue, prefill and decode.

They are made when a request has ended, from times taken meanwhile; nothing is done for each token.
Only requests whose trace is recorded cost anything. Exported by OTLP/HTTP where the standard
variable ``OTEL_EXPORTER_OTLP_ENDPOINT`` says. Attributes follow OpenTelemetry's GenAI conventions.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from forebay_engine.request import Request, durations

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
SERVICE = "forebay-engine"


class Tracing:
    """Told of each ended request; ``close`` sends what is still to be sent."""

    def __init__(self, provider: TracerProvider, model: str) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("forebay_engine")
        self._model = model

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], model: str) -> Tracing | None:
        """None where no collector is named; the SDK is then not even imported."""
        if not environment.get(ENDPOINT):
            return None
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        name = environment.get("OTEL_SERVICE_NAME", SERVICE)
        provider = TracerProvider(resource=Resource.create({"service.name": name}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider, model)

    def record(self, request: Request) -> None:
        """Write the spans of an ended request whose trace is recorded."""
        if not sampled(request.command.traceparent):
            return
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {"traceparent": request.command.traceparent}
        parent = TraceContextTextMapPropagator().extract(carrier)
        # One reading ties the monotonic times to the calendar.
        offset = time.time_ns() - time.monotonic_ns()
        at = offset + int(request.submitted * 1e9)
        span = self._tracer.start_span(
            "engine.request", parent, start_time=at, attributes=self._attributes(request)
        )
        context = trace.set_span_in_context(span)
        for name, seconds in zip(("queue", "prefill", "decode"), durations(request), strict=True):
            end = at + int(seconds * 1e9)
            self._tracer.start_span(name, context, start_time=at).end(end)
            at = end
        span.end(at)

    def close(self) -> None:
        self._provider.shutdown()

    def _attributes(self, request: Request) -> dict[str, str | int | list[str]]:
        reasons = [choice.sequence.finish_reason for choice in request.choices]
        return {
            "gen_ai.request.model": self._model,
            "gen_ai.usage.input_tokens": request.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": request.cached_tokens,
            "gen_ai.usage.output_tokens": request.completion_tokens,
            "forebay.engine.drafted_tokens": request.drafted_tokens,
            "forebay.engine.accepted_tokens": request.accepted_tokens,
            "gen_ai.response.finish_reasons": [str(reason) for reason in reasons],
        }


def sampled(traceparent: str) -> bool:
    """Whether the trace is recorded: the last field's lowest bit (W3C Trace Context, 3.2.2)."""
    flags = traceparent.rpartition("-")[2]
    return len(traceparent) >= 55 and flags[-1:] in "13579bdf"
