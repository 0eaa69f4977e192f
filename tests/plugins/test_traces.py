"""What every adapter's attempts look like in a trace, as an OTLP receiver gets it.

Each adapter stands in a whole gateway, in front of the fake of its server.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from msgspec import Struct

from forebay.api import AdapterKind
from forebay.config import Config, Model, Tracing
from forebay.testing import Exchange, Scenario, ScriptedServer
from forebay_plugins import (
    anthropic,
    llamacpp,
    native,
    ollama,
    openai,
    sglang,
    simulated,
    tgi,
    triton,
    trtllm,
    vllm,
)

MODULES = (anthropic, llamacpp, ollama, openai, sglang, simulated, tgi, triton, trtllm, vllm)
PARENT = "00f067aa0ba902b7"
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
ENGINE = Path(__file__).parents[1] / "fakes" / "engine_process.py"

ALL = ("queue", "prefill", "decode")
SEEN = ("queue+prefill", "decode")
Script = Callable[[Exchange], Awaitable[None]]


class Engine:
    """Offers `engine`: the native adapter before the engine's own process without a model."""

    @native.hookimpl
    def adapters(self) -> list[AdapterKind]:
        command = (sys.executable, str(ENGINE))
        build = partial(native.NativeAdapter, command=command)
        (kind,) = native.adapters()
        return [msgspec.structs.replace(kind, name="engine", build=build)]


class Expected(Struct, frozen=True):
    """Of a stream and of a whole answer: the phases, and where they come from."""

    stream: tuple[str, ...]
    whole: tuple[str, ...]
    stream_source: str = ""
    whole_source: str = ""
    model: str = "m"
    reason: str = "length"
    provider: str = ""
    usage: tuple[int, int] = (11, 5)
    cached: tuple[int | None, int | None] = (4, 4)


ONE_CLOCK = {"stream": ALL, "whole": ALL}
EXPECTED = {
    "vllm": Expected(**ONE_CLOCK, stream_source="vllm.metrics", whole_source="vllm.metrics"),
    "llamacpp": Expected(
        stream=("prefill", "decode"),
        whole=("prefill", "decode"),
        stream_source="llamacpp.timings",
        whole_source="llamacpp.timings",
        model="gemma-3-270m",
        provider="llama_cpp",
    ),
    "sglang": Expected(SEEN, ALL, "gateway", "sglang.meta_info"),
    "tgi": Expected(
        stream=SEEN,
        whole=("queue", "inference"),
        stream_source="gateway",
        whole_source="tgi.headers",
        model="tgi",
        cached=(None, None),
    ),
    "trtllm": Expected(
        **ONE_CLOCK,
        stream_source="trtllm.server_timing",
        whole_source="trtllm.server_timing",
        reason="stop",
        provider="tensorrt_llm",
        cached=(4, None),
    ),
    "triton": Expected(
        **ONE_CLOCK,
        stream_source="trtllm.perf_metrics",
        whole_source="trtllm.perf_metrics",
        model="ensemble",
        reason="stop",
        cached=(None, None),
    ),
    "triton-vllm": Expected(
        SEEN,
        (),
        "gateway",
        model="vllm_model",
        reason="stop",
        provider="triton",
        cached=(None, None),
    ),
    "ollama": Expected(
        **ONE_CLOCK,
        stream_source="ollama.durations",
        whole_source="ollama.durations",
        model="gemma3:270m",
        reason="stop",
        cached=(None, None),
    ),
    "openai": Expected(SEEN, (), "gateway"),
    "anthropic": Expected(SEEN, (), "gateway", model="claude-x", reason="stop", cached=(3, 3)),
    "simulated": Expected(
        **ONE_CLOCK,
        stream_source="simulated",
        whole_source="simulated",
        model="",
        usage=(1, 8),
        cached=(None, None),
    ),
    "engine": Expected(
        **ONE_CLOCK,
        stream_source="forebay_engine",
        whole_source="forebay_engine",
        model="engine_model",
        provider="forebay",
        usage=(0, 8),
        cached=(0, 0),
    ),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "triton": {"model": "ensemble", "chat_template": "plain"},
    "triton-vllm": {"model": "vllm_model", "chat_template": "plain"},
    "ollama": {"model": "gemma3:270m"},
    "simulated": {"prefill_rate": 1000, "decode_rate": 2000},
    "engine": {"exports_traces": False, "path": str(ENGINE.with_name("engine_model"))},
}


def line(**content: Any) -> bytes:
    return json.dumps(content).encode() + b"\n"


