"""Adapter ``simulated``: a backend that exists only as a service model, in the gateway's process.

For tests, benchmarks and trying out policies: requests wait for a slot in order of arrival, the
uncached part of the prompt is read at one rate, tokens come at another. Failures are drawn from a
seed, so that a run can be repeated. A token is a word. The text depends on the prompt alone.
Embeddings, rerank, score and the like are answered as well: see ``simulated_operations``.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from random import Random
from time import perf_counter

from msgspec import Struct

from forebay.api import (
    Adapter,
    AdapterContext,
    AdapterKind,
    Attempt,
    BackendBusy,
    BackendFailed,
    BackendSettings,
    Capabilities,
    ConnectFailed,
    Delta,
    Event,
    Finished,
    FinishReason,
    GenerateRequest,
    Load,
    Operation,
    Result,
    Started,
    StreamTruncated,
    Timings,
    Usage,
    hookimpl,
)
from forebay_plugins import simulated_operations as operations

__all__ = ["Failures", "SimulatedAdapter", "SimulatedSettings"]

#: ``max_tokens`` of /v1/completions where none is given, by OpenAI's documentation.
COMPLETION_TOKENS = 16
#: Tokens in a block of the prefix cache.
BLOCK = 16
_WORDS = (
    "water", "turns", "the", "wheel", "and", "flows", "on", "to", "sea", "while", "a", "stone",
    "below", "keeps", "its", "place",
)  # fmt: skip


class Failures(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Shares of requests, 0 to 1, that fail in a way; they add up to 1 at most."""

    connect: float = 0.0
    """Nobody listens."""
    busy: float = 0.0
    """Refused as if the server were full."""
    error: float = 0.0
    """Fails before the first token."""
    silent: float = 0.0
    """Accepted and never answered."""
    stall: float = 0.0
    """Stops after `after` tokens without ending."""
    cut: float = 0.0
    """Breaks off after `after` tokens."""
    after: int = 3
    """Tokens before a stall or a cut."""
    probe: bool = False
    """The probe fails."""


class SimulatedSettings(BackendSettings, kw_only=True, frozen=True):
    """Settings of `adapter: simulated`."""

    slots: int = 4
    """Requests worked on at once; the others wait."""
    queue: int = 0
    """Requests that may wait before the next is refused as busy; 0: any number."""
    prefill_rate: float = 2000.0
    """Prompt tokens read a second, for each slot; 0: in no time."""
    decode_rate: float = 50.0
    """Tokens generated a second, for each slot; 0: in no time."""
    overhead: float = 0.0
    """Seconds that each request takes besides."""
    answer_tokens: int = 64
    """Length of a chat answer whose client sets no limit, and of the longest of all."""
    cache_tokens: int = 0
    """Prompt tokens that the prefix cache holds, in blocks of 16; 0: no cache."""
    failures: Failures = Failures()
    """What goes wrong, and how often."""
    seed: int = 0
    """Of the draw of failures."""
    examine: bool = False
    """As for any backend; off, so that failures are drawn for requests alone."""


