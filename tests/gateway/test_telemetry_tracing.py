from __future__ import annotations

import logging
import re
import socket
import time
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from opentelemetry import trace as otel
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from forebay.api import (
    Candidate,
    ConfigError,
    Decision,
    GenerateRequest,
    Identity,
    Message,
    Outcome,
    Sampling,
    Timings,
    Usage,
)
from forebay.config import Tracing as Settings
from forebay.telemetry import export, names
from forebay.telemetry.phases import lay_out, observed
from forebay.telemetry.tracing import AttemptTrace, RequestTrace, Tracing

ROUTE = "/v1/chat/completions"
CANARY = "canary-prompt-do-not-export"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"

REQUEST = GenerateRequest(
    id="req-1",
    endpoint="chat",
    model="gemma",
    created=1,
    messages=(Message(role="user", content=CANARY),),
    sampling=Sampling(max_tokens=64, temperature=0.5, top_k=40, stop=(CANARY,)),
    n=2,
    stream=True,
)
DECISION = Decision(
    request_id="req-1",
    time=1.0,
    endpoint="chat",
    model="gemma",
    identity=Identity(tenant="blue"),
    policy="prefix_affinity",
    policy_version="3",
    seed=7,
    candidates=(Candidate("a", 0.75), Candidate("b", 0.5), Candidate("c", veto="full")),
    order=("a", "b"),
    probability=0.25,
    arm="canary",
    outcome=Outcome(result="ok", queue=0.25, overhead=0.001),
)


def decide(trace: RequestTrace) -> None:
    now = time.time_ns()
    trace.decided(DECISION, now - 1000, now)


def attempt_of(trace: RequestTrace, number: int = 1) -> AttemptTrace:
    return trace.attempt(number, "a", "llama_cpp", "http://127.0.0.1:8081", REQUEST)


