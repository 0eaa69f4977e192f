"""vLLM 0.32 and llama.cpp b11434 as their clients see them, byte for byte, in each scenario.

The shapes were recorded from the real servers. Loaded by the ``fakes`` fixture.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from forebay.testing import Bench, Exchange, Scenario, ScriptedServer, adapter_context

WORDS = ("Hello", " wörld", ' "quoted\\"', "\n", " 😀")
USAGE = {"prompt_tokens": 11, "total_tokens": 16, "completion_tokens": 5}


def compact(content: object) -> bytes:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()


def event(content: object) -> bytes:
    return b"data: " + compact(content) + b"\n\n"


def delta(role: bool = False, text: str | None = None) -> dict[str, Any]:
    return {**({"role": "assistant"} if role else {}), "content": text}


class Vllm:
    """What vLLM says, as Python objects."""

    name = "vllm"
    done_after_error = True

    def __init__(self, asked: dict[str, Any]) -> None:
        self.chat = "messages" in asked
        self.model = asked["model"]
        self.n = asked.get("n", 1)
        self.usage_asked = (asked.get("stream_options") or {}).get("include_usage", False)

    def chunk(self, choices: list[Any], **more: Any) -> bytes:
        return event(
            {
                "id": "chatcmpl-abc" if self.chat else "cmpl-abc",
                "object": "chat.completion.chunk" if self.chat else "text_completion",
                "created": 1795370187,
                "model": self.model,
                "choices": choices,
                **more,
            }
        )

    def piece(self, index: int, text: str, reason: str | None = None) -> bytes:
        tail = {"logprobs": None, "finish_reason": reason}
        if not self.chat:
            choice = {"index": index, "text": text, **tail, "stop_reason": None}
            return self.chunk([{**choice, "prompt_token_ids": None, "token_ids": None}])
        if reason:
            tail["stop_reason"] = None
        return self.chunk([{"index": index, "delta": delta(text=text), **tail, "token_ids": None}])

    def pieces(self) -> Iterator[bytes]:
        if self.chat:
            for index in range(self.n):
                choice = {"index": index, "delta": delta(True, ""), "logprobs": None}
                yield self.chunk([{**choice, "finish_reason": None}], prompt_token_ids=None)
        for word in WORDS[:-1]:
            for index in range(self.n):
                yield self.piece(index, word)

    def ending(self) -> Iterator[bytes]:
        for index in range(self.n):
            yield self.piece(index, WORDS[-1], "length")
        if self.usage_asked:
            usage = {**USAGE, "completion_tokens": 5 * self.n, "total_tokens": 11 + 5 * self.n}
            metrics = {"time_to_first_token_ms": 100.0, "generation_time_ms": 300.0}
            yield self.chunk(
                [],
                usage={**usage, "prompt_tokens_details": {"cached_tokens": 4}},
                system_fingerprint="vllm-0.32.0-6fba852c",
                metrics={**metrics, "queue_time_ms": 20.0, "mean_itl_ms": 75.0},
            )
        yield b"data: [DONE]\n\n"

    def whole(self) -> dict[str, Any]:
        text = "".join(WORDS)
        said = {"message": {**delta(True, text), "refusal": None}} if self.chat else {"text": text}
        tail = {"logprobs": None, "finish_reason": "length", "stop_reason": None}
        return {
            "id": "chatcmpl-abc" if self.chat else "cmpl-abc",
            "object": "chat.completion" if self.chat else "text_completion",
            "created": 1795370187,
            "model": self.model,
            "choices": [{"index": index, **said, **tail} for index in range(self.n)],
            "service_tier": None,
            "usage": {**USAGE, "prompt_tokens_details": {"cached_tokens": 4}},
            "metrics": {
                "time_to_first_token_ms": 100.0,
                "generation_time_ms": 300.0,
                "queue_time_ms": 20.0,
            },
        }

    @staticmethod
    def error(status: int, message: str, param: str | None = None) -> dict[str, Any]:
        said = {"message": message, "type": "BadRequestError", "param": param, "code": status}
        return {"error": said}

    @staticmethod
    def get(exchange: Exchange, scenario: Scenario) -> None:
        card = {"id": "gemma-3-270m", "object": "model", "owned_by": "vllm", "max_model_len": 4096}
        if scenario is Scenario.BROKEN:
            exchange.answer(503, b"")
        elif exchange.path == "/health":
            exchange.answer(200, b"")
        elif exchange.path == "/v1/models":
            exchange.answer(200, {"object": "list", "data": [card]})
        elif exchange.path == "/version":
            exchange.answer(200, {"version": "0.32.0"})
        elif exchange.path == "/openapi.json":
            routes = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
            exchange.answer(200, {"paths": {route: {"post": {}} for route in routes}})
        elif exchange.path == "/metrics":
            exchange.answer(200, Path(__file__).with_name("vllm_metrics.txt").read_bytes())
        else:
            exchange.answer(404, {"detail": "Not Found"})

    @staticmethod
    def operate(exchange: Exchange) -> None:
        """Answer a POST that is no generation."""
        asked = exchange.json
        if exchange.path == "/tokenize":
            strings = ["<bos>", "Hello"] if asked.get("return_token_strs") else None
            said = {"count": 2, "max_model_len": 4096, "tokens": [2, 9259], "token_strs": strings}
            exchange.answer(200, said)
        elif exchange.path == "/detokenize":
            exchange.answer(200, {"prompt": "Hello" * len(asked["tokens"])})
        else:
            exchange.answer(404, {"detail": "Not Found"})


class LlamaCpp(Vllm):
    """What llama.cpp says: other order of keys, its own model name, a clock in `created`."""

    name = "llamacpp"
    done_after_error = False

    def __init__(self, asked: dict[str, Any]) -> None:
        super().__init__(asked)
        self.model = "gemma-3-270m"
        self.clock = itertools.count(1795369905)

    def chunk(self, choices: list[Any], **more: Any) -> bytes:
        return event(
            {
                "choices": choices,
                "created": next(self.clock),
                "id": "chatcmpl-QSr9Op1sAXwVpCjmIi9MGrbHyB7ifvvw",
                "model": self.model,
                "system_fingerprint": "b0-unknown",
                "object": "chat.completion.chunk" if self.chat else "text_completion",
                **more,
            }
        )

    def piece(self, index: int, text: str, reason: str | None = None) -> bytes:
        if self.chat:
            said = {"content": text} if text else {}
            return self.chunk([{"finish_reason": reason, "index": index, "delta": said}])
        return self.chunk(
            [{"text": text, "index": index, "logprobs": None, "finish_reason": reason}]
        )

    def pieces(self) -> Iterator[bytes]:
        for index in range(self.n):
            if self.chat:
                choice = {"finish_reason": None, "index": index, "delta": delta(True)}
                yield self.chunk([choice])
            for word in WORDS:
                yield self.piece(index, word)

    def ending(self) -> Iterator[bytes]:
        timings = {"cache_n": 4, "prompt_n": 7, "prompt_ms": 624.4, "predicted_ms": 463.5}
        usage = {**USAGE, "prompt_tokens_details": {"cached_tokens": 4}}
        for index in range(self.n):
            if self.chat:
                yield self.piece(index, "", "length")
                if self.usage_asked:
                    yield self.chunk([], usage=usage, timings=timings)
            else:
                choice = {"text": "", "index": index, "logprobs": None, "finish_reason": "length"}
                yield self.chunk([choice], usage=usage, timings=timings)
        yield b"data: [DONE]\n\n"

    def whole(self) -> dict[str, Any]:
        timings = {"cache_n": 4, "prompt_n": 7, "prompt_ms": 624.4, "predicted_ms": 463.5}
        return {**super().whole(), "model": self.model, "timings": timings}

    @staticmethod
    def error(status: int, message: str, param: str | None = None) -> dict[str, Any]:
        return {"error": {"code": status, "message": message, "type": "invalid_request_error"}}

    @staticmethod
    def get(exchange: Exchange, scenario: Scenario) -> None:
        if scenario is Scenario.BROKEN:
            error = {"message": "Loading model", "type": "unavailable_error", "code": 503}
            exchange.answer(503, {"error": error})
        elif exchange.path == "/health":
            exchange.answer(200, {"status": "ok"})
        elif exchange.path == "/props":
            exchange.answer(200, Path(__file__).with_name("llamacpp_props.json").read_bytes())
        elif exchange.path == "/metrics":
            exchange.answer(200, Path(__file__).with_name("llamacpp_metrics.txt").read_bytes())
        elif exchange.path == "/v1/models":
            card = {"id": "gemma-3-270m", "object": "model", "meta": {"n_ctx": 4096}}
            exchange.answer(200, {"models": [{"name": "x"}], "object": "list", "data": [card]})
        else:
            error = {"message": "File Not Found", "type": "not_found_error", "code": 404}
            exchange.answer(404, {"error": error})

    @staticmethod
    def operate(exchange: Exchange) -> None:
        """Started without `--embeddings` and `--rerank`."""
        asked = exchange.json
        if exchange.path == "/tokenize":
            ids = [2, 9259, 478] if asked.get("add_special") else [9259, 478]
            pieces: dict[int, Any] = {2: "<bos>", 9259: "Hello", 478: [240]}
            exchange.answer(200, {"tokens": [{"id": id_, "piece": pieces[id_]} for id_ in ids]})
        elif exchange.path == "/detokenize":
            exchange.answer(200, {"content": "Hello" * len(asked["tokens"])})
        elif exchange.path == "/apply-template":
            exchange.answer(200, {"prompt": f"<user>{asked['messages'][0]['content']}"})
        else:
            message = "This server does not support it. Start it with `--it`"
            error = {"code": 501, "message": message, "type": "not_supported_error"}
            exchange.answer(501, {"error": error})


async def serve(exchange: Exchange, scenario: Scenario, kind: type[Vllm]) -> None:
    if exchange.method == "GET":
        kind.get(exchange, scenario)
        return
    if not exchange.path.endswith("/completions"):
        kind.operate(exchange)
        return
    asked = exchange.json
    said = kind(asked)
    if scenario is Scenario.SILENT:
        await asyncio.Event().wait()
    elif scenario is Scenario.BUSY:
        exchange.answer(503, said.error(503, "too many requests"), {"retry-after": "2"})
    elif scenario is Scenario.BROKEN:
        exchange.answer(500, said.error(500, "engine is dead"))
    elif scenario is Scenario.REFUSING:
        exchange.answer(400, said.error(400, "max_tokens is too large", "max_tokens"))
    elif scenario is Scenario.GARBAGE:
        exchange.answer(200, b"<html>It works!</html>", {"content-type": "text/html"})
    elif not asked.get("stream"):
        exchange.answer(200, said.whole())
    else:
        await stream(exchange, scenario, said)


async def stream(exchange: Exchange, scenario: Scenario, said: Vllm) -> None:
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
        exchange.send(event(said.error(500, "the engine has died")))
        if said.done_after_error:
            exchange.send(b"data: [DONE]\n\n")


@asynccontextmanager
async def bench(kind: type[Vllm], module: Any, scenario: Scenario) -> AsyncIterator[Bench]:
    """An adapter of that plugin module in front of such a server."""

    async def script(exchange: Exchange) -> None:
        await serve(exchange, scenario, kind)

    (offered,) = module.adapters()
    async with ScriptedServer(script) as server:
        url = "http://127.0.0.1:9" if scenario is Scenario.DEAD else server.url
        settings = offered.settings(adapter=offered.name, url=url)
        adapter = offered.build(settings, adapter_context())
        await adapter.start()
        try:
            yield Bench(adapter, lambda: len(server.running))
        finally:
            await adapter.aclose()
