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
    Embeddings,
    EmbedRequest,
    GenerateRequest,
    Sampling,
    Usage,
)
from forebay.testing import Exchange, ScriptedServer, chat_request
from forebay.testing.adapter import collect


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


async def sent(fake: ModuleType, request: GenerateRequest) -> dict[str, Any]:
    async with serving(fake) as (adapter, server):
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
    body = await sent(fake, request)
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


async def test_logprobs_of_the_chosen_token_alone_need_one_beside_it(fake: ModuleType) -> None:
    request = with_fields(chat_request(endpoint="completions"), logprobs=0)
    request = msgspec.structs.replace(request, sampling=Sampling(logprobs=0, max_tokens=16))
    assert (await sent(fake, request))["logprobs"] == 1


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (with_fields(chat_request(), top_k=1), "top_k"),
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