async def test_one_trace_from_the_client_through_a_retry_into_the_backends_phases(
    collector: Any,
) -> None:
    tracing = collector.tracing()
    headers = {"traceparent": TRACEPARENT, "tracestate": "shop=42"}
    trace = tracing.request(ROUTE, "POST", headers)
    decide(trace)
    failed = attempt_of(trace)
    failed.end(error="connect_failed")
    served = trace.attempt(2, "b", "vllm", "http://10.0.0.7", REQUEST)
    time.sleep(0.02)
    for _ in range(200):  # however often a chunk is mistaken for the first
        served.first_token()
    time.sleep(0.02)
    served.first_token()
    served.end(
        usage=Usage(prompt_tokens=128, completion_tokens=64, cached_tokens=96),
        timings=Timings(queue=0.004, prefill=0.008, decode=0.015, source="vllm.metrics"),
        finish_reasons=("stop", "length"),
        lane="relay",
    )
    trace.end(200, DECISION, None)
    spans = await collector.spans(tracing)

    assert sorted((s.name, s.kind) for s in spans) == sorted(
        [
            ("POST /v1/chat/completions", Span.SPAN_KIND_SERVER),
            ("route", Span.SPAN_KIND_INTERNAL),
            ("chat gemma", Span.SPAN_KIND_CLIENT),
            ("chat gemma", Span.SPAN_KIND_CLIENT),
            ("queue", Span.SPAN_KIND_INTERNAL),
            ("prefill", Span.SPAN_KIND_INTERNAL),
            ("decode", Span.SPAN_KIND_INTERNAL),
        ]
    )
    assert {s.trace_id.hex() for s in spans} == {TRACE} == {trace.trace_id}
    server, route = (
        collector.by_name(spans, "POST /v1/chat/completions"),
        collector.by_name(spans, "route"),
    )
    first, second = sorted(
        (s for s in spans if s.name == "chat gemma"), key=lambda s: s.start_time_unix_nano
    )
    assert server.parent_span_id.hex() == PARENT
    assert {s.parent_span_id for s in (route, first, second)} == {server.span_id}
    for span, sent in ((first, failed), (second, served)):
        assert sent.headers["traceparent"].split("-")[1:3] == [TRACE, span.span_id.hex()]
        assert sent.headers["traceparent"].endswith("-01")
        assert sent.headers["tracestate"] == "shop=42"

    assert collector.attributes(server) == {
        "http.request.method": "POST",
        "http.route": ROUTE,
        "url.path": ROUTE,
        "url.scheme": "http",
        "http.response.status_code": 200,
        "gen_ai.request.model": "gemma",
        "forebay.request_id": "req-1",
        "forebay.tenant": "blue",
        "forebay.outcome": "ok",
        "forebay.queue_seconds": 0.25,
        "forebay.overhead_seconds": 0.001,
    }
    assert collector.attributes(route) == {
        "forebay.policy": "prefix_affinity",
        "forebay.policy_version": "3",
        "forebay.candidates": ["a=0.75", "b=0.5", "c!full"],
        "forebay.order": ["a", "b"],
        "forebay.probability": 0.25,
        "forebay.arm": "canary",
    }
    common = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "gemma",
        "gen_ai.request.stream": True,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.max_tokens": 64,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_k": 40.0,
        "forebay.policy": "prefix_affinity",
        "forebay.candidate_count": 3,
        "forebay.arm": "canary",
    }
    assert collector.attributes(first) == common | {
        "gen_ai.provider.name": "llama_cpp",
        "server.address": "127.0.0.1",
        "server.port": 8081,
        "forebay.backend": "a",
        "forebay.score": 0.75,
        "error.type": "connect_failed",
    }
    assert first.status.code == Status.STATUS_CODE_ERROR
    told = collector.attributes(second)
    waited = told.pop("gen_ai.response.time_to_first_chunk")
    assert isinstance(waited, float)
    whole = (second.end_time_unix_nano - second.start_time_unix_nano) / 1e9
    assert 0.02 <= waited <= whole - 0.02
    assert told == common | {
        "gen_ai.provider.name": "vllm",
        "server.address": "10.0.0.7",
        "server.port": 80,
        "forebay.backend": "b",
        "forebay.score": 0.5,
        "forebay.lane": "relay",
        "http.request.resend_count": 1,
        "gen_ai.usage.input_tokens": 128,
        "gen_ai.usage.output_tokens": 64,
        "gen_ai.usage.cache_read.input_tokens": 96,
        "gen_ai.response.finish_reasons": ["stop", "length"],
    }
    assert {s.status.code for s in (server, route, second)} == {Status.STATUS_CODE_UNSET}

    phases = [collector.by_name(spans, name) for name in ("queue", "prefill", "decode")]
    for phase, milliseconds in zip(phases, (4, 8, 15), strict=True):
        assert phase.parent_span_id == second.span_id
        assert collector.attributes(phase) == {
            "forebay.synthetic": True,
            "forebay.timing_source": "vllm.metrics",
        }
        length = phase.end_time_unix_nano - phase.start_time_unix_nano
        assert length == milliseconds * 1_000_000
        assert phase.start_time_unix_nano >= second.start_time_unix_nano
        assert phase.end_time_unix_nano <= second.end_time_unix_nano
    assert phases[0].end_time_unix_nano == phases[1].start_time_unix_nano
    assert phases[1].end_time_unix_nano == phases[2].start_time_unix_nano
    assert not any(span.events for span in spans)
    assert CANARY.encode() not in b"".join(span.SerializeToString() for span in spans)


async def test_a_backend_that_exports_spans_itself_gets_no_synthesised_ones(
    collector: Any,
) -> None:
    tracing = collector.tracing()
    trace = tracing.request(ROUTE, "POST", {})
    attempt = attempt_of(trace)
    attempt.end(timings=Timings(prefill=0.1, source="vllm.metrics"), synthesise=False)
    trace.end(200, None, None)
    spans = await collector.spans(tracing)
    assert sorted(s.name for s in spans) == ["POST /v1/chat/completions", "chat gemma"]
    assert collector.by_name(spans, "POST /v1/chat/completions").parent_span_id == b""
    assert trace.trace_id == spans[0].trace_id.hex()


