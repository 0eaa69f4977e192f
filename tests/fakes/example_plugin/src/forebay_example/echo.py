"""Adapter ``echo``: answers with the last message, letter by letter."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from forebay.api import (
    Adapter,
    AdapterContext,
    AdapterKind,
    Attempt,
    BackendSettings,
    Capabilities,
    Delta,
    Event,
    Finished,
    GenerateRequest,
    Load,
    Started,
    Usage,
    hookimpl,
)


class EchoSettings(BackendSettings, kw_only=True, frozen=True):
    """Settings of `adapter: echo`."""

    pace: float = 0.0
    """Seconds before each letter."""


class Echo(Adapter):
    def __init__(self, settings: EchoSettings, context: AdapterContext) -> None:
        self.settings = settings
        self.running = 0

    async def stream(self, request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        self.running += 1
        try:
            yield Started()
            letters = said(request)[: request.sampling.max_tokens]
            for index in range(request.choices):
                for letter in letters:
                    await asyncio.sleep(self.settings.pace)
                    yield Delta(index, letter)
                yield Delta(index, finish_reason="stop")
            yield Finished(Usage(len(said(request)), len(letters) * request.choices))
        finally:  # also when the client leaves, which closes this generator
            self.running -= 1

    async def probe(self) -> Capabilities:
        return Capabilities(version="1")

    async def load(self) -> Load | None:
        return Load(running=self.running, waiting=0)


def said(request: GenerateRequest) -> str:
    """The last message, or the first prompt."""
    if request.messages:
        return request.messages[-1].text()
    return str(request.prompts[0])


@hookimpl
def adapters() -> Iterable[AdapterKind]:
    return [AdapterKind(name="echo", settings=EchoSettings, build=Echo, summary="says it back")]
