"""Tokens of answers whose backend does not report them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai

from forebay.api import (
    Attempt,
    BackendSettings,
    Delta,
    Event,
    Finished,
    GenerateRequest,
    Relayed,
    Started,
    ToolCallDelta,
    Usage,
)
from forebay.config import Config, Model

Script = Callable[[GenerateRequest, Attempt], AsyncIterator[Event]]
#: With what the index adds for the role, 11 tokens of four bytes.
CHAT = {
    "model": "m",
    "messages": [{"role": "user", "content": "What is the capital of France, please? "}],
}
COUNTED = {"prompt_tokens": 11, "completion_tokens": 4, "total_tokens": 15, "source": "counted"}


def config() -> Config:
    return Config(
        backends={"a": BackendSettings(adapter="scripted", probe_interval=0.2)},
        models={"m": Model(backends=["a"], policy="round_robin")},
    )


def typed(finished: Finished) -> Script:
    async def script(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        yield Started()
        yield Delta(text="Par")
        yield Delta(reasoning="hm", token_ids=(4, 5))
        yield Delta(tool_calls=(ToolCallDelta(0, "c", "f", "{}"),))
        yield Delta(finish_reason="stop")
        yield finished

    return script


def relayed(usage: Usage | None) -> Script:
    def chunk(text: str, reason: str | None) -> bytes:
        head = {"id": "theirs", "object": "chat.completion.chunk", "created": 5, "model": "m"}
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
        return b"data: " + json.dumps({**head, "choices": [choice]}).encode() + b"\n\n"

    async def script(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        if request.stream:
            yield Relayed(chunk("a", None) + chunk("b", None), events=2)
            yield Relayed(chunk("c", None))
            yield Relayed(chunk("d", "stop"))
        else:
            message = {"role": "assistant", "content": "abcd"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            yield Relayed(json.dumps({"id": "theirs", "choices": [choice], "x": 1}).encode())
        yield Finished(usage, finish_reasons=("stop",))

    return script


async def asked(gateway: Any, script: Script, **more: object) -> tuple[Any, Any]:
    """The answer's body (of a stream, its chunks) and the decision."""
    gateway.scripted["a"].script = script
    async with gateway.client() as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, **more})
    decision = gateway.app.decisions.get(response.headers["x-request-id"])
    if not more.get("stream"):
        return response.json(), decision
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events], decision


STREAM: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
SCRIPTS = {
    "typed": typed(Finished()),
    "typed, adapter counts": typed(Finished(Usage(0, 4, source="counted"))),
    "relayed": relayed(None),
    "relayed, adapter counts": relayed(Usage(0, 4, source="counted")),
}


async def test_streams(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    for script in SCRIPTS.values():
        chunks, decision = await asked(gateway, script, **STREAM)
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == COUNTED
        for field in ("id", "object", "created", "model"):
            assert len({chunk[field] for chunk in chunks}) == 1
        assert decision.outcome.usage == Usage(11, 4, source="counted")
        chunks, decision = await asked(gateway, script, stream=True)
        assert not [chunk for chunk in chunks if "usage" in chunk]
        assert decision.outcome.usage == Usage(11, 4, source="counted")


async def test_whole_answers(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    for name, script in SCRIPTS.items():
        body, decision = await asked(gateway, script)
        if name == "relayed":  # bytes of which the adapter says nothing are one event
            assert body["usage"].pop("completion_tokens") == 1
        else:
            assert body["usage"] == COUNTED
        assert decision.outcome.usage.source == "counted"
        if "relayed" in name:
            assert (body["id"], body["x"]) == ("theirs", 1)


async def test_what_is_reported_is_left(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    for more in ({}, STREAM, {"stream": True}):
        for script in (typed(Finished(Usage(7, 3))), relayed(Usage(7, 3))):
            said, decision = await asked(gateway, script, **more)
            assert decision.outcome.usage == Usage(7, 3)
            assert "counted" not in json.dumps(said)


async def test_other_dialects_clients_and_metrics(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    gateway.scripted["a"].script = typed(Finished())
    async with gateway.client() as client:
        message = await client.post("/v1/messages", json={**CHAT, "max_tokens": 9})
        text = CHAT["messages"][0]["content"]
        response = await client.post("/v1/responses", json={"model": "m", "input": text})
    figures = {"input_tokens": 11, "output_tokens": 4, "source": "counted"}
    assert figures.items() <= message.json()["usage"].items()
    assert figures.items() <= response.json()["usage"].items()
    page = gateway.app.metrics.render().decode()
    (line,) = [row for row in page.splitlines() if 'input",model="m",source="counted"' in row]
    assert line.endswith(" 22.0")
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none") as sdk:
        whole = await sdk.chat.completions.create(**CHAT)
    assert whole.usage is not None
    assert whole.usage.total_tokens == 15
