"""Bodies that are not what their head or their protocol says, streamed and whole."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


def event(content: object) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def chunk(content: str | None, reason: str | None = None, **more: Any) -> bytes:
    delta = {} if content is None else {"content": content}
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return event({"id": "c", "created": 1, "model": "m", "choices": [choice], **more})


USAGE = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
BEGIN = chunk("hello")
END = chunk(None, "stop")
DONE = b"data: [DONE]\n\n"
ANSWER = json.dumps(
    {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello"},
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
    }
).encode()


def sending(head: bytes, body: bytes, length: int | None = None) -> Any:
    """An upstream that says ``length`` (default: the truth), sends ``body``, and closes."""

    async def behave(call: Any) -> None:
        said = len(body) if length is None else length
        await call.send(head + f"content-length: {said}\r\n\r\n".encode() + body)
        call.fin()

    return behave


@pytest.mark.parametrize(
    ("body", "length", "code"),
    [
        (BEGIN + END + DONE, len(BEGIN) + 20, "stream_truncated"),
        (BEGIN, len(BEGIN) + 500, "stream_truncated"),
        (BEGIN + b"data: {", None, "stream_truncated"),
        (BEGIN + END[:-20] + b"\n\n" + DONE, None, "backend_garbage"),
    ],
    ids=["cut by a short length", "less than the length", "half a line", "half an object"],
)
async def test_a_stream_that_is_not_all_there(
    start_gateway: Any, upstreams: Any, body: bytes, length: int | None, code: str
) -> None:
    gateway = await start_gateway()
    upstreams[0].behaviour = sending(HEAD, body, length)
    exchange = await gateway.get(stream=True)
    events = exchange.all_events()
    assert exchange.complete
    assert exchange.text() == "hello"
    assert json.loads(events[-1])["error"]["code"] == code
    assert "[DONE]" not in events


@pytest.mark.parametrize("length", [len(ANSWER) - 20, len(ANSWER) + 20])
async def test_an_answer_of_another_length_is_had_elsewhere(
    start_gateway: Any, upstreams: Any, length: int
) -> None:
    gateway = await start_gateway()
    upstreams[0].behaviour = sending(WHOLE, ANSWER, length)
    exchange = await gateway.get()
    assert exchange.status == 200
    assert exchange.headers["x-forebay-attempts"] == "2"


async def test_usage_twice_reaches_the_client_once(start_gateway: Any, upstreams: Any) -> None:
    usage = event({"id": "c", "created": 1, "model": "m", "choices": [], "usage": USAGE})
    gateway = await start_gateway()
    upstreams[0].behaviour = sending(HEAD, BEGIN + END + usage + usage + DONE)
    exchange = await gateway.get(stream=True, stream_options={"include_usage": True})
    found = [json.loads(data) for data in exchange.all_events() if data != "[DONE]"]
    assert [part["usage"] for part in found if part.get("usage")] == [USAGE]
    assert gateway.decision(exchange).outcome.usage.prompt_tokens == 3


@pytest.mark.parametrize(
    "more", [b"garbage", BEGIN, b"data: [DONE]\n\n" * 3, event({"error": "x"})]
)
async def test_bytes_after_done_are_nobodys(
    start_gateway: Any, upstreams: Any, more: bytes
) -> None:
    """Neither this client gets them, nor the next one on the same connection."""

    async def behave(call: Any) -> None:
        await call.head()
        await call.chunk(BEGIN + END + DONE + more)
        await call.send(b"0\r\n\r\n")

    gateway = await start_gateway()
    upstreams[0].behaviour = behave
    for _ in range(2):
        exchange = await gateway.get(stream=True)
        assert exchange.text() == "hello"
        assert exchange.all_events()[-1] == "[DONE]"
        assert exchange.body.count(b"[DONE]") == 1
        assert b"garbage" not in exchange.body
        assert gateway.decision(exchange).outcome.result == "ok"


@pytest.mark.parametrize("begun", [True, False])
async def test_64_mib_without_a_line_end_take_no_memory(
    start_gateway: Any, upstreams: Any, begun: bool
) -> None:
    """Of an answer that never becomes an event, no more than an event's limit is held."""
    block = b"x" * (64 << 10)

    async def behave(call: Any) -> None:
        await call.head()
        await call.chunk(BEGIN + b"data: " if begun else b'data: {"id": "')
        for _ in range((64 << 20) // len(block)):
            if call.gone.is_set():
                return
            await call.chunk(block)

    gateway = await start_gateway()
    upstreams[0].behaviour = upstreams[1].behaviour = behave
    tracemalloc.start()
    try:
        exchange = await gateway.get(stream=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert exchange.status == (200 if begun else 502)
    assert b"backend_garbage" in exchange.body
    assert peak < 16 << 20