@pytest.mark.parametrize(
    ("status", "error", "attribute", "code"),
    [
        (200, None, None, Status.STATUS_CODE_UNSET),
        (404, "model_not_found", "model_not_found", Status.STATUS_CODE_UNSET),
        (503, "no_backend_available", "no_backend_available", Status.STATUS_CODE_ERROR),
        (500, None, "500", Status.STATUS_CODE_ERROR),
        (200, "stream_truncated", "stream_truncated", Status.STATUS_CODE_ERROR),
        (200, "client_disconnected", "client_disconnected", Status.STATUS_CODE_UNSET),
        (499, None, "client_disconnected", Status.STATUS_CODE_UNSET),
        (499, "client_disconnect", "client_disconnected", Status.STATUS_CODE_UNSET),
    ],
)
async def test_status_of_the_server_span(
    collector: Any, status: int, error: str | None, attribute: str | None, code: int
) -> None:
    tracing = collector.tracing()
    tracing.request(ROUTE, "POST", {}).end(status, None, error)
    (span,) = await collector.spans(tracing)
    assert span.status.code == code
    assert collector.attributes(span).get("error.type") == attribute
    assert collector.attributes(span).get("http.response.status_code") == (
        None if status == 499 else status
    )


async def test_a_client_that_leaves_is_no_error_of_the_attempt(collector: Any) -> None:
    tracing = collector.tracing()
    trace = tracing.request(ROUTE, "POST", {})
    attempt_of(trace).end(error="client_disconnected")
    trace.end(499, None, "client_disconnected")
    span = collector.by_name(await collector.spans(tracing), "chat gemma")
    assert collector.attributes(span)["error.type"] == "client_disconnected"
    assert span.status.code == Status.STATUS_CODE_UNSET


async def test_what_a_client_can_choose_does_not_name_spans(collector: Any) -> None:
    tracing = collector.tracing()
    trace = tracing.request("", "BREW" * 1000, {})
    request = structs.replace(REQUEST, model="m" * 1000)
    trace.attempt(1, "a", "vllm", "/run/engine.sock", request).end()
    trace.end(405, structs.replace(DECISION, model=request.model), None)
    attempt, server = await collector.spans(tracing)
    assert server.name == "HTTP"
    assert collector.attributes(server)["http.request.method"] == "_OTHER"
    assert attempt.name == "chat " + "m" * 128
    for span in (attempt, server):
        assert collector.attributes(span)["gen_ai.request.model"] == "m" * 128
    assert collector.attributes(attempt)["server.address"] == "/run/engine.sock"
    assert "server.port" not in collector.attributes(attempt)


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "garbage",
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE}-{PARENT}-01-more",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-0x",
        f"cc-{TRACE}-{PARENT}-01-\u00e4\r\n",
    ],
)
def test_a_malformed_traceparent_is_as_good_as_none(traceparent: str) -> None:
    off = Tracing.build(Settings()).request(ROUTE, "POST", {"traceparent": traceparent})
    assert (off.trace_id, attempt_of(off).headers) == ("", {})
    tracing = Tracing.build(Settings(otlp_endpoint="http://127.0.0.1:1", sample=0.0))
    new = tracing.request(ROUTE, "POST", {"traceparent": traceparent})
    tracing.close()
    assert len(new.trace_id) == 32
    assert new.trace_id != TRACE


def test_off_costs_no_objects_and_makes_no_trace() -> None:
    tracing = Tracing.build(Settings())
    trace = tracing.request(ROUTE, "POST", {})
    decide(trace)
    attempt = attempt_of(trace)
    attempt.first_token()
    attempt.end(error="connect_failed")
    trace.end(502, DECISION, "connect_failed")
    assert (trace.trace_id, attempt.headers, tracing.environment) == ("", {}, {})
    assert tracing.request(ROUTE, "POST", {}) is trace


@pytest.mark.parametrize("version", ["00", "01"])
def test_off_still_passes_the_clients_trace_on(version: str) -> None:
    headers = MappingProxyType(
        {"traceparent": f" {version}{TRACEPARENT[2:]} ", "tracestate": "a=1,b=2"}
    )
    trace = Tracing.build(Settings()).request(ROUTE, "POST", headers)
    assert trace.trace_id == TRACE
    assert attempt_of(trace).headers == {
        "traceparent": f"{version}{TRACEPARENT[2:]}",
        "tracestate": "a=1,b=2",
    }


