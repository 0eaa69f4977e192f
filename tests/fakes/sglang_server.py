"""SGLang 0.5.23 as its clients see it, byte for byte, in each scenario.

Shapes: `entrypoints/openai/{protocol,serving_*}.py`. A stream's overload is an event in a 200.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from forebay.testing import Bench, Exchange, Scenario, ScriptedServer, adapter_context
from forebay_plugins import sglang

WORDS = ("Hello", " wörld", ' "quoted\\"', "\n", " 😀")
TEXT = "".join(WORDS)
RID = "0f3c9a6b5d2e4f718293a4b5c6d7e8f9"
USAGE = {
    "prompt_tokens": 11,
    "total_tokens": 16,
    "completion_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 4},
    "reasoning_tokens": 0,
}
#: What concerns times, with `--enable-metrics`.
META_INFO = {
    "id": RID,
    "prompt_tokens": 11,
    "e2e_latency": 0.006,
    "queue_time": 0.001,
    "forward_entry_time": 1795370187.25,
    "prefill_finished_time": 1795370187.252,
    "request_finished_ts": 1795370187.255,
}
SERVER_INFO = {
    "model_path": "google/gemma-3-270m",
    "served_model_name": "google/gemma-3-270m",
    "is_embedding": False,
    "tool_call_parser": "pythonic",
    "max_running_requests": 48,
    "enable_metrics": True,
    "enable_priority_scheduling": False,
    "schedule_low_priority_values_first": False,
    "internal_states": [{"last_gen_throughput": 0.0}],
    "version": "0.5.23",
}
_LABELS = 'model_name="google/gemma-3-270m",engine_type="unified",tp_rank="0",pp_rank="0"'
METRICS = f"""# HELP sglang:num_running_reqs The number of running requests.
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{{{_LABELS},dp_rank="0"}} 2.0
sglang:num_running_reqs{{{_LABELS},dp_rank="1"}} 3.0
# TYPE sglang:num_queue_reqs gauge
sglang:num_queue_reqs{{{_LABELS},dp_rank="0"}} 1.0
sglang:num_queue_reqs{{{_LABELS},dp_rank="1"}} 0.0
# TYPE sglang:token_usage gauge
sglang:token_usage{{{_LABELS},dp_rank="0"}} 0.25
sglang:token_usage{{{_LABELS},dp_rank="1"}} 0.75
""".encode()


def event(content: object) -> bytes:
    data = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    return b"data: " + data.encode() + b"\n\n"


class Sglang:
    """What it says to one request."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.chat = "messages" in asked
        self.model = asked["model"]
        self.n = asked.get("n", 1)
        self.times_asked = asked.get("return_meta_info", False)
        self.usage_asked = (asked.get("stream_options") or {}).get("include_usage", False)

    def chunk(self, choices: list[Any], usage: object = None) -> bytes:
        return event(
            {
                "id": RID,
                "object": "chat.completion.chunk" if self.chat else "text_completion",
                "created": 1795370187,
                "model": self.model,
                "choices": choices,
                "usage": usage,
            }
        )

    def piece(
        self, index: int, text: str | None, reason: str | None = None, role: str | None = None
    ) -> bytes:
        tail = {"logprobs": None, "finish_reason": reason, "matched_stop": None}
        if not self.chat:
            return self.chunk([{"index": index, "text": text or "", **tail}])
        said = {"role": role, "content": text, "reasoning_content": None, "tool_calls": None}
        return self.chunk([{"index": index, "delta": said, **tail}])

    def pieces(self) -> Iterator[bytes]:
        for index in range(self.n):
            if self.chat:
                yield self.piece(index, "", role="assistant")
        for word in WORDS:
            for index in range(self.n):
                yield self.piece(index, word)

    def ending(self) -> Iterator[bytes]:
        for index in range(self.n):
            yield self.piece(index, None, "length")
        if self.usage_asked:
            yield self.chunk([], USAGE)
        yield b"data: [DONE]\n\n"

    def whole(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": TEXT, "reasoning_content": None}
        said = {"message": {**message, "tool_calls": None}} if self.chat else {"text": TEXT}
        tail: dict[str, Any] = {"logprobs": None, "finish_reason": "length", "matched_stop": None}
        if self.times_asked:
            tail["meta_info"] = META_INFO
        return {
            "id": RID,
            "object": "chat.completion" if self.chat else "text_completion",
            "created": 1795370187,
            "model": self.model,
            "choices": [{"index": index, **said, **tail} for index in range(self.n)],
            "usage": USAGE,
            "metadata": {"weight_version": "default"},
        }


def error(status: int, message: str, kind: str = "BadRequestError") -> dict[str, Any]:
    return {"object": "error", "message": message, "type": kind, "param": None, "code": status}


ERRORS = {
    Scenario.BUSY: (503, "The request queue is full."),
    Scenario.BROKEN: (500, "the scheduler has died"),
    Scenario.REFUSING: (
        400,
        "The input (9000 tokens) is longer than the model's context length (4096 tokens).",
    ),
}


def get(exchange: Exchange, scenario: Scenario, info: dict[str, Any]) -> None:
    card = {"id": "google/gemma-3-270m", "object": "model", "owned_by": "sglang"}
    card |= {"root": "google/gemma-3-270m", "parent": None, "max_model_len": 4096}
    rank = {"dp_rank": 0, "num_running_reqs": 4, "num_waiting_reqs": 2, "token_usage": 0.5}
    if scenario is Scenario.BROKEN:
        exchange.answer(503, b"")
    elif exchange.path == "/health":
        exchange.answer(200, b"")
    elif exchange.path == "/v1/models":
        exchange.answer(200, {"object": "list", "data": [card]})
    elif exchange.path == "/server_info":
        exchange.answer(200, info)
    elif exchange.path == "/metrics":
        exchange.answer(200, METRICS)
    elif exchange.path == "/v1/loads?include=core":
        exchange.answer(200, {"version": "0.5.23", "loads": [rank, {**rank, "dp_rank": 1}]})
    else:
        exchange.answer(404, {"detail": "Not Found"})


async def serve(exchange: Exchange, scenario: Scenario, info: dict[str, Any] = SERVER_INFO) -> None:
    if exchange.method == "GET":
        get(exchange, scenario, info)
        return
    asked = exchange.json
    if scenario is Scenario.SILENT:
        await asyncio.Event().wait()
    elif scenario is Scenario.GARBAGE:
        exchange.answer(200, b"<html>It works!</html>", {"content-type": "text/html"})
    elif scenario is Scenario.BUSY and asked.get("stream"):
        exchange.begin()
        exchange.send(event({"error": error(*ERRORS[scenario])}))
        exchange.send(b"data: [DONE]\n\n")
    elif scenario in ERRORS:
        exchange.answer(ERRORS[scenario][0], error(*ERRORS[scenario]))
    elif asked.get("stream"):
        await stream(exchange, scenario, Sglang(asked))
    else:
        exchange.answer(200, Sglang(asked).whole())


async def stream(exchange: Exchange, scenario: Scenario, said: Sglang) -> None:
    exchange.begin("text/event-stream; charset=utf-8")
    pieces = list(said.pieces())
    if scenario is Scenario.HEALTHY:
        for piece in [*pieces, *said.ending()]:
            exchange.send(piece)
            await asyncio.sleep(0)
        return
    for piece in pieces[:3]:
        exchange.send(piece)
        await asyncio.sleep(0.005)
    while scenario is Scenario.ENDLESS:
        exchange.send(said.piece(0, " on"))
        await asyncio.sleep(0.005)
    if scenario is Scenario.CUT:
        exchange.send(pieces[3][:40])
        await asyncio.sleep(0.005)
        exchange.cut()
    elif scenario is Scenario.FAILING:
        exchange.send(event({"error": error(*ERRORS[Scenario.BROKEN], "InternalServerError")}))
        exchange.send(b"data: [DONE]\n\n")


@asynccontextmanager
async def bench(scenario: Scenario) -> AsyncIterator[Bench]:
    """The adapter in front of such a server."""

    async def script(exchange: Exchange) -> None:
        await serve(exchange, scenario)

    (kind,) = sglang.adapters()
    async with ScriptedServer(script) as server:
        url = "http://127.0.0.1:9" if scenario is Scenario.DEAD else server.url
        adapter = kind.build(kind.settings(adapter="sglang", url=url), adapter_context())
        await adapter.start()
        try:
            yield Bench(adapter, lambda: len(server.running))
        finally:
            await adapter.aclose()
