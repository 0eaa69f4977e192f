"""One trace from the caller's span through the gateway into every backend that runs here.

Asserted on what an OTLP receiver gets: over HTTP from the gateway, its engine and Triton, over gRPC
from vLLM.
"""

from __future__ import annotations

import secrets
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PARENT = "00f067aa0ba902b7"
MODEL = "gemma-3-270m"
PHASES = ["queue", "prefill", "decode"]
#: Of each model: its provider, and the backend's own name of it.
OWNERS = {
    "native": ("forebay", MODEL),
    "llama": ("llama_cpp", MODEL),
    "vllm": ("vllm", MODEL),
    "vllm-own": ("vllm", MODEL),
    "triton": ("triton", "ensemble"),
    "triton-own": ("triton", "vllm_model"),
}


def ask(client: Any, model: str, stream: bool) -> str:
    """The trace of a chat."""
    trace = secrets.token_hex(16)
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "say one two three"}],
        max_tokens=4,
        stream=stream,
        extra_headers={"traceparent": f"00-{trace}-{PARENT}-01"},
    )
    if stream:
        assert list(answer)
    return trace


def below(spans: list[Any], parent: Any) -> list[Any]:
    return [span for span in spans if span.parent == parent.id]


def attempt_of(spans: list[Any], model: str, stream: bool) -> Any:
    """The span of the one attempt, which tells all about it; every other span hangs in place."""
    (root,) = [span for span in spans if span.parent == PARENT]
    known = {span.id: span for span in spans}
    for span in spans:
        while span is not root:
            assert span.start >= known[span.parent].start
            span = known[span.parent]
    (attempt,) = [span for span in spans if span.kind == "CLIENT"]
    assert attempt.parent == root.id
    told = attempt.attributes
    provider, own = OWNERS[model]
    assert told["gen_ai.provider.name"] == provider
    assert told["gen_ai.request.model"] == model
    assert told["gen_ai.response.model"] == own
    assert told["gen_ai.usage.input_tokens"] > 0
    assert told["gen_ai.usage.output_tokens"] == 4
    assert told["gen_ai.response.finish_reasons"] == ["length"]
    assert ("gen_ai.response.time_to_first_chunk" in told) == stream
    return attempt


def ours(spans: list[Any], attempt: Any, source: str) -> list[str]:
    """The names of the phases that were synthesised, which lie in order within the attempt."""
    phases = [span for span in below(spans, attempt) if "forebay.synthetic" in span.attributes]
    edges = [edge for span in phases for edge in (span.start, span.end)]
    assert [attempt.start, *edges, attempt.end] == sorted([attempt.start, *edges, attempt.end])
    assert {span.attributes["forebay.timing_source"] for span in phases} <= {source}
    return [span.name for span in phases]


def named(spans: list[Any], *names: str) -> bool:
    return set(names) <= {span.name for span in spans}


@pytest.fixture(params=[True, False], ids=["stream", "whole"])
def stream(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_our_own_engine(client: Any, otlp: Any, stream: bool) -> None:
    trace = ask(client, "native", stream)
    spans = otlp.wait(trace, lambda spans: named(spans, "chat native", *PHASES))
    attempt = attempt_of(spans, "native", stream)
    (request,) = below(spans, attempt)
    assert (request.service, request.name) == ("forebay-engine", "engine.request")
    assert [span.name for span in below(spans, request)] == PHASES
    assert ours(spans, attempt, "") == []


def test_llamacpp(client: Any, otlp: Any, stream: bool) -> None:
    trace = ask(client, "llama", stream)
    spans = otlp.wait(trace, lambda spans: named(spans, "POST /v1/chat/completions"))
    attempt = attempt_of(spans, "llama", stream)
    assert ours(spans, attempt, "llamacpp.timings") == ["prefill", "decode"]
    for phase in below(spans, attempt):  # it did take its time, and nothing was cut to nothing
        assert phase.end > phase.start


def test_vllm_by_what_it_reports(client: Any, otlp: Any, stream: bool) -> None:
    trace = ask(client, "vllm", stream)
    spans = otlp.wait(trace, lambda spans: named(spans, "POST /v1/chat/completions"))
    attempt = attempt_of(spans, "vllm", stream)
    assert ours(spans, attempt, "vllm.metrics") == PHASES


def test_vllm_by_its_own_span(client: Any, otlp: Any, stream: bool) -> None:
    trace = ask(client, "vllm-own", stream)
    spans = otlp.wait(trace, lambda spans: named(spans, "chat vllm-own", "llm_request"))
    attempt = attempt_of(spans, "vllm-own", stream)
    (request,) = below(spans, attempt)
    assert (request.name, request.kind) == ("llm_request", "SERVER")
    told = request.attributes
    for phase in ("queue", "model_prefill", "model_decode"):
        assert told[f"gen_ai.latency.time_in_{phase}"] >= 0
    assert told["gen_ai.usage.completion_tokens"] == 4


def test_triton_by_what_its_model_reports(triton_gateway: Any, otlp: Any, stream: bool) -> None:
    with triton_gateway.client() as client:
        trace = ask(client, "triton", stream)
    spans = otlp.wait(trace, lambda spans: named(spans, "chat triton", "InferRequest"))
    attempt = attempt_of(spans, "triton", stream)
    assert ours(spans, attempt, "trtllm.perf_metrics") == PHASES


def test_triton_by_its_own_spans(triton_gateway: Any, otlp: Any, stream: bool) -> None:
    with triton_gateway.client() as client:
        trace = ask(client, "triton-own", stream)
    spans = otlp.wait(trace, lambda spans: named(spans, "chat triton-own", "InferRequest"))
    attempt = attempt_of(spans, "triton-own", stream)
    (request,) = below(spans, attempt)
    assert (request.service, request.name) == ("triton-inference-server", "InferRequest")
    (model,) = below(spans, request)
    assert (model.name, model.attributes["triton.model_name"]) == ("vllm_model", "vllm_model")
    (compute,) = below(spans, model)
    assert (compute.name, *list(compute.events)[:1]) == ("compute", "COMPUTE_START")
