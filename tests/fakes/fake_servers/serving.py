"""What all fake servers have in common: routes, refusals, slots, and a clock."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, ClassVar

from fake_servers.model import BOS, tokenize
from forebay.testing import Exchange, ScriptedServer

__all__ = [
    "MODEL",
    "FakeServer",
    "Refusal",
    "calls_named",
    "compact",
    "event",
    "likeness",
    "reply",
    "text_of",
    "vector",
]

MODEL = "gemma-3-270m"
#: Tokens of an answer that is not long.
_QUICK = 64


class Refusal(Exception):
    """An answer that is none; each server has its own words and form for it."""

    def __init__(self, status: int, message: str, kind: str = "", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param


def compact(content: object) -> bytes:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()


def event(content: object) -> bytes:
    return b"data: " + compact(content) + b"\n\n"


def reply(
    exchange: Exchange, status: int, content: object = b"", headers: Mapping[str, str] = {}
) -> None:
    """A whole answer: bytes as they are, anything else as the compact JSON that servers write."""
    if isinstance(content, bytes):
        exchange.answer(status, content, headers)
    else:
        kind = {"content-type": "application/json"}
        exchange.answer(status, compact(content), {**kind, **headers})


def vector(text: str, size: int = 8) -> list[float]:
    """Of length 1, and near to that of a text with the same words."""
    sums = [0.0] * size
    for word in text.lower().split():
        for place, byte in enumerate(hashlib.blake2b(word.encode(), digest_size=size).digest()):
            sums[place] += byte - 127.5
    length = math.hypot(*sums) or 1.0
    return [round(value / length, 6) for value in sums]


def likeness(one: str, other: str) -> float:
    """0 to 1: how near two texts are."""
    product = sum(a * b for a, b in zip(vector(one), vector(other), strict=True))
    return round((1 + product) / 2, 6)


Handler = Callable[[Exchange], Awaitable[None]]


class FakeServer:
    """One server. A subclass gives ``routes``: method and path, and the name of its method."""

    routes: ClassVar[Mapping[str, str]] = {}

    def __init__(self, *, context: int = 4096, slots: int = 4, pause: float = 0.002) -> None:
        self.model = MODEL
        #: Tokens of prompt and answer together.
        self.context = context
        #: Seconds from one token to the next, in long answers: others need not take time.
        self.pause = pause
        self.slots = asyncio.Semaphore(slots)
        self.running = 0
        self.waiting = 0
        self.served = 0
        self.generated = 0
        self._made = 0
        self._clock = itertools.count(1_795_370_187)
        self.server = ScriptedServer(self.script)

    @property
    def url(self) -> str:
        return self.server.url

    async def __aenter__(self) -> FakeServer:
        await self.server.__aenter__()
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.server.__aexit__(*raised)

    def now(self) -> int:
        """Seconds since 1970, of a clock that goes on by one whenever it is read."""
        return next(self._clock)

    def number(self) -> str:
        """Sixteen hexadecimal digits, never the same ones twice."""
        self._made += 1
        return hashlib.blake2b(str(self._made).encode(), digest_size=8).hexdigest()

    async def script(self, exchange: Exchange) -> None:
        path = exchange.path.partition("?")[0]
        found = self.routes.get(f"{exchange.method} {path}")
        try:
            if found is None:
                await self.elsewhere(exchange, path)
            else:
                await getattr(self, found)(exchange)
        except Refusal as refusal:
            self.refuse(exchange, refusal)

    async def elsewhere(self, exchange: Exchange, path: str) -> None:
        """FastAPI's answers to a path or method that is not served."""
        if any(route.endswith(f" {path}") for route in self.routes):
            reply(exchange, 405, {"detail": "Method Not Allowed"})
        else:
            reply(exchange, 404, {"detail": "Not Found"})

    def refuse(self, exchange: Exchange, refusal: Refusal) -> None:
        raise NotImplementedError

    def body(self, exchange: Exchange) -> dict[str, Any]:
        """
        :raises Refusal: it is no JSON object.
        """
        try:
            content = exchange.json
        except ValueError as wrong:
            raise Refusal(400, f"JSON decode error: {wrong}") from None
        if not isinstance(content, dict):
            raise Refusal(400, "Input should be a valid dictionary")
        return content

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """A place among those that are worked on; leaving gives it back."""
        self.waiting += 1
        try:
            await self.slots.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self.served += 1
            self.slots.release()

    async def tick(self, place: int) -> None:
        """The time that the token at this place takes; here a client's leaving is noticed."""
        self.generated += 1
        await asyncio.sleep(self.pause if place > _QUICK else 0)

    def chat_prompt(self, messages: list[Any]) -> tuple[int, ...]:
        """By Gemma's template, whose first token is the one that begins every prompt."""
        turns = [
            f"<start_of_turn>{message.get('role')}\n{text_of(message)}<end_of_turn>\n"
            for message in messages
        ]
        return (BOS, *tokenize("".join(turns) + "<start_of_turn>model\n"))


def text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def calls_named(messages: list[Any], name: str) -> bool:
    """A user who says «call NAME» moves a model to do it of its own accord."""
    said = text_of(messages[-1]) if messages else ""
    return bool(name) and re.search(rf"\bcall {re.escape(name)}\b", said) is not None
