"""One neutral client for every engine that is compared: token ids in, arrival times out."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

import httptools

#: Seconds; sixteen answers of the slowest engine on a busy machine take a third of it.
_TIMEOUT = 300.0


class GenerationFailed(Exception):
    """The answer was an error, broke off, or had another number of tokens than asked for."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer as its client saw it; in seconds of :func:`time.perf_counter`."""

    sent: float
    #: When each piece of text came; a piece is a token, unless the server joins some.
    arrivals: list[float]
    tokens: int

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.arrivals)]


class Target(Protocol):
    """Whatever answers a prompt of token ids with exactly ``tokens`` tokens."""

    async def generate(self, prompt: list[int], tokens: int) -> Generation:
        """:raises GenerationFailed: it did not."""
        ...


@dataclass(frozen=True, slots=True)
class HttpTarget:
    """An OpenAI-compatible server; greedy, beyond the end of the text, streamed."""

    url: str
    model: str

    async def generate(self, prompt: list[int], tokens: int) -> Generation:
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        parts = urlsplit(self.url)
        exchange = _Exchange(parts.netloc, json.dumps(body).encode())
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_TIMEOUT):
                await loop.create_connection(
                    lambda: exchange, parts.hostname or "127.0.0.1", parts.port or 80
                )
                await exchange.ended.wait()
        except (OSError, TimeoutError) as error:
            raise GenerationFailed(f"{self.url}: {error or type(error).__name__}") from error
        return exchange.generation(tokens)


class _Exchange(asyncio.Protocol):
    """One request on a connection of its own. What comes is dated now and decoded afterwards."""

    def __init__(self, host: str, body: bytes) -> None:
        self._request = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode() + body
        self._parser = httptools.HttpResponseParser(self)
        self._events: list[tuple[float, bytes]] = []
        self._rest = b""
        self._sent = 0.0
        self.ended = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's derives from no class
        self._sent = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        now = time.perf_counter()
        *events, self._rest = (self._rest + body).split(b"\n\n")
        self._events += [(now, event) for event in events]

    def on_message_complete(self) -> None:
        self._transport.close()
        self.ended.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()

    def generation(self, asked: int) -> Generation:
        status = self._parser.get_status_code()
        if status != 200:
            raise GenerationFailed(f"HTTP {status}: {self._rest.decode(errors='replace')[:500]}")
        arrivals, tokens = [], 0
        for when, event in self._events:
            data = event.removeprefix(b"data:").strip()
            if not event.startswith(b"data:") or data == b"[DONE]":
                continue
            chunk: dict[str, Any] = json.loads(data)
            if "error" in chunk:
                raise GenerationFailed(f"an error in the stream: {chunk['error']}")
            if any(choice.get("text") for choice in chunk.get("choices", ())):
                arrivals.append(when)
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        if tokens != asked or not arrivals:
            raise GenerationFailed(f"{tokens} tokens in {len(arrivals)} pieces, not {asked}")
        return Generation(self._sent, arrivals, tokens)
