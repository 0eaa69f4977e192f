"""text-generation-inference 3.3.7 as its clients see it, byte for byte, in each scenario.

Shapes: the router's `lib.rs` and `server.rs`; axum writes events without a space after `data:`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from forebay.api import Adapter, GenerateRequest, Identity
from forebay.config import Limits
from forebay.http.decode import decode_chat, decode_completion
from forebay.http.reply import Arrival
from forebay.testing import Bench, Exchange, Scenario, ScriptedServer, adapter_context
from forebay.testing.adapter import collect
from forebay_plugins import tgi

WORDS = ("Hello", " wörld", ' "quoted\\"', "\n", " 😀")
TEXT = "".join(WORDS)
PROMPT_TOKENS = 11
INFO = {
    "model_id": "google/gemma-3-270m",
    "model_sha": None,
    "model_pipeline_tag": "text-generation",
    "max_concurrent_requests": 128,
    "max_best_of": 2,
    "max_stop_sequences": 4,
    "max_input_tokens": 4095,
    "max_total_tokens": 4096,
    "validation_workers": 2,
    "max_client_batch_size": 4,
    "router": "text-generation-router",
    "version": "3.3.7",
    "sha": None,
    "docker_label": None,
}
METRICS = b"""# TYPE tgi_request_count counter
tgi_request_count 7
# TYPE tgi_queue_size gauge
tgi_queue_size 3
# TYPE tgi_batch_current_size gauge
tgi_batch_current_size 2
# TYPE tgi_batch_current_max_tokens gauge
tgi_batch_current_max_tokens 1024
# TYPE tgi_batch_max_total_tokens gauge
tgi_batch_max_total_tokens 4096
# TYPE tgi_queue_size_other gauge
tgi_queue_size_other 99
"""
#: Of an answer that does not stream.
HEADERS = {
    "x-compute-type": "gpu+optimized",
    "x-compute-time": "0.45",
    "x-prompt-tokens": str(PROMPT_TOKENS),
    "x-generated-tokens": "5",
    "x-total-time": "450",
    "x-validation-time": "1",
    "x-queue-time": "20",
    "x-inference-time": "429",
    "x-time-per-token": "85",
}


def event(content: object) -> bytes:
    data = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    return b"data:" + data.encode() + b"\n\n"


def token(index: int, text: str, special: bool = False) -> dict[str, Any]:
    return {"id": 100 + index, "text": text, "logprob": -index / 4, "special": special}


def piece(
    index: int,
    text: str,
    reason: str | None = None,
    full: str = TEXT,
    special: bool = False,
    top: int = 0,
) -> bytes:
    """An event of `/generate_stream`; the last one if it has a reason."""
    details = {
        "finish_reason": reason,
        "generated_tokens": index,
        "seed": None,
        "input_length": PROMPT_TOKENS,
    }
    likeliest = [token(index + place, text + "?" * place) for place in range(top)]
    return event(
        {
            "index": index,
            "token": token(index, text, special),
            **({"top_tokens": likeliest} if top else {}),
            "generated_text": full if reason else None,
            "details": details if reason else None,
        }
    )


def pieces() -> Iterator[bytes]:
    for index, word in enumerate(WORDS, 1):
        yield piece(index, word, "length" if index == len(WORDS) else None)


_clock = itertools.count(1795369905)


def chunk(choices: list[Any], usage: dict[str, int] | None = None) -> bytes:
    """A chunk of `/v1/chat/completions`: its id is empty, and `created` the clock's."""
    return event(
        {
            "object": "chat.completion.chunk",
            "id": "",
            "created": next(_clock),
            "model": "tgi",
            "system_fingerprint": "3.3.7-native",
            "choices": choices,
            "usage": usage,
        }
    )


def chat_piece(text: str, reason: str | None = None) -> bytes:
    said = {"role": "assistant", "content": text}
    return chunk([{"index": 0, "delta": said, "logprobs": None, "finish_reason": reason}])


def call_piece(name: str | None, arguments: str, reason: str | None = None) -> bytes:
    """A piece of a tool call: it repeats role, id and type."""
    function = {"name": name, "arguments": arguments}
    call = {"index": 0, "id": "0", "type": "function", "function": function}
    said = {"role": "assistant", "tool_calls": [call]}
    return chunk([{"index": 0, "delta": said, "logprobs": None, "finish_reason": reason}])


def chat_ending(generated: int = 5) -> Iterator[bytes]:
    usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": generated}
    yield chunk([], {**usage, "total_tokens": PROMPT_TOKENS + generated})
    yield b"data: [DONE]\n\n"


def chat_pieces() -> Iterator[bytes]:
    for word in WORDS[:-1]:
        yield chat_piece(word)
    yield chat_piece(WORDS[-1], "length")
    yield from chat_ending()


