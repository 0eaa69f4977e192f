"""Both translated dialects over a real OpenAI-shaped adapter, and the bytes its server is sent."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import anthropic
import openai
import pytest

from forebay.config import Config, Model
from forebay.testing import Exchange, ScriptedServer
from forebay_plugins import openai as adapter

#: What nobody said, sent all the same.
NEUTRAL = {
    "temperature": 1.0,
    "top_p": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}
FUNCTION = {"name": "weather", "parameters": {"type": "object"}}


def chunk(delta: dict | None, finish: str | None = None, **more: object) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "up"}
    return b"data: " + json.dumps({**head, "choices": choices, **more}).encode() + b"\n\n"


async def serve(exchange: Exchange) -> None:
    """Reasons, speaks and calls a tool; a whole answer says the same."""
    usage = {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}
    if exchange.method == "GET":
        exchange.answer(200, {"object": "list", "data": [{"id": "up", "object": "model"}]})
        return
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    if not exchange.json.get("stream"):
        message = {"role": "assistant", "reasoning_content": "hm", "content": "I look."}
        message["tool_calls"] = [call]
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
        body = {"id": "c", "object": "chat.completion", "created": 1, "model": "up"}
        exchange.answer(200, {**body, "choices": [choice], "usage": usage})
        return
    exchange.begin()
    exchange.send(chunk({"role": "assistant", "content": ""}))
    exchange.send(chunk({"reasoning_content": "hm"}))
    exchange.send(chunk({"content": "I "}) + chunk({"content": "look."}))
    exchange.send(chunk({"tool_calls": [{"index": 0, **call}]}))
    exchange.send(chunk({}, "tool_calls"))
    exchange.send(chunk(None, usage=usage) + b"data: [DONE]\n\n")


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedServer]:
    async with ScriptedServer(serve) as server:
        yield server


def config(server: ScriptedServer) -> Config:
    (kind,) = adapter.adapters()
    settings = kind.settings(adapter="openai", url=server.url, model="up", tools=True)
    return Config(
        backends={"a": settings}, models={"m": Model(backends=["a"], policy="round_robin")}
    )


async def test_anthropic_over_an_openai_shaped_server(serve_gateway, upstream) -> None:
    gateway = await serve_gateway(config(upstream))
    ask = {
        "model": "m",
        "max_tokens": 10,
        "messages": [{"role": "user", "content": "Weather?"}],
        "tools": [{"name": "weather", "input_schema": FUNCTION["parameters"]}],
    }
    url = gateway.url
    async with anthropic.AsyncAnthropic(base_url=url, api_key="x", max_retries=0) as client:
        whole = await client.messages.create(**ask)
        async with client.messages.stream(**ask) as stream:
            streamed = await stream.get_final_message()
    for message in (whole, streamed):
        assert message.model == "m"
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
        assert (message.content[1].text, message.content[2].id) == ("I look.", "c1")
        assert message.stop_reason == "tool_use"
        assert (message.usage.input_tokens, message.usage.output_tokens) == (9, 5)
    sent = upstream.exchanges[-1].json
    assert sent == {
        "model": "up",
        "messages": ask["messages"],
        "max_tokens": 10,
        "tools": [{"type": "function", "function": FUNCTION}],
        "stream": True,
        "stream_options": {"include_usage": True},
        **NEUTRAL,
    }


async def test_responses_over_an_openai_shaped_server(serve_gateway, upstream) -> None:
    gateway = await serve_gateway(config(upstream))
    ask = {"model": "m", "input": "Weather?", "tools": [{"type": "function", **FUNCTION}]}
    url = f"{gateway.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
        whole = await client.responses.create(**ask)
        async with client.responses.stream(**ask) as stream:
            streamed = await stream.get_final_response()
    for response in (whole, streamed):
        assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
        assert (response.output_text, response.output[2].call_id) == ("I look.", "c1")
        assert (response.status, response.usage.total_tokens) == ("completed", 14)
    sent = upstream.exchanges[-1].json
    assert sent == {
        "model": "up",
        "messages": [{"role": "user", "content": "Weather?"}],
        "tools": [{"type": "function", "function": FUNCTION}],
        "stream": True,
        "stream_options": {"include_usage": True},
        **NEUTRAL,
    }
