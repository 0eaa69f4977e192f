"""Faults after the client has seen the beginning: it is told, and never that all was well."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

TOKENS = ["one", " two", " three"]


async def tokens(call: Any) -> None:
    """Send some, and go on when the client has them: what breaks then is mid-stream for sure."""
    await call.head()
    for token in TOKENS:
        await call.token(token)
    await call.go.wait()


async def stream(gateway: Any, upstream: Any) -> Any:
    exchange = await gateway.ask(stream=True)
    call = await upstream.call()
    await exchange.events(len(TOKENS))
    call.go.set()
    return await exchange.end()


async def truncated(gateway: Any, upstream: Any, code: str) -> Any:
    """The stream has its tokens, then an error event, and no [DONE]."""
    exchange = await stream(gateway, upstream)
    assert exchange.status == 200
    assert exchange.complete
    events = exchange.all_events()
    assert exchange.text() == "".join(TOKENS)
    assert json.loads(events[-1])["error"]["code"] == code
    assert "[DONE]" not in events
    await gateway.until_idle()
    assert gateway.decision(exchange).outcome.result == "truncated"
    return exchange


async def test_stall(start_gateway: Any, upstreams: Any) -> None:
    async def stall(call: Any) -> None:
        await tokens(call)
        await call.hang()

    gateway = await start_gateway(timeouts={"inter_token": 0.3})
    upstreams[0].behaviour = stall
    await truncated(gateway, upstreams[0], "inter_token_timeout")
    await asyncio.wait_for(upstreams[0].calls[0].gone.wait(), 5)
    assert upstreams[1].calls == [], "nothing may be retried after the first byte"


async def test_total_timeout(start_gateway: Any, upstreams: Any) -> None:
    async def hang(call: Any) -> None:
        await tokens(call)
        await call.hang()

    gateway = await start_gateway(timeouts={"total": 0.5, "inter_token": 0})
    upstreams[0].behaviour = hang
    await truncated(gateway, upstreams[0], "total_timeout")


async def test_reset(start_gateway: Any, upstreams: Any) -> None:
    async def reset(call: Any) -> None:
        await tokens(call)
        call.reset()

    gateway = await start_gateway()
    upstreams[0].behaviour = reset
    await truncated(gateway, upstreams[0], "stream_truncated")
    assert upstreams[1].calls == []


@pytest.mark.parametrize("proper", [True, False], ids=["last chunk", "FIN"])
async def test_end_without_finish(start_gateway: Any, upstreams: Any, proper: bool) -> None:
    async def end(call: Any) -> None:
        await tokens(call)
        if proper:
            await call.send(b"0\r\n\r\n")
        call.fin()

    gateway = await start_gateway()
    upstreams[0].behaviour = end
    await truncated(gateway, upstreams[0], "stream_truncated")


@pytest.mark.parametrize("proper", [True, False], ids=["last chunk", "FIN"])
async def test_end_after_finish_is_success(
    start_gateway: Any, upstreams: Any, proper: bool
) -> None:
    """[DONE] is missing, the answer is not."""

    async def end(call: Any) -> None:
        await tokens(call)
        await call.finish()
        if proper:
            await call.send(b"0\r\n\r\n")
        call.fin()

    gateway = await start_gateway()
    upstreams[0].behaviour = end
    exchange = await stream(gateway, upstreams[0])
    assert exchange.text() == "".join(TOKENS)
    assert exchange.all_events()[-1] == "[DONE]"
    assert gateway.decision(exchange).outcome.result == "ok"


GARBAGE = {
    "not JSON": b"data: {oops\n\n",
    "not an object": b"data: 42\n\n",
    "wrong shape": b'data: {"choices": "many"}\n\n',
    "not UTF-8": b"data: \xff\xfe\n\n",
}


@pytest.mark.parametrize("garbage", GARBAGE)
async def test_garbage(start_gateway: Any, upstreams: Any, garbage: str) -> None:
    async def behave(call: Any) -> None:
        await tokens(call)
        await call.chunk(GARBAGE[garbage])
        await call.finish()
        await call.done()

    gateway = await start_gateway()
    upstreams[0].behaviour = behave
    exchange = await truncated(gateway, upstreams[0], "backend_garbage")
    assert GARBAGE[garbage].strip() not in exchange.body


async def test_bad_chunked_framing(start_gateway: Any, upstreams: Any) -> None:
    async def behave(call: Any) -> None:
        await tokens(call)
        await call.send(b"zz\r\nwhat\r\n")
        await call.hang()

    gateway = await start_gateway()
    upstreams[0].behaviour = behave
    await truncated(gateway, upstreams[0], "stream_truncated")
    await asyncio.wait_for(upstreams[0].calls[0].gone.wait(), 5)


async def test_error_event(start_gateway: Any, upstreams: Any) -> None:
    async def behave(call: Any) -> None:
        await tokens(call)
        await call.event({"error": {"message": "engine died", "type": "server_error", "code": 500}})
        await call.done()

    gateway = await start_gateway()
    upstreams[0].behaviour = behave
    await truncated(gateway, upstreams[0], "backend_failed")


async def test_endless_line(start_gateway: Any, upstreams: Any) -> None:
    """A line without an end is cut after a megabyte, not gathered for ever."""
    sent = 0

    async def behave(call: Any) -> None:
        nonlocal sent
        await tokens(call)
        await call.chunk(b"data: ")
        while not call.gone.is_set():
            await call.chunk(b"x" * 65536)
            sent += 65536

    gateway = await start_gateway()
    upstreams[0].behaviour = behave
    await truncated(gateway, upstreams[0], "backend_garbage")
    assert sent < 32 << 20, "socket buffers take some; the gateway a megabyte"


async def test_bytes_one_by_one(start_gateway: Any, upstreams: Any) -> None:
    """However a stream is cut, characters included, the text is the same."""
    text = "Wasser fließt abwärts – 水 🌊"

    async def behave(call: Any) -> None:
        await call.head()
        event = {
            "id": "c",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "m",
            "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}],
        }
        data = f"data: {json.dumps(event, ensure_ascii=False)}\r\n\r\ndata: [DONE]\r\n\r\n"
        for byte in data.encode():
            await call.chunk(bytes([byte]))
        await call.send(b"0\r\n\r\n")

    gateway = await start_gateway()
    upstreams[0].behaviour = behave
    exchange = await gateway.get(stream=True)
    assert exchange.text() == text
    assert exchange.all_events()[-1] == "[DONE]"
