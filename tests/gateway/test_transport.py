"""Both transports keep one contract, over real sockets and against servers that misbehave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.api import (
    BackendGarbage,
    ConfigError,
    ConnectFailed,
    StaleConnection,
    StreamTruncated,
    Upstream,
)
from forebay.transport import connect
from forebay.transport.http1 import HIGH_WATER, KEEPALIVE_SECONDS, Http1Upstream
from forebay.transport.httpx_aiohttp import HttpxUpstream

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nX-Mixed: yes\r\n\r\nok"


@asynccontextmanager
async def server(handler: Handler) -> AsyncIterator[str]:
    """Runs ``handler`` for each connection; its end closes the connection."""
    writers: list[asyncio.StreamWriter] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        try:
            await handler(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    running = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{running.sockets[0].getsockname()[1]}"
    finally:
        running.close()
        for writer in writers:
            writer.transport.abort()
        await running.wait_closed()


async def request_of(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return head[0], headers, body


def answering(*answers: bytes, hold: bool = False) -> Handler:
    """Answers each request on a connection with the next of these bytes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await request_of(reader)
            writer.write(answer)
            await writer.drain()
        if hold:
            await reader.read()

    return handle


@pytest.fixture(params=[Http1Upstream, HttpxUpstream])
def transport(request: pytest.FixtureRequest) -> type[Upstream]:
    return request.param


@asynccontextmanager
async def opened(transport: type[Upstream], url: str) -> AsyncIterator[Upstream]:
    upstream = transport(url)  # type: ignore[call-arg]  # both take the URL
    try:
        yield upstream
    finally:
        await upstream.aclose()


async def test_a_request_arrives_as_it_was_meant(transport) -> None:
    seen: list[tuple[str, dict[str, str], bytes]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await request_of(reader))
        writer.write(OK)

    async with server(handle) as url, opened(transport, f"{url}/base/") as upstream:
        response = await upstream.send("POST", "/v1/x", body=b'{"a": 1}', headers={"x-a": "b"})
        assert response.status == 200
        assert response.headers["x-mixed"] == "yes"
        assert await response.read() == b"ok"
        await response.aclose()
        await response.aclose()
    line, headers, body = seen[0]
    assert line == "POST /base/v1/x HTTP/1.1"
    assert body == b'{"a": 1}'
    assert headers["x-a"] == "b"
    assert headers["content-type"] == "application/json"
    assert headers["accept-encoding"] == "identity"
    assert headers["host"] == url.removeprefix("http://")


async def test_connections_are_used_again(transport) -> None:
    connections = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await answering(*[OK] * 5)(reader, writer)

    async with server(handle) as url, opened(transport, url) as upstream:
        for _ in range(5):
            response = await upstream.send("GET", "/")
            assert await response.read() == b"ok"
            await response.aclose()
    assert connections == 1


async def test_leaving_before_the_end_closes_the_connection(transport) -> None:
    closed = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await reader.read()
        closed.set()

    async with server(handle) as url, opened(transport, url) as upstream:
        response = await upstream.send("GET", "/")
        async for chunk in response.chunks():
            assert chunk == b"abc"
            break
        await response.aclose()
        async with asyncio.timeout(2):
            await closed.wait()


async def test_cancelling_the_wait_for_the_head_closes_the_connection(transport) -> None:
    closed = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        await reader.read()
        closed.set()

    async with server(handle) as url, opened(transport, url) as upstream:
        sending = asyncio.create_task(upstream.send("POST", "/", body=b"{}"))
        await asyncio.sleep(0.05)
        sending.cancel()
        async with asyncio.timeout(2):
            await closed.wait()


async def test_nobody_listens(transport) -> None:
    async with opened(transport, "http://127.0.0.1:1") as upstream:
        with pytest.raises(ConnectFailed):
            await upstream.send("GET", "/")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"hello\r\n\r\n", BackendGarbage),
        (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 0\r\n\r\n", BackendGarbage),
    ],
)
async def test_what_is_no_usable_answer(transport, answer, error) -> None:
    async with server(answering(answer)) as url, opened(transport, url) as upstream:
        with pytest.raises(error):
            await upstream.send("GET", "/")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nonly this",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nabc",
    ],
)
async def test_a_body_that_breaks_off_is_truncated(transport, answer) -> None:
    async with server(answering(answer)) as url, opened(transport, url) as upstream:
        response = await upstream.send("GET", "/")
        with pytest.raises(StreamTruncated):
            await response.read()
        await response.aclose()


async def test_broken_framing_is_noticed(transport) -> None:
    answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"
    async with server(answering(answer)) as url, opened(transport, url) as upstream:
        with pytest.raises((BackendGarbage, StreamTruncated)):
            await (await upstream.send("GET", "/")).read()


