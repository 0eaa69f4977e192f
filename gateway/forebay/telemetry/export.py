"""From ended spans to an OTLP/HTTP collector, off the hot path and without ever waiting for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from threading import Thread

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Tracer

from forebay.api import ConfigError
from forebay.config import Tracing as Settings

#: Spans that may wait: some 16 MB at 2 kB each, and 5 s of 250 requests/s with six spans each.
QUEUE = 8192
BATCH = 512
#: Seconds a batch waits to be filled; the SDK's own 5 s make a person at a console wait.
DELAY = 1.0
#: Seconds one export may take, retries included; then its batch is lost and counted.
EXPORT_TIMEOUT = 5.0
#: Seconds that closing may take.
CLOSE_TIMEOUT = 5.0


class _Counted(SpanExporter):
    """An exporter whose results are counted, by the one thread that exports."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._closed = False
        self.exported = 0
        self.failed = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            if result is SpanExportResult.SUCCESS:
                self.exported += len(spans)
            else:
                self.failed += len(spans)
        return result

    def shutdown(self) -> None:
        if not self._closed:
            self._closed = True
            self._exporter.shutdown()


class _Bounded(BatchSpanProcessor):
    """A batch processor that counts what it drops; the SDK's own would log each dropped span."""

    def __init__(self, exporter: _Counted) -> None:
        super().__init__(
            exporter,
            max_queue_size=QUEUE,
            schedule_delay_millis=DELAY * 1e3,
            max_export_batch_size=BATCH,
        )
        self._counted = exporter
        self._taken = 0
        self._closed = False
        self.dropped = 0

    def on_end(self, span: ReadableSpan) -> None:
        waiting = self._taken - self._counted.exported - self._counted.failed
        if self._closed or waiting >= QUEUE:
            self.dropped += 1
            return
        self._taken += 1
        super().on_end(span)

    def shutdown(self) -> None:
        self._closed = True
        super().shutdown()  # type: ignore[no-untyped-call]  # the SDK annotates no result here
        self.dropped += self._taken - self._counted.exported - self._counted.failed


class SpanPipe:
    """A tracer with its exporter: what :class:`forebay.telemetry.tracing.Tracing` records into."""

    def __init__(self, provider: TracerProvider, processor: _Bounded, exporter: _Counted) -> None:
        self._provider = provider
        self._processor = processor
        self._exporter = exporter
        self.tracer: Tracer = provider.get_tracer("forebay", version("forebay"))
        self.environment: Mapping[str, str] = {}

    @classmethod
    def open(cls, settings: Settings) -> SpanPipe:
        """Start the exporting thread.

        :raises ConfigError: the endpoint is no HTTP URL, or the sampled share is not in 0 to 1.
        """
        endpoint = settings.otlp_endpoint.rstrip("/").removesuffix("/v1/traces")
        if not endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"tracing.otlp_endpoint: {settings.otlp_endpoint!r} is not an HTTP URL; "
                "write it like http://127.0.0.1:4318"
            )
        if not 0 <= settings.sample <= 1:
            raise ConfigError(
                f"tracing.sample: {settings.sample} is not a share; write a number from 0 to 1"
            )
        exporter = _Counted(
            OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces", timeout=EXPORT_TIMEOUT)
        )
        processor = _Bounded(exporter)
        provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(settings.sample)),
            resource=Resource.create(
                {"service.name": settings.service_name, "service.version": version("forebay")}
            ),
            shutdown_on_exit=False,
        )
        provider.add_span_processor(processor)
        pipe = cls(provider, processor, exporter)
        pipe.environment = _environment(endpoint, settings.service_name)
        return pipe

    def counts(self) -> Mapping[str, int]:
        """Spans so far by what became of them."""
        return {
            "exported": self._exporter.exported,
            "failed": self._exporter.failed,
            "dropped": self._processor.dropped,
        }

    def close(self) -> None:
        """Send what waits. A collector that does not answer can not hold this up."""
        thread = Thread(target=self._provider.shutdown, name="forebay-spans-close", daemon=True)
        thread.start()
        thread.join(CLOSE_TIMEOUT)
        self._exporter.shutdown()  # wakes an export that sleeps before its next retry


def _environment(endpoint: str, service_name: str) -> dict[str, str]:
    """For engines started by adapters. They join our traces and never begin their own."""
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",  # the one that vLLM reads
        "OTEL_SERVICE_NAME": f"{service_name}-engine",
        "OTEL_TRACES_SAMPLER": "parentbased_always_off",
    }
