"""For authors of adapters: what a real server sent, kept, and played back however it may be cut.

An adapter reaches its server only through :class:`forebay.api.Upstream`, so that is where answers
are recorded and replayed: without sockets, thousands of times a second, which is what it takes to
try every place at which a network can cut a stream.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence

from msgspec import Struct

from forebay.api import BackendGarbage, StreamTruncated, Upstream, UpstreamResponse

__all__ = ["Recorded", "recorder", "replay"]

Connect = Callable[[str], Upstream]
#: What arrives of a body, piece by piece.
Pieces = Callable[[bytes], Iterable[bytes]]


class Recorded(Struct):
    """One answer of a server."""

    method: str
    path: str
    status: int
    headers: dict[str, str]
    body: bytes = b""


def recorder(connect: Connect, into: list[Recorded]) -> Connect:
    """A ``connect`` that keeps every answer in ``into`` as it passes."""
    return lambda url: _Recorder(connect(url), into)


def replay(
    answers: Sequence[Recorded], pieces: Pieces = lambda body: [body], *, cut: bool = False
) -> Connect:
    """A ``connect`` to a server that gives these answers again, by method and path.

    ``pieces`` says how the bodies of POSTs arrive; with ``cut`` the connection breaks behind them.
    """
    return lambda url: _Replay(answers, pieces, cut)


class _Recorder(Upstream):
    def __init__(self, inner: Upstream, into: list[Recorded]) -> None:
        self._inner = inner
        self._into = into

    async def send(
        self,
        method: str,
        path: str,
        *,
        body: bytes = b"",
        headers: Mapping[str, str] = {},
        connect_timeout: float = 1.0,
    ) -> UpstreamResponse:
        response = await self._inner.send(
            method, path, body=body, headers=headers, connect_timeout=connect_timeout
        )
        kept = Recorded(method, path, response.status, dict(response.headers))
        self._into.append(kept)
        return _Recording(response, kept)

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Recording(UpstreamResponse):
    def __init__(self, inner: UpstreamResponse, kept: Recorded) -> None:
        self._inner = inner
        self._kept = kept
        self.status = inner.status
        self.headers = inner.headers

    async def chunks(self) -> AsyncIterator[bytes]:
        async for chunk in self._inner.chunks():
            self._kept.body += chunk
            yield chunk

    async def read(self, limit: int = 64 << 20) -> bytes:
        body = await self._inner.read(limit)
        self._kept.body += body
        return body

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Replay(Upstream):
    def __init__(self, answers: Sequence[Recorded], pieces: Pieces, cut: bool) -> None:
        self._answers = answers
        self._pieces = pieces
        self._cut = cut

    async def send(
        self,
        method: str,
        path: str,
        *,
        body: bytes = b"",
        headers: Mapping[str, str] = {},
        connect_timeout: float = 1.0,
    ) -> UpstreamResponse:
        for answer in self._answers:
            if (answer.method, answer.path) == (method, path):
                posted = method == "POST"
                pieces = self._pieces if posted else lambda body: [body]
                return _Replayed(answer, pieces, self._cut and posted)
        return _Replayed(Recorded(method, path, 404, {}), self._pieces, cut=False)

    async def aclose(self) -> None:
        pass


class _Replayed(UpstreamResponse):
    def __init__(self, answer: Recorded, pieces: Pieces, cut: bool) -> None:
        self.status = answer.status
        self.headers = answer.headers
        self._pieces = pieces(answer.body)
        self._cut = cut

    async def chunks(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            if piece:
                yield piece
        if self._cut:
            raise StreamTruncated("the connection broke within the answer")

    async def read(self, limit: int = 64 << 20) -> bytes:
        body = b"".join([piece async for piece in self.chunks()])
        if len(body) > limit:
            raise BackendGarbage(f"the answer is longer than {limit} bytes")
        return body

    async def aclose(self) -> None:
        pass
