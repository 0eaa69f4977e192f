"""The contract for adapters of servers that speak a language of their own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any, ClassVar

from forebay.testing import (
    AdapterContract,
    Bench,
    Exchange,
    Scenario,
    ScriptedServer,
    adapter_context,
)
from forebay_plugins import anthropic, ollama

REFUSALS = {Scenario.BUSY: 503, Scenario.BROKEN: 500, Scenario.REFUSING: 400}


class OwnLanguage(AdapterContract):
    """A server whose streams are made of these pieces."""

    plugin: ClassVar[ModuleType]
    content_type: ClassVar[str]
    piece: ClassVar[bytes]
    begin: ClassVar[bytes] = b""
    end: ClassVar[bytes]
    failure: ClassVar[bytes]
    gets: ClassVar[dict[str, Any]]
    refusals: ClassVar[dict[Scenario, int]] = REFUSALS

    async def script(self, exchange: Exchange, scenario: Scenario) -> None:
        if exchange.method == "GET":
            broken = scenario is Scenario.BROKEN
            exchange.answer(503 if broken else 200, self.gets[exchange.path])
        elif scenario in self.refusals:
            exchange.answer(self.refusals[scenario], {"error": {"message": "no"}})
        elif scenario is Scenario.SILENT:
            await asyncio.Event().wait()
        elif scenario is Scenario.GARBAGE:
            exchange.answer(200, b"<html>", {"content-type": "text/html"})
        else:
            exchange.begin(self.content_type)
            await self.stream(exchange, scenario)

    async def stream(self, exchange: Exchange, scenario: Scenario) -> None:
        exchange.send(self.begin + self.piece)
        for _ in range(2 if scenario is Scenario.HEALTHY else 1):
            await asyncio.sleep(0.005)
            exchange.send(self.piece)
        while scenario is Scenario.ENDLESS:
            await asyncio.sleep(0.005)
            exchange.send(self.piece)
        await asyncio.sleep(0.005)
        if scenario is Scenario.HEALTHY:
            exchange.send(self.end)
        elif scenario is Scenario.FAILING:
            exchange.send(self.failure)
        elif scenario is Scenario.CUT:
            exchange.send(self.piece[:9])
            await asyncio.sleep(0.005)
            exchange.cut()

    @asynccontextmanager
    async def bench(self, scenario: Scenario) -> AsyncIterator[Bench]:
        async def script(exchange: Exchange) -> None:
            await self.script(exchange, scenario)

        (kind,) = self.plugin.adapters()
        async with ScriptedServer(script) as server:
            url = "http://127.0.0.1:9" if scenario is Scenario.DEAD else server.url
            adapter = kind.build(kind.settings(adapter=kind.name, url=url), adapter_context())
            await adapter.start()
            try:
                yield Bench(adapter, lambda: len(server.running))
            finally:
                await adapter.aclose()


def line(**content: Any) -> bytes:
    return json.dumps(content).encode() + b"\n"


class TestOllama(OwnLanguage):
    plugin: ClassVar[ModuleType] = ollama
    content_type: ClassVar[str] = "application/x-ndjson"
    # Of /api/chat and of /api/generate; neither minds the other's field.
    piece: ClassVar[bytes] = line(message={"role": "assistant", "content": "a"}, done=False)
    end: ClassVar[bytes] = line(done=True, done_reason="stop", prompt_eval_count=2, eval_count=3)
    failure: ClassVar[bytes] = line(error="out of memory")
    gets: ClassVar[dict[str, Any]] = {
        "/api/version": {"version": "0.40.0"},
        "/api/tags": {"models": [{"name": "model"}]},
    }


def named(kind: str, **content: Any) -> bytes:
    return f"event: {kind}\n".encode() + b"data: " + line(type=kind, **content) + b"\n"


class TestAnthropic(OwnLanguage):
    endpoints = ("chat",)
    plugin: ClassVar[ModuleType] = anthropic
    content_type: ClassVar[str] = "text/event-stream"
    begin: ClassVar[bytes] = named(
        "message_start", message={"usage": {"input_tokens": 2, "output_tokens": 1}}
    )
    piece: ClassVar[bytes] = named(
        "content_block_delta", index=0, delta={"type": "text_delta", "text": "a"}
    )
    end: ClassVar[bytes] = named(
        "message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 3}
    ) + named("message_stop")
    failure: ClassVar[bytes] = named(
        "error", error={"type": "api_error", "message": "out of memory"}
    )
    gets: ClassVar[dict[str, Any]] = {"/v1/models": {"data": [{"id": "model"}]}}
    refusals: ClassVar[dict[Scenario, int]] = {**REFUSALS, Scenario.BUSY: 529}
