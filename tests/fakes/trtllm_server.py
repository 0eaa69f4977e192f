"""trtllm-serve as its clients see it, by its source (`serve/openai_server.py`, 2026)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from forebay.testing import Bench, Exchange, Scenario, ScriptedServer, adapter_context
from forebay_plugins import trtllm

WORDS = ("Hello", " wörld", ' "quoted\\"', "\n", " 😀")
USAGE = {"prompt_tokens": 11, "total_tokens": 16, "completion_tokens": 5}
GAUGES = b"""trtllm_num_requests_running{model_name="m"} 3.0
trtllm_num_requests_waiting{model_name="m"} 2.0
trtllm_kv_cache_utilization{model_name="m"} 0.5
"""
#: With `return_perf_metrics`, to those that ask for them: headers, or an event behind `[DONE]`.
METRICS = {
    "Server-Timing": "server_queue;dur=1.250000, server_ttft;dur=3.500000, server_e2e;dur=6.000000",
    "X-TRTLLM-Start-End-Time": "server-start;ts=12345.123456000, server-end;ts=12345.129456000",
}
ITERATIONS = [
    {"iter": 1, "numActiveRequests": 1, "numQueuedRequests": 0},
    {
        "iter": 2,
        "numActiveRequests": 4,
        "numQueuedRequests": 7,
        "kvCacheStats": {"usedNumBlocks": 10, "maxNumBlocks": 40, "freeNumBlocks": 30},
    },
]


def flat(message: str, status: int = 400) -> dict[str, Any]:
    kind = "BadRequestError"
    return {"object": "error", "message": message, "type": kind, "param": None, "code": status}


class Said:
    def __init__(self, asked: dict[str, Any]) -> None:
        self.chat = "messages" in asked
        self.asked = asked

    def chunk(self, choices: list[Any], blank: bytes = b"", **more: Any) -> bytes:
        content = {
            "id": "chatcmpl-1" if self.chat else "cmpl-1",
            "object": "chat.completion.chunk" if self.chat else "text_completion",
            "created": 1795370187,
            "model": self.asked["model"],
            "choices": choices,
            **more,
        }
        return b"data: " + json.dumps(content, ensure_ascii=False).encode() + blank + b"\n\n"

    def role(self) -> bytes:
        """The first event has a blank before its end."""
        return self.chunk([{"index": 0, "delta": {"role": "assistant"}}], b" ")

    def piece(self, text: str, reason: str | None = None) -> bytes:
        said: dict[str, Any] = {"delta": {"content": text, "reasoning_content": ""}}
        if not self.chat:
            said = {"text": text, "logprobs": None, "stop_reason": None}
        end = {"finish_reason": reason, "avg_decoded_tokens_per_iter": 1.0}
        return self.chunk([{"index": 0, **said, **end}])

    def whole(self) -> dict[str, Any]:
        text = "".join(WORDS)
        message = {"role": "assistant", "content": text, "tool_calls": []}
        said = {"message": message} if self.chat else {"text": text}
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion" if self.chat else "text_completion",
            "created": 1795370187,
            "model": self.asked["model"],
            "choices": [{"index": 0, **said, "finish_reason": "stop"}],
            "usage": USAGE,
        }


def get(exchange: Exchange, scenario: Scenario) -> None:
    if scenario is Scenario.BROKEN:
        exchange.answer(503, b"")
    elif exchange.path == "/health":
        exchange.answer(200, b"")
    elif exchange.path == "/v1/models":
        card = {"id": "m", "object": "model", "created": 1, "owned_by": "tensorrt_llm"}
        exchange.answer(200, {"object": "list", "data": [card]})
    elif exchange.path == "/version":
        exchange.answer(200, {"version": "1.3.0"})
    elif exchange.path == "/prometheus/metrics":
        exchange.answer(200, GAUGES)
    else:
        exchange.answer(404, {"detail": "Not Found"})


async def serve(exchange: Exchange, scenario: Scenario = Scenario.HEALTHY) -> None:
    if exchange.method == "GET":
        get(exchange, scenario)
        return
    said = Said(exchange.json)
    if scenario is Scenario.SILENT:
        await asyncio.Event().wait()
    elif scenario is Scenario.BUSY:
        error = {"message": "starting", "type": "ServiceUnavailableError", "code": "starting"}
        exchange.answer(503, {"error": error}, {"retry-after": "1"})
    elif scenario is Scenario.BROKEN:
        exchange.answer(500, flat("executor is dead", 500))
    elif scenario is Scenario.REFUSING:
        exchange.answer(400, {"error": "[{'type': 'extra_forbidden', 'loc': ('body', 'x')}]"})
    elif scenario is Scenario.GARBAGE:
        exchange.answer(200, b"<html>It works!</html>", {"content-type": "text/html"})
    elif not said.asked.get("stream"):
        exchange.answer(200, said.whole(), METRICS if wants_metrics(exchange) else {})
    else:
        await stream(exchange, scenario, said)


def wants_metrics(exchange: Exchange) -> bool:
    return exchange.headers.get("x-trtllm-return-metrics") == "1"


async def stream(exchange: Exchange, scenario: Scenario, said: Said) -> None:
    exchange.begin("text/event-stream; charset=utf-8")
    if said.chat:
        exchange.send(said.role())
    healthy = scenario is Scenario.HEALTHY
    for word in WORDS[: 4 if healthy else 2]:
        exchange.send(said.piece(word))
        await asyncio.sleep(0 if healthy else 0.005)
    if healthy:
        exchange.send(said.piece(WORDS[-1], "stop"))
        exchange.send(
            said.chunk([], usage={**USAGE, "prompt_tokens_details": {"cached_tokens": 4}})
        )
        exchange.send(b"data: [DONE]\n\n")
        if wants_metrics(exchange):
            event = b"event: trtllm.perf_metrics\ndata: " + json.dumps(METRICS).encode()
            exchange.send(event + b"\n\n")
    while scenario is Scenario.ENDLESS:
        exchange.send(said.piece(" on"))
        await asyncio.sleep(0.005)
    if scenario is Scenario.CUT:  # its one way to fail in mid-stream
        exchange.cut()


@asynccontextmanager
async def bench(scenario: Scenario) -> AsyncIterator[Bench]:
    """The adapter in front of such a server."""

    async def script(exchange: Exchange) -> None:
        await serve(exchange, scenario)

    async with ScriptedServer(script) as server:
        url = "http://127.0.0.1:9" if scenario is Scenario.DEAD else server.url
        settings = trtllm.TrtLlmSettings(adapter="trtllm", url=url)
        adapter = trtllm.TrtLlmAdapter(settings, adapter_context())
        await adapter.start()
        try:
            yield Bench(adapter, lambda: len(server.running))
        finally:
            await adapter.aclose()
