"""A gateway in this process, upstreams that misbehave on cue, and a client that can walk away.

All three speak over real sockets on loopback; the upstream and the client are written against raw
asyncio streams, so that each can break HTTP and leave at any moment.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httptools
import pytest

from forebay.app import App, create_app
from forebay.config_file import build
from forebay.loader import load_plugins
from forebay.server import listener

MODELS = {"object": "list", "data": [{"id": "m", "object": "model"}]}


class Call:
    """One request as an upstream sees it, with the means to answer it well or badly."""

    def __init__(
        self, writer: asyncio.StreamWriter, body: dict[str, Any], headers: dict[str, str], age: int
    ) -> None:
        self.writer = writer
        self.body = body
        self.headers = headers
        #: Requests that this connection had carried before.
        self.age = age
        #: Set when the other side closes the connection, with the loop's time.
        self.gone = asyncio.Event()
        self.gone_at = 0.0
        #: For the test to set, when the upstream may go on.
        self.go = asyncio.Event()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def json(self, status: int, value: object, **headers: str) -> None:
        body = json.dumps(value).encode()
        lines = [f"HTTP/1.1 {status} X", "content-type: application/json"]
        lines += [f"{name.replace('_', '-')}: {text}" for name, text in headers.items()]
        lines += [f"content-length: {len(body)}", "", ""]
        await self.send("\r\n".join(lines).encode() + body)

    async def answer(self, text: str = "hello") -> None:
        """What a sound server would say, streamed or not as was asked."""
        if not self.body.get("stream"):
            await self.json(200, _completion(text))
            return
        await self.head()
        for word in text.split(" "):
            await self.token(word)
        await self.finish()
        await self.done()

    async def head(self) -> None:
        await self.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%s\r\n" % (len(data), data))

    async def event(self, value: object) -> None:
        await self.chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    async def token(self, text: str) -> None:
        await self.event(_delta({"content": text}, None))

    async def finish(self) -> None:
        await self.event(_delta({}, "stop"))

    async def done(self) -> None:
        await self.chunk(b"data: [DONE]\n\n")
        await self.send(b"0\r\n\r\n")

    def fin(self) -> None:
        """Close in good manners, wherever the answer stands."""
        self.writer.close()

    def reset(self) -> None:
        """Close as a killed process does: with RST."""
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def hang(self) -> None:
        """Say nothing until the other side gives up."""
        await self.gone.wait()


Behaviour = Callable[[Call], Awaitable[None]]


def _completion(text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "id": "c-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def _delta(delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {
        "id": "c-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
    }


class Upstream:
    """A server that answers probes well, and requests as `behaviour` does."""

    def __init__(self) -> None:
        self.behaviour: Behaviour = Call.answer
        self.calls: list[Call] = []
        self.arrived = asyncio.Event()
        self.port = 0
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Refuse connections from now on, and drop those there are."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def call(self) -> Call:
        """The next request to arrive, once it has."""
        await self.arrived.wait()
        self.arrived.clear()
        return self.calls[-1]

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._requests(reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._connections.discard(task)
            writer.close()

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        age = 0
        while not writer.is_closing():
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            lines = head.split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            call = Call(writer, json.loads(body) if body else {}, headers, age)
            if lines[0].startswith("GET"):
                await call.json(200, MODELS)
                continue
            age += 1
            self.calls.append(call)
            self.arrived.set()
            watcher = asyncio.create_task(_watch(reader, call))
            try:
                await self.behaviour(call)
            finally:
                watcher.cancel()
                await asyncio.gather(watcher, return_exceptions=True)


async def _watch(reader: asyncio.StreamReader, call: Call) -> None:
    """Nothing may come while a request is answered: an end is all that can be read."""
    with suppress(ConnectionError):
        assert await reader.read(1) == b""
    call.gone_at = asyncio.get_running_loop().time()
    call.gone.set()


class Exchange:
    """One request as a client sees it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        #: The response came to its proper end.
        self.complete = False
        self._head = False
        self._parser = httptools.HttpResponseParser(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._head = True

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.complete = True

    async def read(self) -> bool:
        data = await self.reader.read(1 << 16)
        if data:
            self._parser.feed_data(data)
        return bool(data)

    async def head(self) -> int:
        """The status, once the response has begun."""
        while not self._head and await self.read():
            pass
        return self.status

    async def events(self, count: int) -> list[str]:
        """The data of the first `count` events, once they are there."""
        while self.body.count(b"\n\n") < count and await self.read():
            pass
        return self.all_events()[:count]

    def all_events(self) -> list[str]:
        return [part.removeprefix("data: ") for part in self.body.decode().split("\n\n") if part]

    async def end(self) -> Exchange:
        """Read to the end of the response, or of the connection."""
        while not self.complete and await self.read():
            pass
        self.writer.close()
        return self

    def json(self) -> Any:
        return json.loads(self.body)

    def text(self) -> str:
        """The streamed answer's text."""
        chunks = [json.loads(data) for data in self.all_events() if data != "[DONE]"]
        return "".join(
            choice["delta"].get("content") or ""
            for chunk in chunks
            for choice in chunk.get("choices", [])
        )

    def leave(self) -> float:
        """Close the connection; the loop's time."""
        self.writer.transport.abort()
        return asyncio.get_running_loop().time()


class Gateway:
    """A running gateway over some upstreams."""

    def __init__(self, app: App, port: int) -> None:
        self.app = app
        self.port = port
        self._exchanges: list[Exchange] = []

    async def ask(
        self, *, stream: bool = False, receive_buffer: int = 0, **fields: Any
    ) -> Exchange:
        """Send a chat request and return without waiting for the answer."""
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream}
        payload = json.dumps({**body, **fields}).encode()
        raw = socket.socket()
        raw.setblocking(False)
        if receive_buffer:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=raw, limit=1 << 16)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: forebay\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
            % (len(payload), payload)
        )
        self._exchanges.append(Exchange(reader, writer))
        return self._exchanges[-1]

    def hang_up(self) -> None:
        """Close what a test has left open."""
        for exchange in self._exchanges:
            exchange.writer.transport.abort()

    async def get(self, **fields: Any) -> Exchange:
        """Send a chat request and wait for the whole answer."""
        return await (await self.ask(**fields)).end()

    def in_flight(self) -> int:
        return sum(backend.in_flight for backend in self.app.fleet.backends.values())

    async def until_idle(self) -> None:
        """All slots are given back; a test that waits here in vain fails by its timeout."""
        while self.in_flight():
            await asyncio.sleep(0.005)

    async def until(self, backend: str, state: str) -> None:
        while self.app.fleet.backends[backend].state() != state:
            await asyncio.sleep(0.005)

    def decision(self, exchange: Exchange) -> Any:
        """The record of a request whose answer has begun."""
        return self.app.decisions.get(exchange.headers["x-request-id"])


