"""Requests and answers of OpenAI-shaped servers, over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any

import pytest

from forebay.api import (
    Adapter,
    Attempt,
    BackendBusy,
    BackendError,
    BackendFailed,
    BackendGarbage,
    BackendRefused,
    Finished,
    Load,
    Relayed,
    StreamTruncated,
    Timings,
    Usage,
)
from forebay.testing import Exchange, ScriptedServer, adapter_context, chat_request
from forebay.testing.adapter import collect
from forebay.testing.answer import read_answer
from forebay_plugins import llamacpp, openai, openai_wire, vllm
from forebay_plugins.openai_errors import error_of
from forebay_plugins.prometheus_text import samples

EVENT = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[{"index":0,"delta":{"role":"assistant","content":"a"},"finish_reason":"stop"}]}\n\n'
)


@asynccontextmanager
async def serving(
    module: ModuleType, script: Any, **settings: Any
) -> AsyncIterator[tuple[Adapter, ScriptedServer]]:
    """An adapter of this plugin in front of a server that does this."""
    (kind,) = module.adapters()
    async with ScriptedServer(script) as server:
        made = kind.settings(adapter=kind.name, url=server.url, **settings)
        adapter = kind.build(made, adapter_context())
        await adapter.start()
        try:
            yield adapter, server
        finally:
            await adapter.aclose()


def answering(status: int, body: object, **headers: str) -> Any:
    async def script(exchange: Exchange) -> None:
        exchange.answer(status, body, {name.replace("_", "-"): v for name, v in headers.items()})

    return script


async def one_event(exchange: Exchange) -> None:
    exchange.begin()
    exchange.send(EVENT + b"data: [DONE]\n\n")


# What is sent


async def test_the_request_is_the_clients_with_the_backends_model_and_key() -> None:
    settings = {"model": "theirs", "api_key": "secret", "headers": {"X-Team": "blue"}}
    async with serving(openai, one_event, **settings) as (adapter, server):
        request = chat_request("Hi", model="mine", unheard_of={"a": [1, None]}, top_k=3)
        attempt = Attempt(headers={"traceparent": "00-aa-bb-01", "x-request-id": "r"})
        events = [event async for event in adapter.stream(request, attempt)]
        assert isinstance(events[-1], Finished)
    (exchange,) = server.exchanges
    assert (exchange.method, exchange.path) == ("POST", "/v1/chat/completions")
    assert exchange.json == {
        "model": "theirs",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 16,
        "unheard_of": {"a": [1, None]},
        "top_k": 3,
        **openai_wire.OPENAI_NEUTRAL,
    }
    headers = exchange.headers
    assert headers["authorization"] == "Bearer secret"
    assert headers["content-type"] == "application/json"
    found = {name: headers[name] for name in ("x-team", "traceparent", "x-request-id")}
    assert found == {"x-team": "blue", "traceparent": "00-aa-bb-01", "x-request-id": "r"}


async def test_stream_options_of_the_client_are_kept() -> None:
    async with serving(openai, one_event) as (adapter, server):
        asked = {"include_usage": False, "continuous_usage_stats": True}
        await collect(adapter, chat_request(stream_options=asked))
        await collect(adapter, chat_request(stream_options=None))
    options = [exchange.json["stream_options"] for exchange in server.exchanges]
    assert options == [
        {"include_usage": True, "continuous_usage_stats": True},
        {"include_usage": True},
    ]


async def test_no_stream_options_where_nothing_streams() -> None:
    body = {"choices": [{"index": 0, "message": {"content": "a"}, "finish_reason": "stop"}]}
    async with serving(openai, answering(200, body)) as (adapter, server):
        await collect(adapter, chat_request(stream=False))
    assert "stream_options" not in server.exchanges[0].json


async def test_connections_are_used_again_after_a_stream() -> None:
    async with serving(openai, one_event) as (adapter, server):
        for _ in range(3):
            await collect(adapter, chat_request())
            assert len(server.connections) == 1
        assert len(server.exchanges) == 3


# What comes back


async def test_a_body_is_completed_and_renamed() -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": "é"}, "x": 1.5}
    body = {"choices": [{**choice, "finish_reason": "eos"}], "model": "theirs", "extra": {"y": 2}}
    async with serving(openai, answering(200, body)) as (adapter, _):
        request = chat_request(stream=False, model="mine")
        relayed, finished = await collect(adapter, request)
    assert isinstance(relayed, Relayed)
    assert json.loads(relayed.data) == {
        "choices": [{**choice, "finish_reason": "stop"}],
        "model": "mine",
        "id": request.id,
        "created": request.created,
        "extra": {"y": 2},
    }
    assert finished == Finished(Usage(0, 1, source="counted"), None, ("stop",), "theirs")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"reasoning": "hm"}, {"reasoning_content": "hm"}),
        ({"reasoning": None}, {"reasoning_content": None}),
        ({"reasoning": "hm", "reasoning_content": "hm"}, {"reasoning_content": "hm"}),
    ],
)
async def test_reasoning_has_one_name_in_a_body(message: object, said: object) -> None:
    body = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    async with serving(openai, answering(200, body)) as (adapter, _):
        relayed, _ = await collect(adapter, chat_request(stream=False))
    assert isinstance(relayed, Relayed)
    assert json.loads(relayed.data)["choices"][0]["message"] == said


GARBAGE: dict[str, tuple[int, object, Mapping[str, str]]] = {
    "redirect": (302, b"", {"location": "/x"}),
    "no content": (204, b"", {}),
    "text": (200, b"hello", {"content_type": "text/plain"}),
    "a stream": (200, EVENT, {"content_type": "text/event-stream"}),
    "not JSON": (200, b"{", {"content_type": "application/json"}),
    "not UTF-8": (200, b'{"a":"\xff"}', {"content_type": "application/json"}),
    "a list": (200, [], {}),
    "no choices": (200, {"id": "x"}, {}),
    "empty choices": (200, {"choices": []}, {}),
    "odd choices": (200, {"choices": "x"}, {}),
    "odd usage": (200, {"choices": [{"finish_reason": "stop"}], "usage": 3}, {}),
    "no finish": (200, {"choices": [{"index": 0, "message": {"content": "a"}}]}, {}),
}


@pytest.mark.parametrize("name", GARBAGE)
async def test_garbage(name: str) -> None:
    status, body, headers = GARBAGE[name]
    async with serving(openai, answering(status, body, **headers)) as (adapter, _):
        with pytest.raises(BackendGarbage):
            await collect(adapter, chat_request(stream=False))


async def test_an_error_in_a_whole_answer() -> None:
    async with serving(openai, answering(200, {"error": {"message": "m"}})) as (adapter, _):
        with pytest.raises(BackendFailed, match="m"):
            await collect(adapter, chat_request(stream=False))


async def test_json_where_a_stream_was_expected() -> None:
    async with serving(openai, answering(200, {"choices": []})) as (adapter, _):
        with pytest.raises(BackendGarbage, match="application/json"):
            await collect(adapter, chat_request())


@pytest.mark.parametrize(
    ("role", "complete"), [(EVENT, True), (EVENT.replace(b"stop", b""), False)]
)
async def test_a_cut_is_an_end_if_all_was_said(role: bytes, complete: bool) -> None:
    async def script(exchange: Exchange) -> None:
        exchange.begin()
        exchange.send(role)
        await asyncio.sleep(0.02)
        exchange.cut()

    async with serving(openai, script) as (adapter, _):
        if complete:
            assert isinstance((await collect(adapter, chat_request()))[-1], Finished)
        else:
            with pytest.raises(StreamTruncated):
                await collect(adapter, chat_request())


async def test_a_server_that_keeps_quiet_after_done_is_not_waited_for() -> None:
    async def script(exchange: Exchange) -> None:
        await one_event(exchange)
        await asyncio.Event().wait()

    async with serving(openai, script) as (adapter, server):
        events = await asyncio.wait_for(collect(adapter, chat_request()), 10)
        assert isinstance(events[-1], Finished)
        while server.running:
            await asyncio.sleep(0.001)


# Errors


@pytest.mark.parametrize(
    ("status", "body", "kind", "says"),
    [
        (429, b"", BackendBusy, "HTTP 429"),
        (503, b'{"error":"scaling"}', BackendBusy, "scaling"),
        (500, b'{"error":{"message":"m"}}', BackendFailed, "m"),
        (501, b"<html>", BackendFailed, "<html>"),
        (401, b'{"error":"Unauthorized"}', BackendFailed, "api_key"),
        (403, b"", BackendFailed, "api_key"),
        (404, b'{"error":{"message":"no model x"}}', BackendFailed, "no model x"),
        (405, b"", BackendFailed, "url"),
        (408, b"", BackendFailed, "408"),
        (400, b'{"object":"error","message":"flat","param":null}', BackendRefused, "flat"),
        (422, b'{"detail":[{"loc":["body"]}]}', BackendRefused, "loc"),
        (400, b'{"error":7}', BackendRefused, "HTTP 400"),
        (400, b"[1]", BackendRefused, "HTTP 400"),
        (304, b"", BackendGarbage, "HTTP 304"),
        (599, b"\xff", BackendFailed, "\ufffd"),
        (600, b"", BackendGarbage, "HTTP 600"),
    ],
)
def test_statuses(status: int, body: bytes, kind: type[BackendError], says: str) -> None:
    error = error_of(status, {}, body)
    assert type(error) is kind
    assert says in error.message


def test_a_refusal_keeps_status_param_and_code() -> None:
    said = {"message": "m", "param": "max_tokens", "code": "too_much", "type": "t"}
    error = error_of(422, {}, json.dumps({"error": said}).encode())
    assert isinstance(error, BackendRefused)
    assert (error.status, error.param, error.code) == (422, "max_tokens", "too_much")
    number = error_of(400, {}, json.dumps({"error": {**said, "code": 400}}).encode())
    assert number.code == "backend_refused"
    context = {"error": {"code": 400, "message": "m", "type": "exceed_context_size_error"}}
    assert error_of(400, {}, json.dumps(context).encode()).code == "context_length_exceeded"


VLLM = "This model's maximum context length is 4096 tokens. However, "
TENSORRT = "Executor failed: Encountered an error when fetching new request: "
TOO_LONG = [
    (400, VLLM + "your prompt contains at least 4097 input tokens, which exceeds this limit"),
    (400, VLLM + "you requested 4226 tokens (4210 in the messages, 16 in the completion)."),
    (400, "The decoder prompt (length 5000) is longer than the maximum model length of 4096."),
    (400, "The input (61709 tokens) is longer than the model's context length (40960 tokens)."),
    (400, "Input length (160062 tokens) exceeds the maximum allowed length (59862 tokens)."),
    (400, "request (8002 tokens) exceeds the available context size (4096 tokens)"),
    (422, "Input validation error: `inputs` must have less than 4096 tokens. Given: 5000"),
    (422, "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096."),
    (400, "The sum of prompt length (72417.0), query length (0) should not exceed max_num_tokens"),
    (500, TENSORRT + "Prompt length (200) exceeds maximum input length (1)"),
]


@pytest.mark.parametrize(("status", "message"), TOO_LONG)
def test_prompts_that_are_too_long_have_openais_code(status: int, message: str) -> None:
    for said in ({"error": {"message": message, "code": status}}, {"error": message}):
        error = error_of(status, {}, json.dumps(said).encode())
        assert isinstance(error, BackendRefused)
        assert (error.status, error.message) == (422 if status == 422 else 400, message)
        assert error.code == "context_length_exceeded"


@pytest.mark.parametrize(
    "message",
    [
        "max_tokens=9000 cannot be greater than max_model_len=4096.",
        "`stop` must have less than 5 sequences",
        "the name exceeds the maximum allowed length",
    ],
)
def test_other_refusals_have_not(message: str) -> None:
    assert error_of(400, {}, json.dumps({"error": message}).encode()).code == "backend_refused"
    assert isinstance(error_of(503, {}, f"{VLLM} busy".encode()), BackendBusy)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3", 3.0), ("0.5", 0.5), ("-1", 0.0), ("soon", None), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0)],
)
def test_retry_after(value: str, seconds: float | None) -> None:
    assert error_of(503, {"retry-after": value}, b"").retry_after == seconds


async def test_a_huge_error_body_is_not_read() -> None:
    async with serving(openai, answering(500, b"x" * 1_000_000)) as (adapter, _):
        with pytest.raises(BackendFailed, match="HTTP 500"):
            await collect(adapter, chat_request())


# vLLM


async def test_vllm_probe_load_and_timings(fakes: ModuleType) -> None:
    async with fakes.bench(fakes.Vllm, vllm, fakes.Scenario.HEALTHY) as bench:
        found = await bench.adapter.probe()
        assert (found.max_context, found.version) == (4096, "0.32.0")
        assert found.models == ("gemma-3-270m",)
        assert await bench.adapter.load() == Load(running=0, waiting=0, kv_usage=0.0)
        *_, finished = await collect(bench.adapter, chat_request())
    assert finished == Finished(
        Usage(11, 5, 4), Timings(0.02, 0.1, 0.3, "vllm.metrics"), ("length",), "model"
    )


async def test_vllm_sums_over_its_engines() -> None:
    page = (
        b'vllm:num_requests_running{engine="0",model_name="a"} 3.0\n'
        b'vllm:num_requests_running{engine="1",model_name="a"} 4.0\n'
        b'vllm:num_requests_waiting{engine="0"} 1\n'
        b'vllm:gpu_cache_usage_perc{model_name="v0"} 0.25\n'
    )
    async with serving(vllm, answering(200, page)) as (adapter, _):
        assert await adapter.load() == Load(running=7, waiting=1, kv_usage=0.25)


async def test_vllm_without_figures() -> None:
    async with serving(vllm, answering(200, b"# nothing\n")) as (adapter, _):
        assert await adapter.load() == Load()


async def test_vllm_that_serves_another_model_is_not_ready(fakes: ModuleType) -> None:
    async def script(exchange: Exchange) -> None:
        fakes.Vllm.get(exchange, fakes.Scenario.HEALTHY)

    async with serving(vllm, script, model="llama-9") as (adapter, _):
        with pytest.raises(BackendFailed, match=r"llama-9.*gemma-3-270m"):
            await adapter.probe()


# llama.cpp


async def test_llamacpp_probe_load_and_timings(fakes: ModuleType) -> None:
    async with fakes.bench(fakes.LlamaCpp, llamacpp, fakes.Scenario.HEALTHY) as bench:
        found = await bench.adapter.probe()
        assert (found.max_context, found.slots, found.version) == (4096, 4, "b0-unknown")
        assert (found.tools, found.multimodal, found.models) == (False, False, ("gemma-3-270m",))
        assert await bench.adapter.load() == Load(running=0, waiting=0)
        *_, finished = await collect(bench.adapter, chat_request(stream=False))
    timings = Timings(prefill=0.6244, decode=0.4635, source="llamacpp.timings")
    assert finished == Finished(Usage(11, 5, 4), timings, ("length",), "gemma-3-270m")


async def test_llamacpp_without_metrics_has_no_load(fakes: ModuleType) -> None:
    async def script(exchange: Exchange) -> None:
        if exchange.path == "/metrics":
            exchange.answer(501, {"error": {"code": 501, "message": "start it with --metrics"}})
        elif exchange.path == "/props":
            settings = {"default_generation_settings": {"n_ctx": 512}, "total_slots": 1}
            exchange.answer(200, {**settings, "endpoint_metrics": False})
        else:
            fakes.LlamaCpp.get(exchange, fakes.Scenario.HEALTHY)

    async with serving(llamacpp, script) as (adapter, _):
        with pytest.raises(BackendFailed, match="--metrics"):
            await adapter.load()
        await adapter.probe()
        assert await adapter.load() is None


async def test_llamacpp_answers_always_have_an_end(fakes: ModuleType) -> None:
    async def script(exchange: Exchange) -> None:
        await fakes.serve(exchange, fakes.Scenario.HEALTHY, fakes.LlamaCpp)

    async def limits(**settings: Any) -> list[object]:
        async with serving(llamacpp, script, **settings) as (adapter, server):
            await collect(adapter, chat_request(max_tokens=None))
            await collect(adapter, chat_request(max_tokens=5))
            await collect(adapter, chat_request(max_tokens=None, n_predict=6))
            await collect(adapter, chat_request(max_tokens=None, endpoint="completions"))
        posts = [exchange.json for exchange in server.exchanges if exchange.method == "POST"]
        return [post.get("max_tokens") for post in posts]

    assert await limits() == [4096, 5, None, 16]
    assert await limits(max_tokens=100) == [100, 5, None, 16]


async def test_llamacpp_gets_no_conversation_id() -> None:
    async with serving(llamacpp, one_event, headers={"X-Conversation-Id": "a"}) as (
        adapter,
        server,
    ):
        attempt = Attempt(headers={"x-conversation-id": "b", "x-request-id": "r"})
        async for _ in adapter.stream(chat_request(), attempt):
            pass
    (exchange,) = server.exchanges
    assert "x-conversation-id" not in exchange.headers
    assert exchange.headers["connection"] == "close"


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
async def test_llamacpp_whole_answers_are_made_of_streams(endpoint: Any, fakes: ModuleType) -> None:
    async with fakes.bench(fakes.LlamaCpp, llamacpp, fakes.Scenario.HEALTHY) as bench:
        request = chat_request(endpoint=endpoint, stream=False, n=3)
        events = await collect(bench.adapter, request)
    answer = read_answer(request, events)
    assert answer.texts == dict.fromkeys(range(3), "".join(fakes.WORDS))
    assert answer.usage is not None
    assert answer.usage["completion_tokens"] == 15
    assert isinstance(events[0], Relayed)
    body = json.loads(events[0].data)
    assert body["object"] == ("chat.completion" if endpoint == "chat" else "text_completion")
    assert body["timings"]["prompt_ms"] == 624.4


async def test_whole_answers_keep_tool_calls_and_logprobs() -> None:
    def chunk(delta: object, reason: str | None = None, **more: object) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, **more}
        head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        return b"data: " + json.dumps({**head, "choices": [choice]}).encode() + b"\n\n"

    def call(index: int, **more: object) -> dict[str, object]:
        return {"tool_calls": [{"index": index, **more}]}

    async def script(exchange: Exchange) -> None:
        exchange.begin()
        exchange.send(chunk({"role": "assistant", "content": None, "reasoning_content": "h"}))
        exchange.send(chunk({"reasoning_content": "m"}, logprobs={"content": [{"token": "a"}]}))
        exchange.send(chunk({"content": "x"}, logprobs={"content": [{"token": "b"}]}))
        first = {"name": "f", "arguments": ""}
        exchange.send(chunk(call(0, id="i", type="function", function=first)))
        exchange.send(chunk(call(0, function={"arguments": '{"a"'})))
        exchange.send(chunk(call(0, function={"arguments": ":1}"})))
        exchange.send(chunk(call(1, id="j", type="function", function={"name": "g"})))
        exchange.send(chunk({}, "tool_calls") + b"data: [DONE]\n\n")

    async with serving(llamacpp, script) as (adapter, _):
        relayed, _ = await collect(adapter, chat_request(stream=False))
    assert isinstance(relayed, Relayed)
    (choice,) = json.loads(relayed.data)["choices"]
    assert choice == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": "x",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "i", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
                {"id": "j", "type": "function", "function": {"name": "g"}},
            ],
        },
        "logprobs": {"content": [{"token": "a"}, {"token": "b"}]},
        "finish_reason": "tool_calls",
    }


# openai


async def test_openai_probe_reads_the_list_or_any_path() -> None:
    async def script(exchange: Exchange) -> None:
        if exchange.path == "/v1/models":
            exchange.answer(200, {"object": "list", "data": [{"id": "a"}, {"id": "b"}]})
        else:
            exchange.answer(200 if exchange.path == "/ready" else 500, b"fine")

    async with serving(openai, script, tools=False) as (adapter, _):
        found = await adapter.probe()
        assert (found.models, found.tools, found.schema) == (("a", "b"), False, True)
    async with serving(openai, script, probe_path="/ready", slots=3) as (adapter, _):
        assert (await adapter.probe()).slots == 3
    async with serving(openai, script, probe_path="/nope") as (adapter, _):
        with pytest.raises(BackendFailed):
            await adapter.probe()


async def test_openai_probe_of_something_else() -> None:
    async with serving(openai, answering(200, b"<html>")) as (adapter, _):
        with pytest.raises(BackendGarbage, match="/v1/models"):
            await adapter.probe()


# Prometheus text


@pytest.mark.parametrize(
    ("page", "values"),
    [
        (b"a 1\n", [1.0]),
        (b"a 1 1700000000\n", [1.0]),
        (b'a{x="y"} 2.5\nb 3\na{x="z"} 4e1\n', [2.5, 40.0]),
        (b'a{x="}\\" 9 {",y="\\\\"} 7\n', [7.0]),
        (b'a{} 1 # {trace="x"} 3\n', [1.0]),
        (b"# TYPE a gauge\n# a 3\nab 4\nb_a 5\nxa 6\n", []),
        (b"a NaN\na +Inf\na x\na\n", []),
        (b"", []),
    ],
)
def test_samples(page: bytes, values: list[float]) -> None:
    assert list(samples(page, "a")) == values