def chat_whole(**choice: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": TEXT}
    usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": 5, "total_tokens": 16}
    said = {"index": 0, "message": message, "logprobs": None, "finish_reason": "length", **choice}
    return {
        "object": "chat.completion",
        "id": "",
        "created": next(_clock),
        "model": "tgi",
        "system_fingerprint": "3.3.7-native",
        "choices": [said],
        "usage": usage,
    }


def whole(reason: str = "length") -> dict[str, Any]:
    tokens = [token(index, word) for index, word in enumerate(WORDS, 1)]
    details = {"finish_reason": reason, "generated_tokens": 5, "seed": None, "prefill": []}
    return {"generated_text": TEXT, "details": {**details, "tokens": tokens}}


ERRORS = {
    Scenario.BUSY: (429, "Model is overloaded", "overloaded"),
    Scenario.BROKEN: (424, "Request failed during generation: Server error: CUDA", "generation"),
    Scenario.REFUSING: (422, "Input validation error: `inputs` is too long", "validation"),
}


def get(exchange: Exchange, scenario: Scenario) -> None:
    if scenario is Scenario.BROKEN:
        exchange.answer(503, {"error": "unhealthy", "error_type": "healthcheck"})
    elif exchange.path == "/health":
        exchange.answer(200, b"")
    elif exchange.path == "/info":
        exchange.answer(200, INFO)
    elif exchange.path == "/metrics":
        exchange.answer(200, METRICS)
    else:
        exchange.answer(404, b"")


async def serve(exchange: Exchange, scenario: Scenario) -> None:
    if exchange.method == "GET":
        get(exchange, scenario)
        return
    chat = exchange.path == "/v1/chat/completions"
    streams = exchange.json.get("stream") if chat else exchange.path == "/generate_stream"
    if scenario is Scenario.SILENT:
        await asyncio.Event().wait()
    elif scenario is Scenario.GARBAGE:
        exchange.answer(200, b"<html>It works!</html>", {"content-type": "text/html"})
    elif streams:
        await stream(exchange, scenario, chat)
    elif scenario in ERRORS:
        status, text, kind = ERRORS[scenario]
        exchange.answer(status, {"error": text, "error_type": kind})
    else:
        exchange.answer(200, chat_whole() if chat else whole(), HEADERS)


def fail(exchange: Exchange, text: str, kind: str, chat: bool) -> None:
    """An error in a stream: with its type, or always 422."""
    if chat:
        exchange.send(event({"error": {"message": text, "http_status_code": 422}}))
        exchange.send(b"data: [DONE]\n\n")
    else:
        exchange.send(event({"error": text, "error_type": kind}))


async def stream(exchange: Exchange, scenario: Scenario, chat: bool) -> None:
    exchange.begin()
    if scenario in ERRORS:
        fail(exchange, *ERRORS[scenario][1:], chat)
        return
    sent = list(chat_pieces() if chat else pieces())
    if scenario is Scenario.HEALTHY:
        for each in sent:
            exchange.send(each)
            await asyncio.sleep(0)
        return
    for each in sent[:2]:
        exchange.send(b":\n\n" + each)
        await asyncio.sleep(0.005)
    for index in itertools.count(3) if scenario is Scenario.ENDLESS else ():
        exchange.send(chat_piece(" on") if chat else piece(index, " on"))
        await asyncio.sleep(0.005)
    if scenario is Scenario.CUT:
        exchange.send(sent[2][:40])
        await asyncio.sleep(0.005)
        exchange.cut()
    elif scenario is Scenario.FAILING:
        fail(exchange, *ERRORS[Scenario.BROKEN][1:], chat)


def request_of(chat: bool, **fields: Any) -> GenerateRequest:
    """As the gateway decodes it."""
    asked: dict[str, Any] = {"model": "mine", **fields}
    if chat:
        asked.setdefault("messages", [{"role": "user", "content": "Hi"}])
    else:
        asked.setdefault("prompt", "Once")
    arrival = Arrival(
        body=json.dumps(asked).encode(),
        request_id="forebay-1",
        created=1,
        identity=Identity(),
        headers={},
        parameters={},
    )
    request, _ = (decode_chat if chat else decode_completion)(arrival, Limits())
    assert isinstance(request, GenerateRequest)
    return request


@asynccontextmanager
async def serving(script: Any, **settings: Any) -> AsyncIterator[tuple[Adapter, ScriptedServer]]:
    (kind,) = tgi.adapters()
    async with ScriptedServer(script) as server:
        made = kind.settings(**{"adapter": "tgi", "url": server.url, **settings})
        adapter = kind.build(made, adapter_context())
        await adapter.start()
        try:
            yield adapter, server
        finally:
            await adapter.aclose()


async def healthy(exchange: Exchange) -> None:
    await serve(exchange, Scenario.HEALTHY)


def sending(*events: bytes) -> Any:
    async def script(exchange: Exchange) -> None:
        exchange.begin()
        for event in events:
            exchange.send(event)

    return script


def answering(status: int, body: object, **headers: str) -> Any:
    async def script(exchange: Exchange) -> None:
        exchange.answer(status, body, {name.replace("_", "-"): v for name, v in headers.items()})

    return script


async def sent(chat: bool, probed: bool = True, **fields: Any) -> Exchange:
    """What the server gets for this request."""
    async with serving(healthy) as (adapter, server):
        if probed:
            await adapter.probe()
        await collect(adapter, request_of(chat, **fields))
        return server.exchanges[-1]


@asynccontextmanager
async def bench(scenario: Scenario) -> AsyncIterator[Bench]:
    """The adapter in front of such a server."""

    async def script(exchange: Exchange) -> None:
        await serve(exchange, scenario)

    settings = {"url": "http://127.0.0.1:9"} if scenario is Scenario.DEAD else {}
    async with serving(script, **settings) as (adapter, server):
        yield Bench(adapter, lambda: len(server.running))