class SimulatedAdapter(Adapter):
    """One simulated backend. ``failures`` may be set anew while it runs."""

    def __init__(self, settings: SimulatedSettings, context: AdapterContext) -> None:
        self._settings = settings
        self.failures = settings.failures
        self._random = Random(settings.seed)  # noqa: S311 - chance, not secrecy
        self._free = asyncio.Semaphore(settings.slots)
        self._cache = PrefixCache(settings.cache_tokens)
        #: Requests in slots, and before them.
        self.running = 0
        self.waiting = 0

    async def stream(self, request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        mishap = self._knock()
        arrived = perf_counter()
        async with self._slot():
            begun = perf_counter()
            yield Started()
            if mishap == "silent":
                await asyncio.Event().wait()
            prompt = _tokens(request)
            cached = self._cache.read(prompt)
            reading = _duration(len(prompt) - cached, self._settings.prefill_rate)
            await asyncio.sleep(self._settings.overhead + reading)
            if mishap == "error":
                raise BackendFailed("the simulated backend failed")
            prefilled = perf_counter()
            if request.echo:
                for index in range(request.choices):
                    yield Delta(index, _echoed(request.prompts[index // request.n]))
            pieces, reason = _answer(request, prompt, self._settings.answer_tokens)
            for number, piece in enumerate(pieces, 1):
                await self._step(number, mishap)
                ending = reason if number == len(pieces) else None
                for index in range(request.choices):
                    yield Delta(index, piece, ending)
            ended = perf_counter()
            yield Finished(
                Usage(
                    len(prompt),
                    len(pieces) * request.choices,
                    cached if self._settings.cache_tokens else None,
                ),
                Timings(begun - arrived, prefilled - begun, ended - prefilled, "simulated"),
            )

    async def perform(self, request: Operation, attempt: Attempt) -> Result:
        """Its text is read like a prompt that is not cached; a stall or a cut come after that."""
        mishap = self._knock()
        async with self._slot():
            if mishap == "silent":
                await asyncio.Event().wait()
            reading = _duration(operations.words(request), self._settings.prefill_rate)
            await asyncio.sleep(self._settings.overhead + reading)
            if mishap == "error":
                raise BackendFailed("the simulated backend failed")
            if mishap == "stall":
                await asyncio.Event().wait()
            if mishap == "cut":
                raise StreamTruncated("the simulated backend broke off")
            return operations.perform(request)

    def _knock(self) -> str:
        """Be let in, or not; what will go wrong later, empty if nothing does.

        :raises BackendError: nobody answers, or there is no room.
        """
        mishap = self._mishap()
        if mishap == "connect":
            raise ConnectFailed("the simulated backend does not listen")
        if mishap == "busy" or 0 < self._settings.queue <= self.waiting:
            raise BackendBusy("the simulated backend is full", retry_after=1.0)
        return mishap

    async def _step(self, number: int, mishap: str) -> None:
        """Take the time of the token with this number, counted from 1."""
        if number > self.failures.after and mishap == "stall":
            await asyncio.Event().wait()
        if number > self.failures.after and mishap == "cut":
            raise StreamTruncated("the simulated backend broke off")
        await asyncio.sleep(_duration(1, self._settings.decode_rate))

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        """A place among the running, after those who came before."""
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._free.release()

    def _mishap(self) -> str:
        """What goes wrong with this request; empty if nothing does."""
        draw = self._random.random()
        for name in ("connect", "busy", "error", "silent", "stall", "cut"):
            draw -= getattr(self.failures, name)
            if draw < 0:
                return name
        return ""

    async def probe(self) -> Capabilities:
        if self.failures.probe:
            raise ConnectFailed("the simulated backend does not listen")
        return Capabilities(
            endpoints=operations.ENDPOINTS | {"chat", "completions"},
            extra_fields=False,
            slots=self._settings.slots,
            version="1",
        )

    async def load(self) -> Load:
        return Load(
            running=self.running, waiting=self.waiting, kv_usage=self.running / self._settings.slots
        )


class PrefixCache:
    """Which prompt prefixes have been seen, block by block; the least recently used goes first."""

    def __init__(self, tokens: int) -> None:
        self._capacity = tokens // BLOCK
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def read(self, prompt: list[int]) -> int:
        """How many tokens of the prompt were there; afterwards all its whole blocks are."""
        if not self._capacity:
            return 0
        chains = [0]
        for start in range(0, len(prompt) - BLOCK + 1, BLOCK):
            chains.append(hash((chains[-1], *prompt[start : start + BLOCK])))
        hits = [chain in self._blocks for chain in chains[1:]]
        for chain in reversed(chains[1:]):  # so that the ends of prompts are forgotten first
            self._blocks[chain] = None
            self._blocks.move_to_end(chain)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)
        return BLOCK * ([*hits, False].index(False))


def _tokens(request: GenerateRequest) -> list[int]:
    """A number for each word of the prompt."""
    tokens: list[int] = []
    for prompt in (*request.prompts, *(message.text() for message in request.messages)):
        if isinstance(prompt, str):
            tokens += (zlib.crc32(word.encode()) for word in prompt.split())
        else:
            tokens += prompt
    return tokens


def _answer(
    request: GenerateRequest, prompt: list[int], longest: int
) -> tuple[list[str], FinishReason]:
    """The words of the answer, and why it ends."""
    limit = request.sampling.max_tokens
    if limit is None and request.endpoint == "completions":
        limit = COMPLETION_TOKENS
    length = longest if limit is None else min(limit, longest)
    start = zlib.crc32(repr(prompt).encode())
    words = [_WORDS[(start + number * number) % len(_WORDS)] for number in range(length)]
    pieces = words[:1] + [f" {word}" for word in words[1:]]
    text = "".join(pieces)
    ends = [at for stop in request.sampling.stop if (at := text.find(stop)) >= 0]
    if ends:
        while sum(map(len, pieces)) > min(ends):
            cut = sum(map(len, pieces)) - min(ends)
            pieces = [*pieces[:-1], pieces[-1][:-cut]] if cut < len(pieces[-1]) else pieces[:-1]
        return pieces or [""], "stop"
    return pieces or [""], "stop" if length == longest else "length"


def _echoed(prompt: str | tuple[int, ...]) -> str:
    return f"{prompt} " if isinstance(prompt, str) else ""


def _duration(tokens: int, rate: float) -> float:
    return tokens / rate if rate else 0.0


@hookimpl
def adapters() -> Iterable[AdapterKind]:
    return [
        AdapterKind(
            name="simulated",
            settings=SimulatedSettings,
            build=SimulatedAdapter,
            summary="A service model in the gateway's process, for tests and benchmarks.",
        )
    ]
