"""vLLM's own fields and LoRA adapters, from a client through the gateway to the server and back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from forebay.config import Config, Model
from forebay.testing import Exchange, ScriptedServer
from forebay_plugins import vllm

ROUTES = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
PROMPT = [2, 4906]
FIELDS = {
    "priority": -3,
    "cache_salt": "tenant-7",
    "return_token_ids": True,
    "kv_transfer_params": {"do_remote_decode": True},
}
#: What a server that only prefills says of where the blocks lie.
HANDED_OVER = {"do_remote_prefill": True, "remote_block_ids": [1, 2], "remote_host": "10.0.0.5"}
USAGE = {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}


async def serve(exchange: Exchange) -> None:
    if exchange.method == "GET":
        cards = [{"id": name, "max_model_len": 4096} for name in ("base", "sql-lora")]
        answers: dict[str, Any] = {
            "/health": {},
            "/v1/models": {"data": cards},
            "/version": {"version": "0.32.0"},
            "/openapi.json": {"paths": {route: {} for route in ROUTES}},
        }
        exchange.answer(200 if exchange.path in answers else 404, answers.get(exchange.path, {}))
        return
    asked = exchange.json
    if len(exchange.body) > 10_000:
        message = "This model's maximum context length is 4096 tokens. However, your prompt"
        error = {"message": message, "type": "BadRequestError", "param": "input_tokens"}
        exchange.answer(400, {"error": {**error, "code": 400}})
        return
    head = {"id": "chatcmpl-1", "created": 1, "model": asked["model"]}
    if not asked.get("stream"):
        message = {"role": "assistant", "content": "ab"}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "token_ids": [10, 11]}
        told = {"prompt_token_ids": PROMPT, "kv_transfer_params": HANDED_OVER}
        body = {**head, "object": "chat.completion", "choices": [choice], "usage": USAGE, **told}
        exchange.answer(200, body)
        return
    exchange.begin()
    head["object"] = "chat.completion.chunk"
    deltas = [({"role": "assistant", "content": ""}, None), ({"content": "a"}, [10])]
    for delta, ids in [*deltas, ({"content": "b"}, [11])]:
        reason = "stop" if ids == [11] else None
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "token_ids": ids}
        first = {} if ids else {"prompt_token_ids": PROMPT}
        exchange.send(event({**head, "choices": [choice], **first}))
    exchange.send(event({**head, "choices": [], "usage": USAGE}) + b"data: [DONE]\n\n")


def event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedServer]:
    async with ScriptedServer(serve) as server:
        yield server


@pytest.fixture
async def gateway(serve_gateway: Any, upstream: ScriptedServer) -> Any:
    (kind,) = vllm.adapters()
    backends = {
        "any": kind.settings(adapter="vllm", url=upstream.url),
        "one": kind.settings(adapter="vllm", url=upstream.url, model="sql-lora"),
    }
    models = {
        "base": Model(backends=["any"], policy="round_robin"),
        "sql-lora": Model(backends=["any"], policy="round_robin"),
        "sql": Model(backends=["one"], policy="round_robin"),
    }
    return await serve_gateway(Config(backends=backends, models=models))


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "base", "messages": [{"role": "user", "content": "a"}], **fields}


def sent(upstream: ScriptedServer) -> dict[str, Any]:
    posts = [one for one in upstream.exchanges if one.method == "POST"]
    found: dict[str, Any] = posts[-1].json
    return found


async def test_fields_reach_the_server_and_what_it_says_to_them_comes_back(
    gateway: Any, upstream: ScriptedServer
) -> None:
    async with gateway.client() as client:
        answer = (await client.post("/v1/chat/completions", json=chat(**FIELDS))).json()
    assert {name: sent(upstream).get(name) for name in FIELDS} == FIELDS
    assert answer["prompt_token_ids"] == PROMPT
    assert answer["choices"][0]["token_ids"] == [10, 11]
    assert answer["kv_transfer_params"] == HANDED_OVER


async def test_token_ids_come_with_the_pieces_of_a_stream(
    gateway: Any, upstream: ScriptedServer
) -> None:
    async with gateway.client() as client:
        asked = chat(stream=True, **FIELDS)
        text = (await client.post("/v1/chat/completions", json=asked)).text
    assert {name: sent(upstream).get(name) for name in FIELDS} == FIELDS
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert [one.get("prompt_token_ids") for one in chunks] == [PROMPT, None, None]
    assert [one["choices"][0]["token_ids"] for one in chunks] == [None, [10], [11]]


@pytest.mark.parametrize(("asked", "wanted"), [("sql-lora", "sql-lora"), ("sql", "sql-lora")])
async def test_a_lora_adapter_is_a_model(
    gateway: Any, upstream: ScriptedServer, asked: str, wanted: str
) -> None:
    async with gateway.client() as client:
        answer = (await client.post("/v1/chat/completions", json=chat(model=asked))).json()
    assert sent(upstream)["model"] == wanted
    assert answer["model"] == asked


async def test_a_prompt_that_is_too_long_has_the_code_that_clients_know(gateway: Any) -> None:
    async with gateway.client() as client:
        answer = await client.post("/v1/chat/completions", json=chat(user="long " * 2000))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] is None, "the server's `input_tokens` is no field that a client knows"
