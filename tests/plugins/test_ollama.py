"""Ollama: requests translated or refused, its lines as events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from forebay.api import (
    Attempt,
    BackendBusy,
    BackendFailed,
    BackendGarbage,
    BackendRefused,
    Delta,
    DetokenizeRequest,
    Embeddings,
    EmbedRequest,
    Finished,
    GenerateRequest,
    Message,
    Sampling,
    Started,
    StreamTruncated,
    Timings,
    TokenLogprob,
    ToolCallDelta,
    Unsupported,
    Usage,
)
from forebay.testing import Exchange, ScriptedServer, adapter_context, chat_request
from forebay.testing.adapter import collect
from forebay_plugins.ollama import OllamaAdapter, OllamaSettings

LAST = {
    "done": True,
    "done_reason": "stop",
    "load_duration": 1_000_000_000,
    "prompt_eval_count": 7,
    "prompt_eval_duration": 200_000_000,
    "eval_count": 3,
    "eval_duration": 500_000_000,
}
CALL = {"function": {"name": "f", "arguments": {"x": 1}}}
LOGPROBS = [{"token": "H", "logprob": -1, "top_logprobs": [{"token": "H", "logprob": -1}]}]
CHAT = [
    {"message": {"role": "assistant", "content": "", "thinking": "Hm"}, "done": False},
    {"message": {"role": "assistant", "content": "H😀"}, "done": False, "logprobs": LOGPROBS},
    {"message": {"role": "assistant", "content": "", "tool_calls": [CALL]}, "done": False},
    {"message": {"content": "", "tool_calls": [{"id": "c", **CALL}]}, "done": False},
    {"message": {"role": "assistant", "content": ""}, **LAST},
]


def lines(*content: object) -> bytes:
    return b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in content)


class Server:
    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces
        self.status = 200
        self.error = "no"
        self.version = "0.40.0"
        self.tags: list[dict[str, Any]] = [{"name": "gemma:latest"}, {"name": "other"}]
        self.asked: list[tuple[str, dict[str, Any]]] = []

    async def __call__(self, exchange: Exchange) -> None:
        if exchange.path == "/api/version":
            exchange.answer(200, {"version": self.version})
        elif exchange.path == "/api/tags":
            exchange.answer(200, {"models": self.tags})
        elif exchange.path == "/api/ps":
            exchange.answer(200, {"models": [{"name": "gemma:latest", "context_length": 8192}]})
        else:
            self.asked.append((exchange.path, exchange.json))
            if self.status != 200:
                exchange.answer(self.status, {"error": self.error})
            elif exchange.path == "/api/embed":
                exchange.answer(200, {"embeddings": [[1, 2]], "prompt_eval_count": 4})
            else:
                exchange.begin("application/x-ndjson")
                for piece in self.pieces:
                    exchange.send(piece)


@asynccontextmanager
async def adapter_of(server: Server, **settings: Any) -> AsyncIterator[OllamaAdapter]:
    async with ScriptedServer(server) as scripted:
        made = OllamaSettings(adapter="ollama", url=scripted.url, **settings)
        adapter = OllamaAdapter(made, adapter_context())
        try:
            yield adapter
        finally:
            await adapter.aclose()


def request(messages: tuple[Message, ...] = (), **options: Any) -> GenerateRequest:
    sampling = options.pop("sampling", Sampling())
    changes = {"messages": messages} if messages else {}
    more = {k: options.pop(k) for k in ("needs_tools", "needs_schema", "extra", "prompts", "echo")
            if k in options}  # fmt: skip
    made = chat_request(**options)
    return msgspec.structs.replace(made, sampling=sampling, **changes, **more)


async def heard(asked: GenerateRequest, **settings: Any) -> dict[str, Any]:
    """The body that the server gets for this request."""
    server = Server(lines(LAST))
    async with adapter_of(server, **settings) as adapter:
        await collect(adapter, asked)
    ((_, body),) = server.asked
    return body


async def test_what_a_chat_says() -> None:
    async with adapter_of(Server(lines(*CHAT))) as adapter:
        assert await collect(adapter, chat_request()) == [
            Started(),
            Delta(reasoning="Hm"),
            Delta(text="H😀", logprobs=(TokenLogprob("H", -1.0, (("H", -1.0),)),)),
            Delta(tool_calls=(ToolCallDelta(0, "call_forebay-1_0", "f", '{"x":1}'),)),
            Delta(tool_calls=(ToolCallDelta(1, "c", "f", '{"x":1}'),)),
            Delta(finish_reason="tool_calls"),
            Finished(Usage(7, 3), Timings(1.0, 0.2, 0.5, "ollama.durations")),
        ]


async def test_what_a_completion_says() -> None:
    stream = lines({"response": "a", "thinking": "b"}, {**LAST, "done_reason": "length"})
    async with adapter_of(Server(stream)) as adapter:
        events = await collect(adapter, chat_request(endpoint="completions"))
    assert events[1:3] == [Delta(text="a", reasoning="b"), Delta(finish_reason="length")]


async def test_lines_may_be_cut_at_every_byte() -> None:
    stream = lines(*CHAT)
    whole = None
    for cut in range(1, len(stream)):
        async with adapter_of(Server(stream[:cut], stream[cut:])) as adapter:
            events = await collect(adapter, chat_request())
            whole = whole or events
            assert events == whole


@pytest.mark.parametrize(
    ("stream", "kind"),
    [
        (lines(CHAT[1], {"error": "out of memory"}), BackendFailed),
        (lines(CHAT[1]), StreamTruncated),
        (lines(CHAT[1]) + b'{"mess', StreamTruncated),
        (lines(CHAT[1]) + b"<html>\n", BackendGarbage),
        (lines(CHAT[1], {"message": 7}), BackendGarbage),
        (b"x" * ((1 << 20) + 1), BackendGarbage),
    ],
)
async def test_what_breaks_a_stream(stream: bytes, kind: type[Exception]) -> None:
    async with adapter_of(Server(stream)) as adapter:
        with pytest.raises(kind):
            await collect(adapter, chat_request())


@pytest.mark.parametrize(
    ("status", "kind"), [(503, BackendBusy), (500, BackendFailed), (404, BackendFailed)]
)
async def test_statuses(status: int, kind: type[Exception]) -> None:
    server = Server()
    server.status = status
    async with adapter_of(server) as adapter:
        with pytest.raises(kind):
            await collect(adapter, chat_request())


async def test_a_prompt_that_is_too_long() -> None:
    server = Server()
    server.status = 400
    said = {"code": 400, "message": "too long", "type": "exceed_context_size_error"}
    server.error = json.dumps({"error": said})
    async with adapter_of(server) as adapter:
        with pytest.raises(BackendRefused, match="too long") as refused:
            await collect(adapter, chat_request())
    assert refused.value.message == "too long"
    assert refused.value.code == "context_length_exceeded"


async def test_the_body_of_a_chat() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
    schema = {"type": "object"}
    asked = request(
        (
            Message(role="developer", content="Be brief."),
            Message(
                role="assistant",
                reasoning_content="Hm",
                tool_calls=(msgspec.Raw(msgspec.json.encode(call)),),
            ),
            Message(role="tool", content="2", tool_call_id="c", name="f"),
        ),
        sampling=Sampling(
            max_tokens=9,
            temperature=0.5,
            repetition_penalty=1.1,
            stop=("x",),
            logprobs=2,
            seed=4,
        ),
        needs_tools=True,
        needs_schema=True,
        tools=[{"type": "function"}],
        tool_choice="auto",
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    )
    assert await heard(asked, model="gemma", num_ctx=4096, keep_alive="30m") == {
        "model": "gemma",
        "stream": True,
        "truncate": False,
        "shift": False,
        "keep_alive": "30m",
        "logprobs": True,
        "top_logprobs": 2,
        "options": {
            "num_predict": 9,
            "temperature": 0.5,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repeat_penalty": 1.1,
            "seed": 4,
            "stop": ["x"],
            "num_ctx": 4096,
        },
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "assistant",
                "content": "",
                "thinking": "Hm",
                "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {"x": 1}}}],
            },
            {"role": "tool", "content": "2", "tool_call_id": "c", "tool_name": "f"},
        ],
        "tools": [{"type": "function"}],
        "format": schema,
    }


async def test_the_body_of_a_completion() -> None:
    body = await heard(request(endpoint="completions"))
    assert body["prompt"] == "Hello"
    assert body["raw"] is True
    assert body["options"]["num_predict"] == 16
    body = await heard(request(needs_schema=True, response_format={"type": "json_object"}))
    assert body["format"] == "json"
    assert "num_predict" not in body["options"]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (request(n=2), "n"),
        (request(endpoint="completions", prompts=("a", "b")), "n"),
        (request(endpoint="completions", prompts=((1, 2),)), "prompt"),
        (request(endpoint="completions", echo=True), "echo"),
        (request(sampling=Sampling(min_tokens=1)), "min_tokens"),
        (request(sampling=Sampling(ignore_eos=True)), "ignore_eos"),
        (request(needs_tools=True, tools=[{}], tool_choice="required"), "tool_choice"),
        (request(extra=("logit_bias",)), "logit_bias"),
        (request(needs_schema=True, response_format={"type": "json_schema"}), "response_format"),
        (request((Message(role="assistant", tool_calls=(msgspec.Raw(b"{}"),)),)), "messages"),
    ],
)
async def test_what_it_cannot_take_is_refused(asked: GenerateRequest, param: str) -> None:
    server = Server()
    async with adapter_of(server) as adapter:
        with pytest.raises(BackendRefused, match="Ollama") as refused:
            await collect(adapter, asked)
    assert (refused.value.param, refused.value.status) == (param, 400)
    assert not server.asked


async def test_a_probe() -> None:
    server = Server()
    async with adapter_of(server, model="gemma") as adapter:
        found = await adapter.probe()
        assert found.endpoints == {"chat", "completions", "embeddings"}, (
            "an old server says nothing"
        )
        assert not found.multimodal
        assert (found.version, found.max_context, found.slots) == ("0.40.0", 8192, 1)
        assert found.models == ("gemma:latest", "other")
        server.tags = [{"name": "gemma", "capabilities": ["completion", "vision"]}]
        found = await adapter.probe()
        assert found.endpoints == {"chat", "completions"}
        assert (found.tools, found.multimodal, found.max_context) == (False, True, 0)
        server.tags = [{"name": "gemma", "capabilities": ["embedding"]}]
        assert (await adapter.probe()).endpoints == {"embeddings"}
        server.version = "0.12.5"
        with pytest.raises(BackendFailed, match="update"):
            await adapter.probe()
        server.version = "0.0.0"
        server.tags = []
        with pytest.raises(BackendFailed, match="gemma"):
            await adapter.probe()
    async with adapter_of(Server(), num_ctx=512) as adapter:
        assert (await adapter.probe()).max_context == 512


async def test_embeddings() -> None:
    common: dict[str, Any] = {"id": "r", "model": "m", "created": 1}
    server = Server()
    async with adapter_of(server, num_ctx=512) as adapter:
        asked = EmbedRequest(inputs=("a",), dimensions=2, **common)
        assert await adapter.perform(asked, Attempt()) == Embeddings(((1, 2),), Usage(4, 0))
        assert server.asked == [
            (
                "/api/embed",
                {
                    "model": "m",
                    "input": ["a"],
                    "truncate": False,
                    "dimensions": 2,
                    "options": {"num_ctx": 512},
                },
            )
        ]
        with pytest.raises(BackendRefused):
            await adapter.perform(EmbedRequest(inputs=((1,),), **common), Attempt())
        with pytest.raises(BackendGarbage):
            await adapter.perform(EmbedRequest(inputs=("a", "b"), **common), Attempt())
        with pytest.raises(Unsupported):
            await adapter.perform(DetokenizeRequest(tokens=(1,), **common), Attempt())