@pytest.mark.parametrize("tracestate", ["a=" + "x" * 511, "a=\u00e4", "a=1\r\nevil: 1"])
def test_an_unsound_tracestate_is_not_passed_on(tracestate: str) -> None:
    headers = {"traceparent": TRACEPARENT, "tracestate": tracestate}
    trace = Tracing.build(Settings()).request(ROUTE, "POST", headers)
    assert attempt_of(trace).headers == {"traceparent": TRACEPARENT}


async def test_unsampled_requests_are_not_recorded_but_passed_on(collector: Any) -> None:
    tracing = collector.tracing(sample=0.0)
    unsampled = f"00-{TRACE}-{PARENT}-00"
    theirs = tracing.request(ROUTE, "POST", {"traceparent": unsampled})
    ours = tracing.request(ROUTE, "POST", {})
    for trace in (theirs, ours):
        decide(trace)
        attempt_of(trace).end(timings=Timings(decode=1.0))
        trace.end(200, DECISION, None)
    assert attempt_of(theirs).headers == {"traceparent": unsampled}
    _, trace_id, _, flags = attempt_of(ours).headers["traceparent"].split("-")
    assert trace_id == ours.trace_id
    assert not int(flags, 16) & 1
    assert await collector.spans(tracing) == []


async def test_a_client_that_samples_decides_for_its_own_trace(collector: Any) -> None:
    tracing = collector.tracing(sample=0.0)
    tracing.request(ROUTE, "POST", {"traceparent": TRACEPARENT}).end(200, None, None)
    (span,) = await collector.spans(tracing)
    assert span.trace_id.hex() == TRACE


async def test_nothing_is_global_or_current(collector: Any) -> None:
    before = otel.get_tracer_provider()
    tracing = collector.tracing()
    with otel.use_span(otel.NonRecordingSpan(otel.SpanContext(1, 2, is_remote=False))):
        trace = tracing.request(ROUTE, "POST", {})
        attempt = attempt_of(trace)
        assert otel.get_current_span().get_span_context().trace_id == 1
    attempt.end()
    trace.end(200, None, None)
    assert otel.get_tracer_provider() is before
    assert f"{1:032x}" != trace.trace_id
    await collector.spans(tracing)


async def test_ending_twice_is_ending_once(
    collector: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tracing = collector.tracing()
    trace = tracing.request(ROUTE, "POST", {})
    attempt = attempt_of(trace)
    for _ in range(2):
        attempt.end(timings=Timings(decode=0.0))
        trace.end(200, None, None)
    assert len(await collector.spans(tracing)) == 3
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_processes_that_adapters_start_are_told_where_to_export() -> None:
    tracing = Tracing.build(Settings(otlp_endpoint="http://127.0.0.1:4318/", service_name="edge"))
    tracing.close()
    assert tracing.environment == {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_SERVICE_NAME": "edge-engine",
        "OTEL_TRACES_SAMPLER": "parentbased_always_off",
    }


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (Settings(otlp_endpoint="localhost:4318"), "tracing.otlp_endpoint"),
        (Settings(otlp_endpoint="http://localhost:4318", sample=1.5), "tracing.sample"),
    ],
)
def test_a_wrong_setting_is_named(settings: Settings, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Tracing.build(settings)


def small_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "QUEUE", 16)
    monkeypatch.setattr(export, "BATCH", 8)
    monkeypatch.setattr(export, "EXPORT_TIMEOUT", 0.3)
    monkeypatch.setattr(export, "CLOSE_TIMEOUT", 1.0)


@pytest.mark.parametrize("listening", [False, True], ids=["refuses", "never answers"])
def test_a_collector_that_is_down_costs_spans_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, listening: bool
) -> None:
    small_pipe(monkeypatch)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listening:
            server.listen()
        port = server.getsockname()[1]
        tracing = Tracing.build(Settings(otlp_endpoint=f"http://127.0.0.1:{port}"))
        for _ in range(100):
            trace = tracing.request(ROUTE, "POST", {})
            attempt_of(trace).end()
            trace.end(200, None, None)
        if listening:  # one that refuses makes room at once
            assert tracing.spans()["dropped"] >= 200 - 2 * 16
        tracing.close()
        late = tracing.request(ROUTE, "POST", {})
        late.end(200, None, None)  # a request that outlives the drain
    counts = tracing.spans()
    assert counts["exported"] == 0
    assert counts["failed"] + counts["dropped"] == 200 + 1


