"""A load generator for OpenAI-compatible servers that costs little beside what it measures.

    python benchmarks/load.py requests http://127.0.0.1:8000 --model mock --connections 10
    python benchmarks/load.py streams http://127.0.0.1:8000 --model mock --connections 256

`requests`: closed loop, each connection sends its next request when it has the answer.
`streams`: each connection holds one stream; events are counted, and a stream is complete when
its status is 200, no event is missing and it ends in `[DONE]`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import uvloop

DONE = b"data: [DONE]"


@dataclass(frozen=True, slots=True)
class RequestResult:
    """What a closed loop saw; latencies in seconds, ascending."""

    seconds: float
    latencies: Sequence[float]
    failures: int
    #: Requests answered in all, those of the warm-up too.
    answered: int

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.latencies) / self.seconds

    def percentile(self, q: float) -> float:
        return self.latencies[min(len(self.latencies) - 1, int(q * len(self.latencies)))]


@dataclass(slots=True)
class StreamCounts:
    """Grows while streams run."""

    events: int = 0
    complete: int = 0
    failures: list[str] = field(default_factory=list)


def payload(model: str, **fields: Any) -> bytes:
    messages = [{"role": "user", "content": "Why does water run downhill? Answer in one line."}]
    return json.dumps({"model": model, "messages": messages, **fields}).encode()


def head(url: str, body: bytes) -> bytes:
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {urlsplit(url).netloc}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode() + body


async def _connect(url: str, protocol: asyncio.Protocol) -> None:
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    await asyncio.get_running_loop().create_connection(lambda: protocol, host, port)


class ClosedLoop(asyncio.Protocol):
    """Sends a request, takes the time to the end of its answer, sends the next."""

    transport: asyncio.Transport

    def __init__(self, request: bytes, latencies: list[float]) -> None:
        self._request = request
        self._latencies = latencies
        self._parser = httptools.HttpResponseParser(self)
        self._sent = 0.0
        self.running = True
        self.failures = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's derives from no class
        self._send()

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        if not self.running:
            return
        self._latencies.append(time.perf_counter() - self._sent)
        self.failures += self._parser.get_status_code() != 200
        self._parser = httptools.HttpResponseParser(self)
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        self.failures += self.running


async def run_requests(url: str, model: str, connections: int, seconds: float) -> RequestResult:
    """Load `url` from `connections` closed loops; the first fifth of the time is warm-up."""
    request = head(url, payload(model, max_tokens=5))
    latencies: list[float] = []
    loops = [ClosedLoop(request, latencies) for _ in range(connections)]
    await asyncio.gather(*(_connect(url, loop) for loop in loops))
    await asyncio.sleep(seconds / 5)
    warm_up = len(latencies)
    latencies.clear()
    started = time.perf_counter()
    await asyncio.sleep(seconds)
    elapsed, measured = time.perf_counter() - started, sorted(latencies)
    for loop in loops:
        loop.running = False
        loop.transport.close()
    failures = sum(loop.failures for loop in loops)
    return RequestResult(elapsed, measured, failures, warm_up + len(measured))


class Stream(asyncio.Protocol):
    """One streamed request; `done` is set when its connection has no more to say."""

    transport: asyncio.Transport

    def __init__(self, request: bytes, expected: int, counts: StreamCounts) -> None:
        self._request = request
        self._expected = expected
        self._counts = counts
        self._parser = httptools.HttpResponseParser(self)
        self._events = 0
        self._tail = b""
        self.done = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's derives from no class
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        # A read may end between the two line feeds: the tail's last byte joins the count.
        events = (self._tail[-1:] + body).count(b"\n\n")
        self._events += events
        self._counts.events += events
        self._tail = (self._tail + body)[-64:]

    def on_message_complete(self) -> None:
        self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish()

    def _finish(self) -> None:
        if self.done.is_set():
            return
        self.done.set()
        self.transport.close()
        status = self._parser.get_status_code()
        if status == 200 and self._events >= self._expected and DONE in self._tail:
            self._counts.complete += 1
        else:
            self._counts.failures.append(
                f"status {status}, {self._events} of {self._expected} events, tail {self._tail!r}"
            )


async def run_streams(
    url: str, model: str, connections: int, tokens: int, counts: StreamCounts
) -> None:
    """Hold `connections` streams of `tokens` tokens each until all have ended."""
    request = head(url, payload(model, max_tokens=tokens, stream=True))
    # tokens and the chunk with the finish reason; the role chunk may be merged into the first.
    streams = [Stream(request, tokens + 1, counts) for _ in range(connections)]
    for stream in streams:
        await _connect(url, stream)
    await asyncio.gather(*(stream.done.wait() for stream in streams))


async def _streams_command(url: str, model: str, connections: int, tokens: int) -> None:
    counts = StreamCounts()
    started = time.perf_counter()
    await run_streams(url, model, connections, tokens, counts)
    seconds = time.perf_counter() - started
    print(
        f"{counts.complete} of {connections} streams complete, {counts.events} events"
        f" in {seconds:.1f} s ({counts.events / seconds:.0f} events/s)"
    )
    for failure in counts.failures[:5]:
        print("incomplete:", failure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kind", choices=["requests", "streams"])
    parser.add_argument("url")
    parser.add_argument("--model", default="mock")
    parser.add_argument("--connections", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a closed loop")
    parser.add_argument("--tokens", type=int, default=200, help="of a stream")
    o = parser.parse_args()
    if o.kind == "streams":
        uvloop.run(_streams_command(o.url, o.model, o.connections, o.tokens))
        return
    result = uvloop.run(run_requests(o.url, o.model, o.connections, o.seconds))
    print(
        f"{result.rate:.0f} requests/s, p50 {result.percentile(0.5) * 1e3:.2f} ms,"
        f" p99 {result.percentile(0.99) * 1e3:.2f} ms, {result.failures} failures"
    )


if __name__ == "__main__":
    main()