@pytest.fixture
async def upstreams() -> AsyncIterator[list[Upstream]]:
    """Two sound upstreams, `a` and `b`."""
    both = [Upstream(), Upstream()]
    for upstream in both:
        await upstream.start()
    yield both
    for upstream in both:
        await upstream.stop()


StartGateway = Callable[..., Awaitable[Gateway]]


@pytest.fixture
async def start_gateway(upstreams: list[Upstream], tmp_path: Path) -> AsyncIterator[StartGateway]:
    """Starts a gateway over both upstreams that prefers `a`, or over `a` alone."""
    running: list[tuple[Gateway, Any, asyncio.Task[None]]] = []

    async def start(
        *, alone: bool = False, backend: dict[str, Any] | None = None, **model: Any
    ) -> Gateway:
        names = ["a"] if alone else ["a", "b"]
        # Not examined: all that the upstreams hear is what the test sends.
        settings = {"adapter": "openai", "examine": False, "probe_interval": 0.2, **(backend or {})}
        tree = {
            "backends": {
                name: {**settings, "url": f"http://127.0.0.1:{upstream.port}"}
                for name, upstream in zip(names, upstreams, strict=False)
            },
            "models": {
                "m": {
                    # Turns go by weight, so the first request of a test begins at `a`.
                    "backends": {name: {"weight": 1000 if name == "a" else 1} for name in names},
                    "policy": "round_robin",
                    **model,
                }
            },
            "data_dir": str(tmp_path),
        }
        registry = load_plugins(only=["openai", "policies"])
        config = build(tree, registry, environ={}, base=tmp_path)
        app = create_app(config, registry)
        await app.start()
        bound = socket.create_server(("127.0.0.1", 0))
        server = listener(app.data_asgi, 1.0)
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        gateway = Gateway(app, bound.getsockname()[1])
        running.append((gateway, server, serving))
        for name in names:
            await gateway.until(name, "healthy")
        return gateway

    yield start
    for gateway, server, serving in running:
        gateway.hang_up()
        server.should_exit = True
        await serving
        await gateway.app.aclose()
