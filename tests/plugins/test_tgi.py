"""text-generation-inference: its errors, what a probe finds, its tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from msgspec import Raw

from forebay.api import (
    Attempt,
    BackendBusy,
    BackendFailed,
    BackendGarbage,
    BackendRefused,
    Delta,
    DetokenizeRequest,
    Load,
    Message,
    TokenizeRequest,
    Tokens,
    Unsupported,
)
from forebay.testing import Exchange, Scenario
from forebay.testing.adapter import collect


@pytest.fixture(scope="module")
def fake(load_fake: Callable[[str], ModuleType]) -> ModuleType:
    return load_fake("tgi_server")


# Errors

BUSY, REFUSES, FAILS = BackendBusy, BackendRefused, BackendFailed


@pytest.mark.parametrize(
    ("status", "kind", "text", "error"),
    [
        (429, "overloaded", "Model is overloaded", BUSY),
        (424, "generation", "Request failed during generation: CUDA", FAILS),
        (422, "validation", "Input validation error: `inputs` cannot be empty", REFUSES),
        (422, "template_error", "Template error: raised", REFUSES),
        (422, "missing_template_variable", "Missing template vatiable: x", REFUSES),
        (422, "tool_error", "Tool error: no such tool", REFUSES),
        (500, "incomplete_generation_stream", "Incomplete generation stream", FAILS),
        (500, "stream_serialization_error", "Stream serialization error", FAILS),
    ],
)
async def test_errors_by_status_by_type_and_by_text(
    fake: ModuleType, status: int, kind: str, text: str, error: type[BackendFailed]
) -> None:
    body = {"error": text, "error_type": kind}
    event = b"data:" + json.dumps(body).encode() + b"\n\n"
    said = {"error": {"message": text, "http_status_code": 422}}
    chat_event = b"data:" + json.dumps(said).encode() + b"\n\ndata: [DONE]\n\n"
    for chat, stream, script in (
        (True, False, fake.answering(status, body)),
        (True, True, fake.sending(chat_event)),
        (False, False, fake.answering(status, body)),
        (False, True, fake.sending(event)),
    ):
        async with fake.serving(script) as (adapter, _):
            with pytest.raises(error, match=text[:18]) as raised:
                await collect(adapter, fake.request_of(chat, stream=stream))
        if isinstance(raised.value, BackendRefused):
            assert raised.value.status == 422


async def test_a_wrong_key_has_no_body(fake: ModuleType) -> None:
    async with fake.serving(fake.answering(401, b"")) as (adapter, _):
        with pytest.raises(BackendFailed, match="api_key"):
            await collect(adapter, fake.request_of(False))


async def test_plain_text_of_its_framework(fake: ModuleType) -> None:
    async with fake.serving(fake.answering(422, b"Failed to deserialize the JSON body")) as (
        adapter,
        _,
    ):
        with pytest.raises(BackendRefused, match="Failed to deserialize"):
            await collect(adapter, fake.request_of(True))


@pytest.mark.parametrize(
    "event",
    [
        b"data:{}\n\n",
        b"data:nonsense\n\n",
        b'data:{"token":{"id":1,"text":"a"},"generated_text":"a"}\n\n',
        b'data:{"token":{"id":1,"text":"a"},"generated_text":"a","details":'
        b'{"finish_reason":"whim","generated_tokens":1}}\n\n',
        b"data:" + b"x" * (4 << 20) + b"x",
    ],
)
async def test_events_that_are_none_of_its_own(fake: ModuleType, event: bytes) -> None:
    async with fake.serving(fake.sending(event)) as (adapter, _):
        with pytest.raises(BackendGarbage):
            await collect(adapter, fake.request_of(False, stream=True))


async def test_what_follows_the_last_event_is_nobodys(fake: ModuleType) -> None:
    async with fake.serving(fake.sending(fake.piece(1, "a", "length"), fake.piece(2, "b"))) as (
        adapter,
        _,
    ):
        events = await collect(adapter, fake.request_of(False, stream=True))
        assert [event.text for event in events if isinstance(event, Delta)] == ["a"]


async def test_a_whole_answer_without_its_text(fake: ModuleType) -> None:
    async with fake.serving(fake.answering(200, {"details": None})) as (adapter, _):
        with pytest.raises(BackendGarbage, match="generated_text"):
            await collect(adapter, fake.request_of(False))


# Probe, load, tokens


async def test_probe_reads_the_limits(fake: ModuleType) -> None:
    async with fake.serving(fake.healthy) as (adapter, _):
        found = await adapter.probe()
    assert found.endpoints == {"chat", "completions", "tokenize"}
    assert (found.max_context, found.slots, found.version) == (4096, 128, "3.3.7")
    assert found.models == ("google/gemma-3-270m",)


async def test_load(fake: ModuleType) -> None:
    async with fake.serving(fake.healthy) as (adapter, _):
        assert await adapter.load() == Load(running=2, waiting=3, kv_usage=0.25)
    async with fake.serving(fake.answering(200, b"")) as (adapter, _):
        assert await adapter.load() == Load()


def tokenize(**fields: Any) -> TokenizeRequest:
    return TokenizeRequest(id="r", model="mine", created=1, **fields)


async def test_tokens(fake: ModuleType) -> None:
    tokens = [{"id": 2, "text": "<s>", "start": 0, "stop": 0}, {"id": 5, "text": "a"}]

    async def script(exchange: Exchange) -> None:
        if exchange.path == "/tokenize":
            exchange.answer(200, tokens)
        elif exchange.path == "/chat_tokenize":
            exchange.answer(200, {"tokenize_response": tokens, "templated_text": "<s>a"})
        else:
            await fake.serve(exchange, Scenario.HEALTHY)

    messages = [{"role": "user", "content": "a"}]
    async with fake.serving(script) as (adapter, server):
        await adapter.probe()
        of_text = await adapter.perform(tokenize(text="a"), Attempt())
        assert server.exchanges[-1].json == {"inputs": "a"}
        chat = tokenize(
            chat=(Message(role="user", content="a"),),
            add_special_tokens=False,
            fields={"tools": Raw(b"[]")},
            extra=("tools",),
        )
        of_chat = await adapter.perform(chat, Attempt())
        assert server.exchanges[-1].json == {
            "model": "tgi",
            "messages": messages,
            "tools": [],
        }
    assert of_text == of_chat == Tokens((2, 5), ("<s>", "a"), 4096)


async def test_what_it_cannot_perform(fake: ModuleType) -> None:
    async with fake.serving(fake.healthy) as (adapter, server):
        with pytest.raises(BackendRefused, match="add_special_tokens"):
            await adapter.perform(tokenize(text="a", add_special_tokens=False), Attempt())
        chat = tokenize(chat=(Message(role="user", content="a"),), add_special_tokens=True)
        with pytest.raises(BackendRefused, match="add_special_tokens"):
            await adapter.perform(chat, Attempt())
        with pytest.raises(BackendRefused, match="truncation"):
            await adapter.perform(tokenize(text="a", extra=("truncation",)), Attempt())
        detokenize = DetokenizeRequest(id="r", model="mine", created=1, tokens=(1,))
        with pytest.raises(Unsupported):
            await adapter.perform(detokenize, Attempt())
        assert not server.exchanges
