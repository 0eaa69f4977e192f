"""An OTLP receiver for traces, by all three ways in which servers send them.

gRPC, as vLLM; HTTP with protobuf, as Forebay and its engine; HTTP with JSON, as Triton.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Condition, Thread
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

#: In OTLP's JSON these are hexadecimal, in protobuf's all bytes are base64.
_IDS = {"traceId", "spanId", "parentSpanId"}


class Received:
    """A span, with its ids in hexadecimal and its attributes as Python has them."""

    def __init__(self, span: Span, service: str) -> None:
        self.service = service
        self.name = span.name
        self.trace = span.trace_id.hex()
        self.id = span.span_id.hex()
        self.parent = span.parent_span_id.hex()
        self.kind = Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_")
        #: Unix nanoseconds.
        self.start = span.start_time_unix_nano
        self.end = span.end_time_unix_nano
        self.attributes = values(span.attributes)
        self.events = {event.name: event.time_unix_nano for event in span.events}
        self.failed = span.status.code == 2
        self.raw = span.SerializeToString()

    def __repr__(self) -> str:
        return f"<{self.service} {self.name} {self.id} below {self.parent} {self.attributes}>"


class OtlpReceiver(AbstractContextManager["OtlpReceiver"]):
    """Listens on two free ports of this machine, from ``with`` to its end."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._spans: list[Received] = []
        self._grpc = grpc.server(ThreadPoolExecutor(2))
        add_TraceServiceServicer_to_server(_Servicer(self._add), self._grpc)
        port = self._grpc.add_insecure_port("127.0.0.1:0")
        self.grpc_url = f"http://127.0.0.1:{port}"
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self._add))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> OtlpReceiver:
        self._grpc.start()
        self._thread = Thread(target=self._http.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        self._grpc.stop(0).wait()

    def trace(self, trace: str) -> list[Received]:
        """The spans of a trace so far, by their begin."""
        with self._changed:
            return sorted((s for s in self._spans if s.trace == trace), key=lambda s: s.start)

    def wait(
        self, trace: str, complete: Callable[[list[Received]], bool], seconds: float = 30
    ) -> list[Received]:
        """The spans of a trace, once they are what is wanted; or as they are after that time."""
        give_up = time.monotonic() + seconds
        with self._changed:
            while not complete(found := self.trace(trace)):
                if not self._changed.wait(give_up - time.monotonic()):
                    break
        return found

    def _add(self, request: ExportTraceServiceRequest) -> None:
        with self._changed:
            for resource in request.resource_spans:
                service = values(resource.resource.attributes).get("service.name", "")
                for scope in resource.scope_spans:
                    self._spans += [Received(span, service) for span in scope.spans]
            self._changed.notify_all()


def values(attributes: Any) -> dict[str, Any]:
    return {item.key: _value(item) for item in attributes}


def _value(item: KeyValue) -> Any:
    kind = item.value.WhichOneof("value")
    if kind == "array_value":
        return [getattr(v, v.WhichOneof("value")) for v in item.value.array_value.values]
    return getattr(item.value, kind)


class _Servicer(TraceServiceServicer):
    def __init__(self, add: Callable[[ExportTraceServiceRequest], None]) -> None:
        self._add = add

    def Export(
        self, request: ExportTraceServiceRequest, context: object
    ) -> ExportTraceServiceResponse:
        self._add(request)
        return ExportTraceServiceResponse()


def _handler(add: Callable[[ExportTraceServiceRequest], None]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            kind = self.headers["content-type"]
            if kind == "application/json":
                add(ParseDict(_with_ids(json.loads(body)), ExportTraceServiceRequest()))
            else:
                add(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("content-type", kind)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    return Handler


def _with_ids(content: Any) -> Any:
    if isinstance(content, list):
        return [_with_ids(item) for item in content]
    if not isinstance(content, dict):
        return content
    return {
        name: base64.b64encode(bytes.fromhex(value)).decode() if name in _IDS else _with_ids(value)
        for name, value in content.items()
    }
