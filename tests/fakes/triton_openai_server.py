"""Triton's OpenAI frontend as its clients see it, by its source (`python/openai`, August 2026)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from forebay.testing import Bench, Exchange, Scenario, ScriptedServer, adapter_context
from forebay_plugins import triton_openai

WORDS = ("Hello", " wörld", ' "quoted\\"', "\n", " 😀")
USAGE = {"completion_tokens": 5, "prompt_tokens": 11, "total_tokens": 16}
ERRORS = {
    Scenario.BROKEN: (500, {"detail": "failed to allocate"}),
    Scenario.REFUSING: (
        422,
        {"detail": [{"type": "greater_than_equal", "loc": ["body", "max_tokens"], "input": -1}]},
    ),
}


def data(content: object) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


class Said:
    def __init__(self, asked: dict[str, Any]) -> None:
        self.asked = asked
        self.chat = "messages" in asked

    def whole(self, choices: list[Any], usage: object = None, chunk: bool = True) -> dict[str, Any]:
        kind = f"chat.completion{'.chunk' if chunk else ''}" if self.chat else "text_completion"
        return {
            "id": "cmpl-8c9f",
            "choices": choices,
            "created": 1795370187,
            "model": self.asked["model"],
            "system_fingerprint": None,
            "object": kind,
            "usage": usage,
        }

    def role(self) -> bytes:
        delta = {"content": "", "function_call": None, "role": "assistant"}
        return self.choice(delta=delta)

    def choice(self, reason: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "logprobs": None, "finish_reason": reason, **more}
        return data(self.whole([choice]))

    def call(self, arguments: str, reason: str | None = None) -> bytes:
        """A piece of a call that had to be made."""
        function = {"name": self.asked["tools"][0]["function"]["name"], "arguments": arguments}
        return self.choice(reason, delta={"tool_calls": [{"index": 0, "function": function}]})

    def piece(self, text: str, reason: str | None = None) -> bytes:
        if self.chat:
            delta = {"content": text, "function_call": None, "role": None}
            return self.choice(reason, delta=delta)
        return self.choice(reason, text=text)


async def serve(exchange: Exchange, scenario: Scenario = Scenario.HEALTHY) -> None:
    if exchange.path == "/health/ready":
        exchange.answer(400 if scenario is Scenario.BROKEN else 200)
    elif exchange.path == "/v1/models":
        card = {
            "id": "llama",
            "created": 1,
            "object": "model",
            "owned_by": "Triton Inference Server",
        }
        exchange.answer(200, {"object": "list", "data": [card]})
    elif scenario is Scenario.SILENT:
        await asyncio.Event().wait()
    elif scenario in ERRORS:
        exchange.answer(*ERRORS[scenario])
    elif scenario is Scenario.GARBAGE:
        exchange.answer(200, b"<html>It works!</html>", {"content-type": "text/html"})
    elif exchange.json.get("stream"):
        await stream(exchange, scenario)
    else:
        answer(exchange, Said(exchange.json))


def answer(exchange: Exchange, said: Said) -> None:
    if exchange.path == "/v1/embeddings":
        asked = exchange.json["input"]
        vector = {"object": "embedding", "index": 0, "embedding": [float(len(asked)), 1.0]}
        usage = {"prompt_tokens": 3, "total_tokens": 3}
        exchange.answer(200, {"object": "list", "data": [vector], "model": "m", "usage": usage})
        return
    text = "".join(WORDS)
    choice: dict[str, Any] = {"finish_reason": "stop", "index": 0, "logprobs": None}
    if said.chat:
        choice["message"] = {
            "content": text,
            "tool_calls": None,
            "role": "assistant",
            "function_call": None,
        }
    else:
        choice["text"] = text
    exchange.answer(200, said.whole([choice], USAGE, chunk=False))


async def stream(exchange: Exchange, scenario: Scenario) -> None:
    said = Said(exchange.json)
    exchange.begin("text/event-stream; charset=utf-8")
    if said.chat:
        exchange.send(said.role())
    if said.asked.get("tool_choice") == "required":
        for arguments in ('{"zone":', " 1}"):
            exchange.send(said.call(arguments))
        exchange.send(said.call("", "stop"))
        exchange.send(b"data: [DONE]\n\n")
        return
    if scenario is Scenario.HEALTHY:
        for word in WORDS[:-1]:
            exchange.send(said.piece(word))
            await asyncio.sleep(0)
        exchange.send(said.piece(WORDS[-1], "stop"))
        if (said.asked.get("stream_options") or {}).get("include_usage"):
            exchange.send(data(said.whole([], USAGE)))
        exchange.send(b"data: [DONE]\n\n")
        return
    for word in WORDS[:2]:
        exchange.send(said.piece(word))
        await asyncio.sleep(0.005)
    while scenario is Scenario.ENDLESS:
        exchange.send(said.piece(" on"))
        await asyncio.sleep(0.005)
    if scenario is Scenario.CUT:
        exchange.cut()


def adapter_for(url: str, **settings: Any) -> triton_openai.TritonOpenAIAdapter:
    made = triton_openai.TritonOpenAISettings(adapter="triton_openai", url=url, **settings)
    return triton_openai.TritonOpenAIAdapter(made, adapter_context())


@asynccontextmanager
async def bench(scenario: Scenario) -> AsyncIterator[Bench]:
    async def script(exchange: Exchange) -> None:
        await serve(exchange, scenario)

    async with ScriptedServer(script) as server:
        url = "http://127.0.0.1:9" if scenario is Scenario.DEAD else server.url
        adapter = adapter_for(url, model="llama")
        await adapter.start()
        try:
            yield Bench(adapter, lambda: len(server.running))
        finally:
            await adapter.aclose()