def test_every_attribute_is_documented() -> None:
    source = Path(names.__file__).read_text()
    keys = set(re.findall(r'"((?:forebay|gen_ai|http|url|server|error)\.[a-z_.]+)"', source))
    documented = (Path(__file__).parents[2] / "docs" / "observability.md").read_text()
    assert len(keys) > 30
    assert {key for key in keys if f"`{key}`" not in documented} == set()


@pytest.mark.timeout(10)
def test_closing_does_not_wait_for_a_collector_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    small_pipe(monkeypatch)
    monkeypatch.setattr(export, "EXPORT_TIMEOUT", 60.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        tracing = Tracing.build(Settings(otlp_endpoint=f"http://127.0.0.1:{port}"))
        tracing.request(ROUTE, "POST", {}).end(200, None, None)
        tracing.close()


SECONDS = st.none() | st.floats(allow_nan=True, allow_infinity=True)


@given(
    queue=SECONDS,
    prefill=SECONDS,
    decode=SECONDS,
    inference=SECONDS,
    length=st.integers(0, 10**12),
    first=st.none() | st.floats(0, 1),
)
def test_phases_lie_in_order_within_the_attempt_whatever_a_backend_reports(
    queue: float | None,
    prefill: float | None,
    decode: float | None,
    inference: float | None,
    length: int,
    first: float | None,
) -> None:
    start = 1_700_000_000 * 10**9
    end = start + length
    token = None if first is None else start + int(first * length)
    timings = Timings(queue=queue, prefill=prefill, decode=decode, inference=inference)
    phases = lay_out(timings, start, token, end)
    reported = {"queue": queue, "prefill": prefill, "inference": inference, "decode": decode}
    assert [name for name, _, _ in phases] == [k for k, v in reported.items() if v is not None]
    edges = [edge for _, begin, until in phases for edge in (begin, until)]
    assert edges == sorted(edges)
    assert all(start <= edge <= end for edge in edges)


def test_prefill_ends_at_the_first_token() -> None:
    timings = Timings(queue=1.0, prefill=2.0, decode=3.0)
    second = 10**9
    assert lay_out(timings, 0, 5 * second, 10 * second) == [
        ("queue", 2 * second, 3 * second),
        ("prefill", 3 * second, 5 * second),
        ("decode", 5 * second, 8 * second),
    ]


def test_without_a_first_token_decode_ends_with_the_attempt() -> None:
    second = 10**9
    assert lay_out(Timings(prefill=2.0, decode=3.0), 0, None, 10 * second) == [
        ("prefill", 5 * second, 7 * second),
        ("decode", 7 * second, 10 * second),
    ]


def test_inference_ends_with_the_attempt_and_not_at_the_first_token() -> None:
    second = 10**9
    for token in (None, 9 * second):
        assert lay_out(Timings(queue=1.0, inference=5.0), 0, token, 10 * second) == [
            ("queue", 4 * second, 5 * second),
            ("inference", 5 * second, 10 * second),
        ]


@given(st.lists(st.integers(0, 10**12), min_size=3, max_size=3))
def test_what_is_seen_from_here_lies_within_the_attempt_whatever_the_clock_does(
    moments: list[int],
) -> None:
    start, token, end = moments
    end = max(start, end)  # the attempt sees to that
    wait, rest = observed(start, token, end)
    assert (wait[0], wait[1], rest[0], rest[2]) == ("queue+prefill", start, "decode", end)
    assert start <= wait[2] == rest[1] <= end


def test_phases_longer_than_the_attempt_are_cut_at_its_end() -> None:
    second = 10**9
    assert lay_out(Timings(queue=1.0, prefill=2.0, decode=3.0), 0, None, 4 * second) == [
        ("queue", 0, 1 * second),
        ("prefill", 1 * second, 3 * second),
        ("decode", 3 * second, 4 * second),
    ]