async def ollama_server(exchange: Exchange) -> None:
    if exchange.path == "/api/version":
        exchange.answer(200, {"version": "0.40.0"})
    elif exchange.method == "GET":
        exchange.answer(200, {"models": [{"name": "gemma3:270m"}]})
    elif exchange.path == "/api/embed":
        vectors = [[0.5, 1.0]]
        exchange.answer(
            200, {"model": "gemma3:270m", "embeddings": vectors, "prompt_eval_count": 4}
        )
    else:
        exchange.begin("application/x-ndjson")
        for word in ("one", " two"):
            said = {"role": "assistant", "content": word}
            exchange.send(line(model="gemma3:270m", message=said, done=False))
            await asyncio.sleep(0.002)
        counts = {"prompt_eval_count": 11, "eval_count": 5}
        times = {"load_duration": 1e6, "prompt_eval_duration": 2e6, "eval_duration": 2e6}
        times = {name: int(value) for name, value in times.items()}
        exchange.send(line(model="gemma3:270m", done=True, done_reason="stop", **counts, **times))


async def anthropic_server(exchange: Exchange) -> None:
    if exchange.method == "GET":
        exchange.answer(200, {"data": [{"id": "claude-x"}]})
        return

    def named(kind: str, **content: Any) -> bytes:
        return f"event: {kind}\n".encode() + b"data: " + line(type=kind, **content) + b"\n"

    counts = {"input_tokens": 8, "cache_read_input_tokens": 3, "output_tokens": 1}
    exchange.begin()
    exchange.send(named("message_start", message={"model": "claude-x", "usage": counts}))
    for word in ("one", " two"):
        said = {"type": "text_delta", "text": word}
        exchange.send(named("content_block_delta", index=0, delta=said))
        await asyncio.sleep(0.002)
    end = {"stop_reason": "end_turn"}
    exchange.send(named("message_delta", delta=end, usage={"output_tokens": 5}))
    exchange.send(named("message_stop"))


def script(name: str, load_fake: Callable[[str], ModuleType]) -> Script:
    if name in ("ollama", "anthropic"):
        return {"ollama": ollama_server, "anthropic": anthropic_server}[name]
    if name in ("vllm", "llamacpp"):
        fakes = load_fake("openai_servers")
        kind = {"vllm": fakes.Vllm, "llamacpp": fakes.LlamaCpp}[name]
        return partial(fakes.serve, scenario=Scenario.HEALTHY, kind=kind)
    fake = {"openai": "sglang_server", "triton": "triton_servers", "triton-vllm": "triton_servers"}
    serve = load_fake(fake.get(name, f"{name}_server")).serve
    return partial(serve, scenario=Scenario.HEALTHY)


@asynccontextmanager
async def upstream(
    name: str, load_fake: Callable[[str], ModuleType]
) -> AsyncIterator[ScriptedServer | None]:
    if name in ("engine", "simulated"):
        yield None
        return
    async with ScriptedServer(script(name, load_fake)) as server:
        yield server


@asynccontextmanager
async def gateway_for(
    name: str,
    server: ScriptedServer | None,
    serve_gateway: Any,
    endpoint: str,
    **more: Any,
) -> AsyncIterator[Any]:
    """A gateway whose model `m` is served by this adapter; its spans are sent when it ends."""
    kind_name = name.partition("-")[0]
    plugins = (*MODULES, Engine())
    kinds = {kind.name: kind for plugin in plugins for kind in plugin.adapters()}
    url = {} if server is None else {"url": server.url}
    settings = {"adapter": kind_name, **url, **SETTINGS.get(name, {}), **more}
    config = Config(
        backends={"b": kinds[kind_name].settings(**settings)},
        models={"m": Model(backends=["b"])},
        tracing=Tracing(otlp_endpoint=endpoint),
    )
    gateway = await serve_gateway(config, extra={"engine": Engine()})
    try:
        yield gateway
    finally:
        await gateway.app.aclose()


async def ask(gateway: Any, body: dict[str, Any], path: str = "/v1/chat/completions") -> str:
    """The trace of a request that went well."""
    trace = secrets.token_hex(16)
    headers = {"traceparent": f"00-{trace}-{PARENT}-01", "tracestate": "shop=42"}
    async with gateway.client() as client:
        answer = await client.post(path, json=body, headers=headers)
        assert answer.status_code == 200, answer.text
    return trace


