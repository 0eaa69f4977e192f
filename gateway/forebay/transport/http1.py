"""Our own HTTP/1.1 client, for the data path (RFC 9112, the part that servers of models use).

One protocol object per connection, llhttp's parser (httptools), no task and no lock per request.
The body is handed over as it arrives; beyond 64 KiB that nobody has taken, reading from the socket
stops, so a slow client slows the backend down.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping
from urllib.parse import urlsplit

import httptools

from forebay.api import (
    BackendError,
    BackendGarbage,
    ConfigError,
    ConnectFailed,
    StaleConnection,
    StreamTruncated,
    Unanswered,
    Upstream,
    UpstreamResponse,
)

# Shorter than the keep-alive of every known backend (uvicorn: 5 s), so that a pooled connection is
# rarely closed by the other side just as a request goes out on it.
KEEPALIVE_SECONDS = 3.0
# As uvicorn's own high-water mark.
HIGH_WATER = 64 << 10
MAX_HEAD = 64 << 10


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._waiter: asyncio.Future[None] | None = None
        self._lost = False
        #: The loop's time at which it became idle.
        self.idle_since = 0.0
        self._reset()

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._head: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._body: list[bytes] = []
        self._held = 0
        self._paused = False
        self._error: BackendError | None = None
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self.complete = False
        self._keep = False
        self._until_eof = False

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream transport, over TCP

    def data_received(self, data: bytes) -> None:
        if self.status == 0:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(BackendGarbage(f"{self._base} does not speak HTTP: {error}"))
        except httptools.HttpParserUpgrade:
            self._fail(BackendGarbage(f"{self._base} wants to speak another protocol"))
        if self.status == 0 and self._head_bytes > MAX_HEAD:
            self._fail(BackendGarbage(f"the head of the answer is longer than {MAX_HEAD} bytes"))
        if self._held > HIGH_WATER and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        if self._until_eof:
            self.complete = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: BackendError) -> None:
        self._error = self._error or error
        self._transport.abort()

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # 1xx: the real answer is still to come
            self._head.clear()
            return
        self.headers = {n.decode("latin-1").lower(): v.decode("latin-1") for n, v in self._head}
        self._keep = self._parser.should_keep_alive()
        self._until_eof = not (
            "content-length" in self.headers
            or "transfer-encoding" in self.headers
            or status in (204, 304)
        )
        self.status = status

    def on_body(self, body: bytes) -> None:
        self._body.append(body)
        self._held += len(body)

    def on_message_complete(self) -> None:
        if self.status:
            self.complete = True

    # What the exchange calls.

    @property
    def usable(self) -> bool:
        """Whether another request may be sent on it."""
        return not self._lost and not self._transport.is_closing()

    def begin(self, request: bytes) -> None:
        self._transport.write(request)

    async def head(self) -> bool:
        """Wait for the head; False: the connection was closed before any of it came."""
        while self.status == 0:
            if self._error is not None:
                raise self._error
            if self._lost:
                if self._head_bytes:
                    raise BackendGarbage(f"{self._base} closed the connection within the head")
                return False
            await self._wait()
        return True

    async def take(self) -> bytes:
        """What has arrived of the body; empty at its end."""
        while not self._body:
            if self._error is not None:
                raise StreamTruncated(self._error.message)
            if self.complete:
                return b""
            if self._lost:
                raise StreamTruncated(f"{self._base} closed the connection within the answer")
            await self._wait()
        data = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        self._held = 0
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        return data

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def finish(self) -> bool:
        """End the exchange; whether the connection can serve another."""
        if self.complete and self._keep and not self._body and self.usable:
            self._reset()
            return True
        self.abort()
        return False

    def abort(self) -> None:
        self._transport.abort()


class Http1Response(UpstreamResponse):
    def __init__(self, upstream: Http1Upstream, connection: _Connection) -> None:
        self._upstream = upstream
        self._connection: _Connection | None = connection
        self.status = connection.status
        self.headers = connection.headers

    async def chunks(self) -> AsyncIterator[bytes]:
        while self._connection is not None and (data := await self._connection.take()):
            yield data

    async def read(self, limit: int = 64 << 20) -> bytes:
        body = bytearray()
        while self._connection is not None and (data := await self._connection.take()):
            body += data
            if len(body) > limit:
                raise BackendGarbage(f"the answer is longer than {limit} bytes")
        return bytes(body)

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._upstream.release(connection)


class Http1Upstream(Upstream):
    """One base URL, one pool of idle connections, the most recently used first."""

    def __init__(self, base_url: str) -> None:
        parts = urlsplit(base_url)
        try:
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{base_url!r}: {error}", param="url") from error
        if not parts.hostname:
            raise ConfigError(f"{base_url!r} names no host", param="url")
        self._base = base_url
        self._host = parts.hostname
        self._port = port or 80
        self._path = parts.path.rstrip("/")
        self._host_line = (
            f"host: {parts.netloc.rpartition('@')[2]}\r\naccept-encoding: identity\r\n"
        )
        self._idle: deque[_Connection] = deque()
        self._busy: set[_Connection] = set()
        self._closed = False

    async def send(
        self,
        method: str,
        path: str,
        *,
        body: bytes = b"",
        headers: Mapping[str, str] = {},
        connect_timeout: float = 1.0,
    ) -> UpstreamResponse:
        request = self._request(method, path, headers, body)
        connection = self._take_idle()
        reused = connection is not None
        if connection is None:
            connection = await self._open(connect_timeout)
        self._busy.add(connection)
        try:
            connection.begin(request)
            if not await connection.head():
                closed = f"{self._base} closed the connection before it answered"
                raise StaleConnection(closed) if reused else Unanswered(closed)
            encoding = connection.headers.get("content-encoding", "identity")
            if encoding != "identity":
                raise BackendGarbage(
                    f"the answer is encoded as {encoding!r}, identity was asked for"
                )
        except BaseException:
            self._busy.discard(connection)
            connection.abort()
            raise
        return Http1Response(self, connection)

    def _request(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> bytes:
        lines = [f"{method} {self._path}{path} HTTP/1.1\r\n{self._host_line}"]
        for name, value in headers.items():
            if "\n" in value or "\r" in value or "\n" in name or "\r" in name or ":" in name:
                raise ValueError(f"header {name!r} would break the request's framing")
            lines.append(f"{name}: {value}\r\n")
        if body or method != "GET":
            lines.append(f"content-length: {len(body)}\r\n")
            if "content-type" not in headers:
                lines.append("content-type: application/json\r\n")
        lines.append("\r\n")
        return "".join(lines).encode("latin-1") + body

    def _take_idle(self) -> _Connection | None:
        oldest = asyncio.get_running_loop().time() - KEEPALIVE_SECONDS
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and connection.idle_since > oldest:
                return connection
            connection.abort()
        return None

    async def _open(self, timeout: float) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._base), self._host, self._port
                )
        except TimeoutError:
            raise ConnectFailed(f"cannot connect to {self._base} within {timeout:g} s") from None
        except OSError as error:
            raise ConnectFailed(f"cannot connect to {self._base}: {error.strerror}") from error
        return connection

    def release(self, connection: _Connection) -> None:
        """Take a connection back after an exchange: into the pool if it can serve another."""
        self._busy.discard(connection)
        if connection.finish() and not self._closed:
            connection.idle_since = asyncio.get_running_loop().time()
            self._idle.append(connection)
            # The oldest goes as another comes, so a burst's connections do not stay for ever.
            if not self._idle[0].usable or self._idle[0].idle_since < (
                connection.idle_since - KEEPALIVE_SECONDS
            ):
                self._idle.popleft().abort()

    async def aclose(self) -> None:
        self._closed = True
        for connection in (*self._idle, *self._busy):
            connection.abort()
        self._idle.clear()
        self._busy.clear()
        await asyncio.sleep(0)  # let the transports close their sockets
