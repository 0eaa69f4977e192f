"""The six forms in which backends fail in mid-stream, as clients of the gateway see them: as one.

An error event, and no ``[DONE]``; in Anthropic's dialect ``event: error``, and no ``message_stop``.
The forms were read in the servers' sources.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from typing import Any

import openai
import pytest

from forebay.api import Timeouts
from forebay.config import Config, Model
from forebay.testing import Exchange, ScriptedServer
from forebay_plugins import llamacpp, ollama, sglang, tgi, trtllm, vllm
from forebay_plugins import openai as generic

PLUGINS = {
    "vllm": vllm,
    "sglang": sglang,
    "llamacpp": llamacpp,
    "trtllm": trtllm,
    "tgi": tgi,
    "ollama": ollama,
    "openai": generic,
}


def chunk(text: str, model: str = "m") -> bytes:
    choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": None}
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": model}
    return b"data: " + json.dumps({**head, "choices": [choice]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
NESTED = b'data: {"error":{"message":"secret","type":"InternalServerError","code":500}}\n\n'
TOKEN = b'data:{"index":1,"token":{"id":7,"text":"a","logprob":-1,"special":false}}\n\n'
LINE = b'{"message":{"role":"assistant","content":"a"},"done":false}\n'
SSE = "text/event-stream"

#: What comes of the stream after its first piece: adapter, endpoint, type, bytes, how it ends.
FORMS: dict[str, tuple[str, str, str, bytes, bool]] = {
    "an event, then the end mark": ("vllm", "chat", SSE, chunk("a") + NESTED + DONE, False),
    "an event, then the end mark; SGLang": (
        "sglang",
        "chat",
        SSE,
        chunk("a") + NESTED + DONE,
        False,
    ),
    "an event, no end mark": ("llamacpp", "chat", SSE, chunk("a") + NESTED, False),
    "a connection that is cut": ("trtllm", "chat", SSE, chunk("a"), True),
    "a text for an error": (
        "tgi",
        "completions",
        SSE,
        TOKEN + b'data:{"error":"secret","error_type":"generation"}\n\n',
        False,
    ),
    "always 422, then the end mark": (
        "tgi",
        "chat",
        SSE,
        chunk("a") + b'data: {"error":{"message":"secret","http_status_code":422}}\n\n' + DONE,
        False,
    ),
    "a line of JSON": (
        "ollama",
        "chat",
        "application/x-ndjson",
        LINE + b'{"error":"secret"}\n',
        False,
    ),
    "an empty chunk": ("openai", "chat", SSE, chunk("a") + chunk("", model=""), False),
}
PROBES: dict[str, Any] = {
    "/props": {"total_slots": 1, "default_generation_settings": {"n_ctx": 512}},
    "/v1/models": {"data": [{"id": "m"}]},
    "/version": {"version": "1"},
    "/openapi.json": {"paths": {"/v1/chat/completions": {}, "/v1/completions": {}}},
    "/server_info": {"version": "0.5.23"},
    "/info": {"model_id": "m", "max_total_tokens": 512, "max_concurrent_requests": 8},
    "/api/version": {"version": "0.40.0"},
    "/api/tags": {"models": [{"name": "m"}]},
}


def failing(kind: str, body: bytes, cut: bool) -> Any:
    async def script(exchange: Exchange) -> None:
        if exchange.method == "GET":
            exchange.answer(200, PROBES.get(exchange.path, {}))
        elif exchange.path in ("/v1/rerank", "/v1/embeddings", "/tokenize"):
            exchange.answer(404, {})
        else:
            exchange.begin(kind)
            exchange.send(body)
            if cut:
                await asyncio.sleep(0.02)
                exchange.cut()

    return script


async def test_all_end_as_one(serve_gateway: Any) -> None:
    async with AsyncExitStack() as stack:
        backends = {}
        for name, (adapter, _, kind, body, cut) in FORMS.items():
            server = ScriptedServer(failing(kind, body, cut))
            url = (await stack.enter_async_context(server)).url
            (offered,) = PLUGINS[adapter].adapters()
            settings = {"load_interval": 0, "model": "m", "probe_timeout": 30.0}
            backends[name] = offered.settings(adapter=adapter, url=url, **settings)
        timeouts = Timeouts(connect=30.0)  # all of this shares one event loop
        models = {
            name: Model(backends=[name], policy="round_robin", timeouts=timeouts) for name in FORMS
        }
        gateway = await serve_gateway(Config(backends=backends, models=models), extra=PLUGINS)
        client = await stack.enter_async_context(gateway.client())
        sdk = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0)
        await stack.enter_async_context(sdk)
        for name, (_, endpoint, *_) in FORMS.items():
            messages = [{"role": "user", "content": "Hi"}]
            asked = {"messages": messages} if endpoint == "chat" else {"prompt": "Hi"}
            body = {"model": name, "stream": True, "max_tokens": 9, **asked}
            path = "/v1/chat/completions" if endpoint == "chat" else "/v1/completions"
            answer = await client.post(path, json=body)
            *events, last, end = answer.text.split("\n\n")
            assert (answer.status_code, end) == (200, ""), name
            assert json.loads(last.removeprefix("data: ")).keys() == {"error"}, name
            assert "[DONE]" not in answer.text, name
            assert "secret" not in answer.text, name
            assert [event for event in events if '"a"' in event], name
            decision = gateway.app.decisions.get(answer.headers["x-request-id"])
            assert decision.outcome.result == "truncated", name
            if endpoint == "chat":
                with pytest.raises(openai.APIError):
                    async for _ in await sdk.chat.completions.create(**body):
                        pass
                answer = await client.post("/v1/messages", json=body)
                assert answer.text.rstrip().split("\n\n")[-1].startswith("event: error"), name
                assert "message_stop" not in answer.text, name