@pytest.mark.parametrize("name", EXPECTED)
async def test_an_attempt_says_what_it_cost_and_where_its_time_went(
    name: str, serve_gateway: Any, otlp: Any, load_fake: Callable[[str], ModuleType]
) -> None:
    expected = EXPECTED[name]
    async with upstream(name, load_fake) as server:
        async with gateway_for(name, server, serve_gateway, otlp.url) as gateway:
            traces = [await ask(gateway, {**CHAT, "stream": stream}) for stream in (True, False)]
        posts = [e for e in server.exchanges if "traceparent" in e.headers] if server else []
    for place, (trace, phases, source) in enumerate(
        zip(
            traces,
            (expected.stream, expected.whole),
            (expected.stream_source, expected.whole_source),
            strict=True,
        )
    ):
        spans = otlp.trace(trace)
        (root,) = [span for span in spans if span.parent == PARENT]
        (attempt,) = [span for span in spans if span.kind == "CLIENT"]
        assert (root.kind, attempt.parent) == ("SERVER", root.id)
        if server is not None:
            assert posts[place].headers["traceparent"] == f"00-{trace}-{attempt.id}-01"
            assert posts[place].headers["tracestate"] == "shop=42"

        told = attempt.attributes
        cached = told.get("gen_ai.usage.cache_read.input_tokens")
        tokens = [told.get(f"gen_ai.usage.{way}_tokens") for way in ("input", "output")]
        assert told["gen_ai.operation.name"] == "chat"
        assert told["gen_ai.provider.name"] == (expected.provider or name)
        assert told["gen_ai.request.model"] == "m"
        assert told.get("gen_ai.response.model", "") == expected.model
        assert told["gen_ai.response.finish_reasons"] == [expected.reason]
        assert ("gen_ai.response.time_to_first_chunk" in told) == (place == 0)
        assert cached == expected.cached[place]
        if name == "engine":
            assert all(tokens)
        else:
            assert tokens == list(expected.usage)
        if server is not None:
            assert server.url == f"http://{told['server.address']}:{told['server.port']}"
        assert "error.type" not in told
        assert "forebay.usage_source" not in told

        children = [span for span in spans if span.parent == attempt.id]
        assert tuple(child.name for child in children) == phases
        assert len(spans) == 3 + len(phases)
        edges = [edge for child in children for edge in (child.start, child.end)]
        assert [attempt.start, *edges, attempt.end] == sorted([attempt.start, *edges, attempt.end])
        for child in children:
            assert child.kind == "INTERNAL"
            assert child.attributes == {
                "forebay.synthetic": True,
                "forebay.timing_source": source,
            }


async def test_a_backend_that_exports_spans_gets_none_from_us(
    serve_gateway: Any, otlp: Any, load_fake: Callable[[str], ModuleType]
) -> None:
    """Neither from what it reports nor, where it reports nothing, as seen from here."""
    for name in ("vllm", "openai"):
        async with (
            upstream(name, load_fake) as server,
            gateway_for(name, server, serve_gateway, otlp.url, exports_traces=True) as gateway,
        ):
            trace = await ask(gateway, {**CHAT, "stream": True})
        assert sorted(span.name for span in otlp.trace(trace)) == [
            "POST /v1/chat/completions",
            "chat m",
            "route",
        ]


async def test_our_own_engines_spans_join(
    serve_gateway: Any, otlp: Any, load_fake: Callable[[str], ModuleType]
) -> None:
    gateway = gateway_for("engine", None, serve_gateway, otlp.url, exports_traces=True)
    async with gateway as running:
        trace = await ask(running, CHAT)
    spans = otlp.trace(trace)
    (attempt,) = [span for span in spans if span.kind == "CLIENT"]
    (request,) = [span for span in spans if span.parent == attempt.id]
    assert (request.service, request.name) == ("forebay-engine", "engine.request")
    assert [span.name for span in spans if span.parent == request.id] == list(ALL)
    assert len(spans) == 7


PROMPT = {"model": "m", "prompt": "Hi", "max_tokens": 8}


@pytest.mark.parametrize(
    ("name", "path", "body", "operation"),
    [
        ("vllm", "/v1/completions", PROMPT, "text_completion"),
        ("vllm", "/tokenize", {"model": "m", "prompt": "Hi"}, "tokenize"),
        ("llamacpp", "/detokenize", {"model": "m", "tokens": [1]}, "detokenize"),
        ("ollama", "/v1/embeddings", {"model": "m", "input": "Hi"}, "embeddings"),
        ("tgi", "/v1/completions", PROMPT, "text_completion"),
    ],
)
async def test_every_operation_passes_the_trace_on(
    name: str,
    path: str,
    body: dict[str, Any],
    operation: str,
    serve_gateway: Any,
    otlp: Any,
    load_fake: Callable[[str], ModuleType],
) -> None:
    async with (
        upstream(name, load_fake) as server,
        gateway_for(name, server, serve_gateway, otlp.url) as gateway,
    ):
        trace = await ask(gateway, body, path)
    (attempt,) = [span for span in otlp.trace(trace) if span.kind == "CLIENT"]
    assert attempt.name == f"{operation} m"
    assert attempt.attributes["gen_ai.operation.name"] == operation
    assert server is not None
    (sent,) = [e.headers["traceparent"] for e in server.exchanges if "traceparent" in e.headers]
    assert sent == f"00-{trace}-{attempt.id}-01"
    if operation == "embeddings":
        assert attempt.attributes["gen_ai.response.model"] == "gemma3:270m"
        assert attempt.attributes["gen_ai.usage.input_tokens"] == 4
    if name == "tgi":  # its native answers name no model: the one that it serves
        assert attempt.attributes["gen_ai.response.model"] == "google/gemma-3-270m"
