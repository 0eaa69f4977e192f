"""What Triton's OpenAI frontend is asked, and what its refusals mean."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from msgspec import Raw

from forebay.api import (
    Attempt,
    BackendBusy,
    BackendError,
    BackendFailed,
    BackendRefused,
    Delta,
    Embeddings,
    EmbedRequest,
    Event,
    GenerateRequest,
    Sampling,
    StreamTruncated,
    Usage,
)
from forebay.testing import Exchange, ScriptedServer, chat_request
from forebay.testing.adapter import collect
from forebay.testing.answer import read_answer

TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    path = Path(__file__).parents[1] / "fakes" / "triton_openai_server.py"
    spec = spec_from_file_location("triton_openai_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@asynccontextmanager
async def serving(fake: ModuleType, script: Any = None, **settings: Any) -> AsyncIterator[Any]:
    async with ScriptedServer(script or fake.serve) as server:
        adapter = fake.adapter_for(server.url, model="llama", **settings)
        try:
            yield adapter, server
        finally:
            await adapter.aclose()


def with_fields(request: GenerateRequest, **fields: object) -> GenerateRequest:
    raw = {name: Raw(msgspec.json.encode(value)) for name, value in fields.items()}
    return msgspec.structs.replace(request, fields={**request.fields, **raw})


async def sent(fake: ModuleType, request: GenerateRequest, **settings: Any) -> dict[str, Any]:
    async with serving(fake, **settings) as (adapter, server):
        await collect(adapter, request)
    body: dict[str, Any] = server.exchanges[-1].json
    return body


async def test_only_what_is_heeded_is_sent(fake: ModuleType) -> None:
    request = with_fields(
        chat_request(stream=False),
        n=1,
        logit_bias={},
        response_format={"type": "text"},
        store=True,
        seed=None,
        ignore_eos=True,
    )
    body = await sent(fake, request, vllm=True)
    assert body == {
        "model": "llama",
        "stream": False,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 16,
        "ignore_eos": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
    }


async def test_its_own_limit_of_16_is_replaced(fake: ModuleType) -> None:
    chat = await sent(fake, chat_request(max_tokens=None))
    assert chat["max_completion_tokens"] == 1024
    completion = await sent(fake, chat_request(endpoint="completions", max_tokens=None))
    assert completion["max_tokens"] == 16


async def test_a_chat_that_asks_for_no_others_gets_logprobs_of_the_chosen_tokens(
    fake: ModuleType,
) -> None:
    alone = await sent(fake, with_fields(chat_request(), logprobs=True), vllm=True)
    assert alone["top_logprobs"] == 0
    three = with_fields(chat_request(), logprobs=True, top_logprobs=3)
    assert (await sent(fake, three, vllm=True))["top_logprobs"] == 3
    assert "top_logprobs" not in await sent(fake, chat_request())


async def test_a_developer_is_the_system(fake: ModuleType) -> None:
    turns = [{"role": "developer", "content": "Be brief"}, {"role": "user", "content": "Hello"}]
    body = await sent(fake, with_fields(chat_request(), messages=turns))
    assert body["messages"] == [{"role": "system", "content": "Be brief"}, turns[1]]


async def test_a_function_without_parameters_has_none(fake: ModuleType) -> None:
    tools = [{"type": "function", "function": {"name": "now"}}]
    request = with_fields(chat_request(), tools=tools, tool_choice="required")
    body = await sent(fake, msgspec.structs.replace(request, needs_tools=True))
    assert body["tools"][0]["function"]["parameters"] == {"type": "object", "properties": {}}


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize(
    ("limit", "stream", "vllm", "reason"),
    [
        (5, False, False, "length"),
        (6, False, False, "stop"),
        (5, True, True, "length"),
        (6, True, True, "stop"),
        (5, True, False, "stop"),
    ],
)
async def test_an_answer_of_as_many_tokens_as_were_allowed_was_cut(
    fake: ModuleType, endpoint: Any, typed: bool, limit: int, stream: bool, vllm: bool, reason: str
) -> None:
    request = chat_request(endpoint=endpoint, stream=stream, max_tokens=limit)
    request = msgspec.structs.replace(request, typed=typed)
    async with serving(fake, vllm=vllm) as (adapter, _):
        answer = read_answer(request, await collect(adapter, request))
    assert answer.finishes == {0: reason}


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize(
    ("detail", "error"),
    [
        ("The prompt is longer than the maximum model length of 8", BackendRefused),
        ("CUDA", StreamTruncated),
    ],
)
async def test_why_a_stream_broke_off_at_once_is_asked(
    fake: ModuleType, endpoint: Any, detail: str, error: type[BackendError]
) -> None:
    """The server has begun a stream before it hears that the prompt is too long."""

    async def script(exchange: Exchange) -> None:
        if not exchange.json.get("stream"):
            exchange.answer(500, {"detail": detail})
            return
        exchange.begin("text/event-stream; charset=utf-8")
        if endpoint == "chat":
            exchange.send(fake.Said(exchange.json).role())
        exchange.cut()

    async with serving(fake, script) as (adapter, server):
        events: list[Event] = []
        with pytest.raises(error) as raised:
            await collect(adapter, chat_request(endpoint=endpoint), events)
    assert raised.type is error
    assert not events
    asked = server.exchanges[-1].json
    assert (asked["max_tokens"], asked.get("stream"), len(server.exchanges)) == (1, None, 2)


async def test_a_call_that_is_forced_has_one_name_and_one_id(fake: ModuleType) -> None:
    """The server names the function in each chunk, which openai-python would join."""
    request = with_fields(chat_request(), tools=[TOOL], tool_choice="required")
    request = msgspec.structs.replace(request, needs_tools=True)
    async with serving(fake, tools=True) as (adapter, _):
        pieces = [
            piece
            async for event in adapter.stream(request, Attempt())
            if isinstance(event, Delta)
            for piece in event.tool_calls
        ]
    assert [piece.name for piece in pieces if piece.name] == ["now"]
    assert len([piece.id for piece in pieces if piece.id]) == 1
    assert "".join(piece.arguments for piece in pieces) == '{"zone": 1}'


async def test_logprobs_of_the_chosen_token_alone_need_one_beside_it(fake: ModuleType) -> None:
    request = with_fields(chat_request(endpoint="completions"), logprobs=0)
    request = msgspec.structs.replace(request, sampling=Sampling(logprobs=0, max_tokens=16))
    assert (await sent(fake, request))["logprobs"] == 1


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (with_fields(chat_request(), top_k=1), "top_k"),
        (with_fields(chat_request(), ignore_eos=True), "ignore_eos"),
        (with_fields(chat_request(), min_tokens=3), "min_tokens"),
        (with_fields(chat_request(), logit_bias={"1": 2}), "logit_bias"),
        (chat_request(n=2), "n"),
        (
            msgspec.structs.replace(chat_request(), needs_schema=True),
            "response_format",
        ),
        (
            msgspec.structs.replace(chat_request(endpoint="completions"), prompts=("a", "b")),
            "prompt",
        ),
        (
            msgspec.structs.replace(chat_request(endpoint="completions"), prompts=((1,),)),
            "prompt",
        ),
    ],
)
async def test_what_it_would_leave_aside_is_refused(
    fake: ModuleType, request_: GenerateRequest, field: str
) -> None:
    async with serving(fake) as (adapter, server):
        with pytest.raises(BackendRefused) as raised:
            await collect(adapter, request_)
    assert raised.value.param == field
    assert not server.exchanges


@pytest.mark.parametrize(
    ("status", "detail", "error"),
    [
        (400, "Unknown model: llama", BackendFailed),
        (400, "logit bias is not currently supported", BackendRefused),
        (422, [{"loc": ["body", "temperature"]}], BackendRefused),
        (500, "Exceeds maximum queue size", BackendBusy),
        (500, "CUDA", BackendFailed),
    ],
)
async def test_errors(
    fake: ModuleType, status: int, detail: object, error: type[BackendError]
) -> None:
    async def script(exchange: Exchange) -> None:
        exchange.answer(status, {"detail": detail})

    async with serving(fake, script) as (adapter, _):
        with pytest.raises(error) as raised:
            await collect(adapter, chat_request())
    assert raised.type is error


async def test_probe(fake: ModuleType) -> None:
    async with serving(fake, tools=True, slots=4) as (adapter, _):
        found = await adapter.probe()
    assert (found.models, found.slots, found.max_choices) == (("llama",), 4, 1)
    assert (found.tools, found.schema, found.logprobs, found.extra_fields) == (
        True,
        False,
        False,
        False,
    )


async def test_each_input_is_embedded_by_itself(fake: ModuleType) -> None:
    request = EmbedRequest(id="1", model="m", created=1, inputs=("a", "bcd"))
    async with serving(fake, endpoints=frozenset({"embeddings"})) as (adapter, server):
        found = await adapter.perform(request, Attempt())
        with pytest.raises(BackendRefused):
            await adapter.perform(msgspec.structs.replace(request, extra=("x",)), Attempt())
    assert isinstance(found, Embeddings)
    assert found.vectors == ((1.0, 1.0), (3.0, 1.0))
    assert found.usage == Usage(6, 0)
    assert [exchange.json["input"] for exchange in server.exchanges] == ["a", "bcd"]
