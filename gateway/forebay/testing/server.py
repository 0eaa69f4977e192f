"""An HTTP server for tests: it sends the very bytes it is told to, and sees its clients leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

__all__ = ["Exchange", "ScriptedServer"]


class Exchange:
    """One request, and the means to answer it."""

    def __init__(self, transport: asyncio.Transport, head: bytes, body: bytes) -> None:
        lines = head.decode("latin-1").split("\r\n")
        self.method, self.path, _ = lines[0].split(" ", 2)
        #: Lower-case names.
        self.headers = {
            name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines[1:])
        }
        self.body = body
        self._transport = transport
        self._chunked = False

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._transport.write(f"HTTP/1.1 {status} Scripted\r\n{fields}\r\n".encode())

    def answer(
        self, status: int, body: bytes | object = b"", headers: Mapping[str, str] = {}
    ) -> None:
        """A whole answer; anything but bytes is sent as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "text/plain" if isinstance(body, bytes) else "application/json"
        self.head(status, {"content-type": kind, **headers, "content-length": str(len(data))})
        self._transport.write(data)

    def begin(self, content_type: str = "text/event-stream") -> None:
        """The head of a stream, whose pieces :meth:`send` sends."""
        self._chunked = True
        self.head(200, {"content-type": content_type, "transfer-encoding": "chunked"})

    def send(self, data: bytes) -> None:
        """A piece of a stream, as one chunk of its own."""
        self._transport.write(b"%x\r\n%s\r\n" % (len(data), data))

    def cut(self) -> None:
        """Break the connection off."""
        self._transport.abort()

    def finish(self) -> None:
        if self._chunked:
            self._transport.write(b"0\r\n\r\n")


Script = Callable[[Exchange], Awaitable[None]]


class ScriptedServer:
    """HTTP/1.1 with keep-alive on a free port of 127.0.0.1; each request is answered by ``script``.

    ``script`` is called with each :class:`Exchange` and cancelled if its client leaves.
    """

    def __init__(self, script: Script) -> None:
        self.script = script
        #: All requests so far.
        self.exchanges: list[Exchange] = []
        #: Scripts that run now: requests whose clients still wait.
        self.running: set[asyncio.Task[None]] = set()
        #: What a script raised; it is raised again when the server closes.
        self.failures: list[BaseException] = []
        #: Connections that are open now.
        self.connections: set[asyncio.Transport] = set()
        self._server: asyncio.Server | None = None
        self.url = ""

    async def __aenter__(self) -> ScriptedServer:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.abort()
        await asyncio.gather(*self.running, return_exceptions=True)
        if self.failures:
            raise self.failures[0]

    async def serve(self, exchange: Exchange) -> None:
        self.exchanges.append(exchange)
        try:
            await self.script(exchange)
            exchange.finish()
        except Exception as error:  # noqa: BLE001 - kept, and raised where the test sees it
            self.failures.append(error)
            exchange.cut()


class _Connection(asyncio.Protocol):
    def __init__(self, server: ScriptedServer) -> None:
        self._server = server
        self._buffer = b""
        self._task: asyncio.Task[None] | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for the type checker
        self.transport = transport
        self._server.connections.add(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self.transport)
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        exchange = Exchange(self.transport, head, b"")
        length = int(exchange.headers.get("content-length", "0"))
        if len(rest) < length:
            return
        exchange.body, self._buffer = rest[:length], rest[length:]
        self._task = asyncio.ensure_future(self._server.serve(exchange))
        self._server.running.add(self._task)
        self._task.add_done_callback(self._server.running.discard)
