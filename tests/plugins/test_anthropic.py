"""Anthropic's Messages API: requests translated or refused, its events as ours."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from msgspec import Raw

from forebay.api import (
    BackendBusy,
    BackendFailed,
    BackendGarbage,
    BackendRefused,
    Capabilities,
    ContentPart,
    Delta,
    Event,
    Finished,
    GenerateRequest,
    Message,
    Sampling,
    Started,
    StreamTruncated,
    ToolCallDelta,
    Usage,
)
from forebay.testing import Exchange, ScriptedServer, adapter_context, chat_request
from forebay.testing.adapter import collect
from forebay_plugins.anthropic import MAX_EVENT, AnthropicAdapter, AnthropicSettings
from forebay_plugins.anthropic_events import MessageReader
from forebay_plugins.anthropic_request import body_of


def event(kind: str, **content: Any) -> bytes:
    said = json.dumps({"type": kind, **content}, ensure_ascii=False)
    return f"event: {kind}\ndata: {said}\n\n".encode()


def block(index: int, kind: str, *deltas: dict[str, Any], **more: Any) -> bytes:
    return (
        event("content_block_start", index=index, content_block={"type": kind, **more})
        + b"".join(event("content_block_delta", index=index, delta=delta) for delta in deltas)
        + event("content_block_stop", index=index)
    )


def ending(reason: str = "tool_use") -> bytes:
    delta = {"stop_reason": reason, "stop_sequence": None}
    return event("message_delta", delta=delta, usage={"output_tokens": 9}) + event("message_stop")


START = event(
    "message_start",
    message={
        "id": "msg_1",
        "content": [],
        "stop_reason": None,
        "usage": {
            "input_tokens": 3,
            "cache_read_input_tokens": 4,
            "cache_creation_input_tokens": 2,
            "output_tokens": 1,
        },
    },
)
HELLO = block(0, "text", {"type": "text_delta", "text": "H😀"}, {"type": "text_delta", "text": "!"})
STREAM = (
    START
    + event("ping")
    + block(
        0,
        "thinking",
        {"type": "thinking_delta", "thinking": "Hm"},
        {"type": "signature_delta", "signature": "s"},
        thinking="",
    )
    + block(1, "text", {"type": "text_delta", "text": "H😀"}, text="")
    + block(
        2,
        "tool_use",
        {"type": "input_json_delta", "partial_json": ""},
        {"type": "input_json_delta", "partial_json": '{"x"'},
        {"type": "input_json_delta", "partial_json": ":1}"},
        id="t1",
        name="f",
        input={},
    )
    + block(3, "server_tool_use", {"type": "input_json_delta", "partial_json": "{}"}, name="s")
    + block(4, "tool_use", id="t2", name="g", input={})
    + ending()
)
EVENTS: list[Event] = [
    Started(),
    Delta(reasoning="Hm"),
    Delta(text="H😀"),
    Delta(tool_calls=(ToolCallDelta(0, "t1", "f"),)),
    Delta(tool_calls=(ToolCallDelta(0, arguments='{"x"'),)),
    Delta(tool_calls=(ToolCallDelta(0, arguments=":1}"),)),
    Delta(tool_calls=(ToolCallDelta(1, "t2", "g"),)),
    Delta(finish_reason="tool_calls"),
    Finished(Usage(9, 9, 4)),
]


class Server:
    def __init__(self, *pieces: bytes, status: int = 200, error: str = "") -> None:
        self.pieces = pieces
        self.status = status
        self.error = error
        self.exchanges: list[Exchange] = []

    async def __call__(self, exchange: Exchange) -> None:
        self.exchanges.append(exchange)
        if self.status != 200:
            error = {"type": self.error, "message": "m"}
            body = {"type": "error", "error": error}
            exchange.answer(self.status, body, {"retry-after": "3"})
        elif exchange.path == "/v1/models":
            exchange.answer(200, {"data": [{"id": "claude", "type": "model"}], "has_more": False})
        else:
            exchange.begin("text/event-stream; charset=utf-8")
            for piece in self.pieces:
                exchange.send(piece)


@asynccontextmanager
async def adapter_of(server: Server, **settings: Any) -> AsyncIterator[AnthropicAdapter]:
    async with ScriptedServer(server) as scripted:
        made = AnthropicSettings(adapter="anthropic", url=scripted.url, **settings)
        adapter = AnthropicAdapter(made, adapter_context())
        try:
            yield adapter
        finally:
            await adapter.aclose()


async def answer(*pieces: bytes) -> list[Event]:
    async with adapter_of(Server(*pieces)) as adapter:
        return await collect(adapter, chat_request())


async def test_what_a_message_says() -> None:
    assert await answer(STREAM) == EVENTS
    assert await answer(STREAM.replace(b"\n", b"\r\n")) == EVENTS
    assert await answer(*(STREAM[i : i + 1] for i in range(len(STREAM)))) == EVENTS


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
async def test_a_stream_may_be_cut_at_every_byte(newline: bytes) -> None:
    stream = STREAM.replace(b"\n", newline)
    server = Server()
    async with adapter_of(server) as adapter:
        for cut in range(1, len(stream)):
            server.pieces = (stream[:cut], stream[cut:])
            assert await collect(adapter, chat_request()) == EVENTS
        assert len({id(exchange._transport) for exchange in server.exchanges}) == 1, (
            "the connection is used again"
        )


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("pause_turn", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("refusal", "content_filter"),
        ("tool_use", "tool_calls"),
    ],
)
async def test_stop_reasons(said: str, heard: str) -> None:
    events = await answer(START + HELLO + ending(said))
    assert events[-2] == Delta(finish_reason=heard)  # type: ignore[arg-type]  # parametrized


@pytest.mark.parametrize(
    ("tail", "kind"),
    [
        (b"", StreamTruncated),
        (event("message_stop"), BackendGarbage),
        (b"data: {\n\n", BackendGarbage),
        (b'data: {"type": 7}\n\n', BackendGarbage),
        (b"x" * (MAX_EVENT + 1), BackendGarbage),
        (event("error", error={"type": "overloaded_error", "message": "m"}), BackendBusy),
        (event("error", error={"type": "rate_limit_error", "message": "m"}), BackendBusy),
        (event("error", error={"type": "api_error", "message": "m"}), BackendFailed),
        (event("error", error={"type": "invalid_request_error"}), BackendRefused),
    ],
)
async def test_what_breaks_a_stream(tail: bytes, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        await answer(START + HELLO + tail)


def test_a_message_begins_with_its_start() -> None:
    with pytest.raises(BackendGarbage, match="message_start"):
        list(MessageReader().events(HELLO.split(b"\n\n")[0]))


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (400, "invalid_request_error", BackendRefused),
        (413, "request_too_large", BackendRefused),
        (401, "authentication_error", BackendFailed),
        (404, "not_found_error", BackendFailed),
        (429, "rate_limit_error", BackendBusy),
        (500, "api_error", BackendFailed),
        (529, "overloaded_error", BackendBusy),
    ],
)
async def test_statuses(status: int, error: str, kind: type[Any]) -> None:
    async with adapter_of(Server(status=status, error=error)) as adapter:
        with pytest.raises(kind) as raised:
            await collect(adapter, chat_request())
    if kind is BackendBusy:
        assert raised.value.retry_after == 3


async def test_headers_and_probe() -> None:
    server = Server(START + HELLO + ending())
    async with adapter_of(server, api_key="k", model="claude", max_context=9) as adapter:
        found = await adapter.probe()
        await collect(adapter, chat_request())
    assert found == Capabilities(
        endpoints=frozenset({"chat"}),
        tools=True,
        multimodal=True,
        extra_fields=False,
        max_context=9,
        models=("claude",),
        max_choices=1,
    )
    for exchange in server.exchanges:
        assert exchange.headers["x-api-key"] == "k"
        assert exchange.headers["anthropic-version"] == "2023-06-01"
        assert "authorization" not in exchange.headers
    assert server.exchanges[-1].json["model"] == "claude"


def request(*messages: Message, sampling: Sampling | None = None, **fields: Any) -> GenerateRequest:
    changes = {name: fields.pop(name) for name in ("needs_schema", "extra") if name in fields}
    made = chat_request(max_tokens=None, **fields)
    messages = messages or made.messages
    return msgspec.structs.replace(
        made, messages=messages, sampling=sampling or Sampling(), **changes
    )


def body(asked: GenerateRequest) -> Any:
    return json.loads(msgspec.json.encode(body_of(asked, "claude", 4096)))


def test_the_body() -> None:
    def call(name: str) -> Raw:
        function = {"name": name, "arguments": '{"x":1}'}
        return Raw(msgspec.json.encode({"id": name, "type": "function", "function": function}))

    sampling = Sampling(max_tokens=7, temperature=0.5, top_p=0.9, top_k=-1, stop=("x",))
    asked = request(
        Message(role="system", content="Be brief."),
        Message(role="user", content="a"),
        Message(role="user", content=(ContentPart("text", "b"),)),
        Message(role="assistant", content="c", tool_calls=(call("f"), call("g"))),
        Message(role="tool", content="1", tool_call_id="f"),
        Message(role="tool", content="2", tool_call_id="g"),
        Message(role="user", content="d"),
        Message(role="developer", content="Now."),
        sampling=sampling,
    )

    def used(name: str) -> dict[str, Any]:
        return {"type": "tool_use", "id": name, "name": name, "input": {"x": 1}}

    def result(name: str, text: str) -> dict[str, Any]:
        return {"type": "tool_result", "tool_use_id": name, "content": text}

    def text(said: str) -> dict[str, Any]:
        return {"type": "text", "text": said}

    assert body(asked) == {
        "model": "claude",
        "system": "Be brief.\n\nNow.",
        "max_tokens": 7,
        "stream": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop_sequences": ["x"],
        "messages": [
            {"role": "user", "content": [text("a"), text("b")]},
            {"role": "assistant", "content": [text("c"), used("f"), used("g")]},
            {"role": "user", "content": [result("f", "1"), result("g", "2"), text("d")]},
        ],
    }
    assert body(request(sampling=Sampling(top_k=5)))["top_k"] == 5
    assert body(request())["max_tokens"] == 4096


FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
TOOLS = [{"type": "function", "function": FUNCTION}]


def test_tools() -> None:
    made = body(request(tools=[*TOOLS, {"type": "function", "function": {"name": "g"}}]))
    assert made["tools"] == [
        {"name": "f", "description": "d", "input_schema": {"type": "object"}, "strict": True},
        {"name": "g", "input_schema": {"type": "object", "properties": {}}},
    ]
    assert "tool_choice" not in made
    assert "tools" not in body(request(tools=None))


@pytest.mark.parametrize(
    ("fields", "choice"),
    [
        ({"tool_choice": "auto"}, {"type": "auto"}),
        ({"tool_choice": "none", "parallel_tool_calls": False}, {"type": "none"}),
        ({"tool_choice": "required"}, {"type": "any"}),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
            {"type": "tool", "name": "f"},
        ),
        ({"parallel_tool_calls": False}, {"type": "auto", "disable_parallel_tool_use": True}),
    ],
)
def test_tool_choice(fields: dict[str, Any], choice: dict[str, Any]) -> None:
    assert body(request(tools=TOOLS, **fields))["tool_choice"] == choice


IMAGE = (ContentPart("image_url"),)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (request(n=2), "n"),
        (request(endpoint="completions"), "prompt"),
        (request(sampling=Sampling(seed=0)), "seed"),
        (request(sampling=Sampling(logprobs=0)), "logprobs"),
        (request(sampling=Sampling(min_p=0.1)), "min_p"),
        (request(sampling=Sampling(frequency_penalty=1)), "frequency_penalty"),
        (request(sampling=Sampling(ignore_eos=True)), "ignore_eos"),
        (request(sampling=Sampling(temperature=1.5)), "temperature"),
        (request(needs_schema=True), "response_format"),
        (request(extra=("logit_bias",)), "logit_bias"),
        (request(tools=[7]), "tools"),
        (request(tools=TOOLS, tool_choice="some"), "tool_choice"),
        (request(Message(role="system", content="a")), "messages"),
        (request(Message(role="user", content=IMAGE)), "messages"),
        (request(Message(role="tool", content="a")), "messages"),
        (request(Message(role="function", content="a")), "messages"),
        (request(Message(role="assistant", tool_calls=(Raw(b"{}"),))), "messages"),
    ],
)
async def test_what_it_cannot_take_is_refused(asked: GenerateRequest, param: str) -> None:
    server = Server()
    async with adapter_of(server) as adapter:
        with pytest.raises(BackendRefused, match="Anthropic") as refused:
            await collect(adapter, asked)
    assert (refused.value.param, refused.value.status) == (param, 400)
    assert not server.exchanges
