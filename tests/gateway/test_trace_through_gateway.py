"""What a request leaves behind, seen from outside a running gateway."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import structlog
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from forebay.api import (
    Attempt,
    BackendSettings,
    ConnectFailed,
    Delta,
    Event,
    Finished,
    GenerateRequest,
    Started,
    StreamTruncated,
    Timings,
    Usage,
)
from forebay.config import Config, Logging, Model
from forebay.config import Tracing as Settings
from forebay.telemetry import logs

CANARY = "tell-nobody"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "req-7"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": CANARY}], "stream": True}
SERVER = "POST /v1/chat/completions"


def config(endpoint: str) -> Config:
    return Config(
        backends={name: BackendSettings(adapter="scripted") for name in "ab"},
        models={"m": Model(backends=["a", "b"], policy="round_robin")},
        tracing=Settings(otlp_endpoint=endpoint),
    )


async def second_time_lucky(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
    if attempt.number == 1:
        raise ConnectFailed("nobody listens")
    yield Started()
    await asyncio.sleep(0.02)
    for _ in range(300):
        yield Delta(0, CANARY)
    await asyncio.sleep(0.02)
    yield Delta(0, finish_reason="stop")
    timings = Timings(queue=0.002, prefill=0.01, decode=0.01, source="scripted")
    yield Finished(Usage(7, 300), timings, ("stop",))


async def for_ever(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
    yield Started()
    while True:
        yield Delta(0, "on ")
        await asyncio.sleep(0.01)


async def serve(serve_gateway: Any, endpoint: str, script: Any) -> Any:
    gateway = await serve_gateway(config(endpoint))
    for adapter in gateway.scripted.values():
        adapter.script = script
    return gateway


@pytest.mark.usefixtures("logging_as_before")
async def test_one_trace_from_the_client_to_the_backend(
    serve_gateway: Any, collector: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(Logging(level="debug"))
    gateway = await serve(serve_gateway, collector.endpoint, second_time_lucky)
    async with gateway.client() as client, gateway.admin() as admin:
        response = await client.post("/v1/chat/completions", json=CHAT, headers=HEADERS)
        assert response.text.count(CANARY) == 300
        decision = (await admin.get("/decisions/req-7")).json()
        metrics = (await admin.get("/metrics")).text
    spans = await collector.spans_of(gateway.app.aclose)

    assert sorted((s.name, s.kind) for s in spans) == sorted(
        [
            (SERVER, Span.SPAN_KIND_SERVER),
            ("route", Span.SPAN_KIND_INTERNAL),
            ("chat m", Span.SPAN_KIND_CLIENT),
            ("chat m", Span.SPAN_KIND_CLIENT),
            ("queue", Span.SPAN_KIND_INTERNAL),
            ("prefill", Span.SPAN_KIND_INTERNAL),
            ("decode", Span.SPAN_KIND_INTERNAL),
        ]
    )
    assert {s.trace_id.hex() for s in spans} == {TRACE}
    server = collector.by_name(spans, SERVER)
    assert server.parent_span_id.hex() == PARENT
    assert collector.attributes(server)["forebay.request_id"] == "req-7"
    first, second = sorted(
        (s for s in spans if s.name == "chat m"), key=lambda s: s.start_time_unix_nano
    )
    for child in (first, second, collector.by_name(spans, "route")):
        assert child.parent_span_id == server.span_id
        assert child.start_time_unix_nano >= server.start_time_unix_nano
        assert child.end_time_unix_nano <= server.end_time_unix_nano
    assert collector.attributes(first)["error.type"] == "connect_failed"
    told = collector.attributes(second)
    assert told["http.request.resend_count"] == 1
    assert told["gen_ai.usage.output_tokens"] == 300
    assert told["forebay.lane"] == "typed"
    assert told["forebay.backend"] == response.headers["x-forebay-backend"]
    sent = {
        attempt.number: attempt.headers["traceparent"]
        for adapter in gateway.scripted.values()
        for attempt in adapter.attempts
    }
    assert sent == {
        1: f"00-{TRACE}-{first.span_id.hex()}-01",
        2: f"00-{TRACE}-{second.span_id.hex()}-01",
    }
    edges = []
    for name in ("queue", "prefill", "decode"):
        phase = collector.by_name(spans, name)
        assert phase.parent_span_id == second.span_id
        edges += [phase.start_time_unix_nano, phase.end_time_unix_nano]
    assert edges == sorted(edges)
    assert second.start_time_unix_nano <= edges[0]
    assert edges[-1] <= second.end_time_unix_nano

    assert decision["trace_id"] == TRACE
    assert (
        'forebay_requests_total{endpoint="chat",model="m",outcome="ok",stream="true"} 1.0'
        in metrics
    )
    assert 'forebay_retries_total{model="m"} 1.0' in metrics
    written = capsys.readouterr().err
    lines = [json.loads(line) for line in written.splitlines()]
    (done,) = [line for line in lines if line["event"] == "request done"]
    assert (done["request_id"], done["trace_id"], done["attempts"]) == ("req-7", TRACE, 2)
    for evidence in (written, metrics, json.dumps(decision), *map(str, spans)):
        assert CANARY not in evidence


async def test_a_client_that_leaves_leaves_a_trace(serve_gateway: Any, collector: Any) -> None:
    gateway = await serve(serve_gateway, collector.endpoint, for_ever)
    with structlog.testing.capture_logs() as written:
        async with (
            gateway.client() as client,
            client.stream("POST", "/v1/chat/completions", json=CHAT) as response,
        ):
            await anext(response.aiter_bytes())
        while not [entry for entry in written if entry["event"] == "request done"]:
            await asyncio.sleep(0.01)
    spans = await collector.spans_of(gateway.app.aclose)
    assert len(spans) == 5
    attempt = collector.by_name(spans, "chat m")
    for name in ("queue+prefill", "decode"):  # nothing was reported: as seen from here
        phase = collector.by_name(spans, name)
        assert phase.parent_span_id == attempt.span_id
        assert collector.attributes(phase)["forebay.timing_source"] == "gateway"
    for span in (collector.by_name(spans, SERVER), collector.by_name(spans, "chat m")):
        assert collector.attributes(span)["error.type"] == "client_disconnected"
        assert span.status.code == Status.STATUS_CODE_UNSET


async def breaks_off(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
    yield Started()
    yield Delta(0, "on ")
    raise StreamTruncated("it broke off")


@pytest.mark.parametrize("exports", [False, True])
async def test_a_stream_that_breaks_off_shows_how_far_it_came(
    serve_gateway: Any, collector: Any, exports: bool
) -> None:
    backends = {"a": BackendSettings(adapter="scripted", exports_traces=exports)}
    tracing = Settings(otlp_endpoint=collector.endpoint)
    models = {"m": Model(backends=["a"])}
    gateway = await serve_gateway(Config(backends=backends, models=models, tracing=tracing))
    gateway.scripted["a"].script = breaks_off
    async with gateway.client() as client:
        assert "stream_truncated" in (await client.post("/v1/chat/completions", json=CHAT)).text
    spans = await collector.spans_of(gateway.app.aclose)
    attempt = collector.by_name(spans, "chat m")
    assert collector.attributes(attempt)["error.type"] == "stream_truncated"
    assert attempt.status.code == Status.STATUS_CODE_ERROR
    children = [span.name for span in spans if span.parent_span_id == attempt.span_id]
    assert children == ([] if exports else ["queue+prefill", "decode"])


async def counts_nothing(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
    yield Started()
    yield Delta(0, "on", "stop")
    yield Finished(Usage(0, 1, source="counted"), model="m" * 1000)


async def test_what_forebay_counted_is_marked(serve_gateway: Any, collector: Any) -> None:
    gateway = await serve(serve_gateway, collector.endpoint, counts_nothing)
    async with gateway.client() as client:
        await client.post("/v1/chat/completions", json={**CHAT, "stream": False})
    spans = await collector.spans_of(gateway.app.aclose)
    attempt = collector.by_name(spans, "chat m")
    told = collector.attributes(attempt)
    assert told["gen_ai.usage.output_tokens"] == 1
    assert told["gen_ai.usage.input_tokens"]
    assert told["forebay.usage_source"] == "counted"
    assert told["gen_ai.response.model"] == "m" * 128
    assert [span for span in spans if span.parent_span_id == attempt.span_id] == []


async def test_a_refused_request_is_traced_and_counted(serve_gateway: Any, collector: Any) -> None:
    gateway = await serve_gateway(config(collector.endpoint))
    async with gateway.client() as client, gateway.admin() as admin:
        body = {**CHAT, "model": CANARY}
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 404
        metrics = (await admin.get("/metrics")).text
    (span,) = await collector.spans_of(gateway.app.aclose)
    assert collector.attributes(span)["http.response.status_code"] == 404
    assert collector.attributes(span)["error.type"] == "model_not_found"
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert 'forebay_refused_total{endpoint="chat",error="model_not_found"} 1.0' in metrics
    assert CANARY not in metrics