async def test_a_body_without_length_ends_with_the_connection(transport) -> None:
    answer = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nall of it"
    async with server(answering(answer)) as url, opened(transport, url) as upstream:
        response = await upstream.send("GET", "/")
        assert await response.read() == b"all of it"
        await response.aclose()


async def test_a_kept_connection_that_was_closed_is_stale(transport) -> None:
    async with server(answering(OK)) as url, opened(transport, url) as upstream:
        response = await upstream.send("GET", "/")
        await response.read()
        await response.aclose()

    async def close_on_second(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(OK)
        await request_of(reader)

    async with server(close_on_second) as url, opened(transport, url) as upstream:
        response = await upstream.send("POST", "/", body=b"{}")
        await response.read()
        await response.aclose()
        with pytest.raises(StaleConnection):
            await upstream.send("POST", "/", body=b"{}")
        response = await upstream.send("POST", "/", body=b"{}")
        assert response.status == 200
        await response.aclose()


async def test_a_limit_on_the_whole_body(transport) -> None:
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n" + b"x" * 1000
    async with server(answering(answer)) as url, opened(transport, url) as upstream:
        response = await upstream.send("GET", "/")
        with pytest.raises(BackendGarbage):
            await response.read(limit=999)
        await response.aclose()


async def test_informational_answers_are_passed_over() -> None:
    answer = b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK
    async with server(answering(answer)) as url, opened(Http1Upstream, url) as upstream:
        response = await upstream.send("GET", "/")
        assert (response.status, await response.read()) == (200, b"ok")
        assert "link" not in response.headers
        await response.aclose()


async def test_an_endless_head_is_cut() -> None:
    answer = b"HTTP/1.1 200 OK\r\n" + b"x-fill: yyyyyyyyyyyyyyyyyyyyyyyyy\r\n" * 4000
    handler = answering(answer, hold=True)
    async with server(handler) as url, opened(Http1Upstream, url) as upstream:
        with pytest.raises(BackendGarbage, match="head"):
            await upstream.send("GET", "/")


async def test_nothing_is_read_ahead_of_a_slow_taker(transport) -> None:
    sent = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await request_of(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            sent += 65536
            await writer.drain()

    async with server(handle) as url, opened(transport, url) as upstream:
        response = await upstream.send("GET", "/")
        async for _ in response.chunks():
            break
        await asyncio.sleep(0.3)
        stuck_at = sent
        await asyncio.sleep(0.3)
        assert sent == stuck_at
        # Socket buffers of both ends (up to 6 MiB on Linux) and ours, not more.
        assert sent < 16 << 20
        await response.aclose()


async def test_an_idle_connection_is_not_trusted_for_long(monkeypatch) -> None:
    connections = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await answering(OK, OK)(reader, writer)

    async with server(handle) as url, opened(Http1Upstream, url) as upstream:
        for _ in range(2):
            response = await upstream.send("GET", "/")
            await response.read()
            await response.aclose()
            [idle] = upstream._idle
            idle.idle_since -= KEEPALIVE_SECONDS
    assert connections == 2


async def test_a_header_cannot_smuggle_another_line() -> None:
    async with server(answering(OK)) as url, opened(Http1Upstream, url) as upstream:
        with pytest.raises(ValueError, match="framing"):
            await upstream.send("GET", "/", headers={"x-a": "b\r\nx-evil: 1"})


@settings(max_examples=60)
@given(st.lists(st.integers(1, 200), max_size=12), st.binary(min_size=1, max_size=300))
def test_however_the_bytes_arrive_the_body_is_the_same(cuts: list[int], body: bytes) -> None:
    answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (
        len(body),
        body,
    )

    async def run() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await request_of(reader)
            rest = answer
            for cut in cuts:
                writer.write(rest[:cut])
                await writer.drain()
                await asyncio.sleep(0)
                rest = rest[cut:]
            writer.write(rest)

        async with server(handle) as url, opened(Http1Upstream, url) as upstream:
            response = await upstream.send("GET", "/")
            assert await response.read() == body
            await response.aclose()

    asyncio.run(run())


def test_the_scheme_chooses_the_transport() -> None:
    assert isinstance(connect("http://127.0.0.1:1"), Http1Upstream)
    assert isinstance(connect("https://127.0.0.1:1"), HttpxUpstream)
    for wrong in ("ftp://x", "127.0.0.1:80", "http://", "http://x:port"):
        with pytest.raises(ConfigError):
            connect(wrong)
    assert HIGH_WATER == 65536
