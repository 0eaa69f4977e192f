"""llama.cpp beyond generation: what the server was started for, and its own names of fields."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any

import msgspec
import pytest
from msgspec import Raw, structs

from forebay.api import (
    Attempt,
    BackendRefused,
    Delta,
    DetokenizeRequest,
    Embeddings,
    EmbedRequest,
    Message,
    Ranked,
    Ranking,
    RerankRequest,
    Sampling,
    ScoreRequest,
    Text,
    TokenizeRequest,
    TokenLogprob,
    Tokens,
    Unsupported,
    Usage,
)
from forebay.testing import Exchange, Scenario, ScriptedServer, adapter_context, chat_request
from forebay.testing.adapter import collect
from forebay_plugins.llamacpp import LlamaCppAdapter, LlamaCppSettings

USAGE = {"prompt_tokens": 4, "total_tokens": 4}
ANSWERS = {
    "/v1/embeddings": {"data": [{"index": 0, "embedding": [1, 2]}], "usage": USAGE},
    "/v1/rerank": {"results": [{"index": 0, "relevance_score": 1.5}], "usage": USAGE},
}
ALWAYS = {"chat", "completions", "tokenize", "detokenize"}


def common(**fields: object) -> dict[str, Any]:
    raw = {name: Raw(msgspec.json.encode(value)) for name, value in fields.items()}
    return {"id": "r", "model": "m", "created": 1, "fields": raw, "extra": tuple(raw)}


@asynccontextmanager
async def started(
    fakes: ModuleType, *paths: str
) -> AsyncIterator[tuple[LlamaCppAdapter, list[Exchange]]]:
    """A server started for these routes."""

    async def script(exchange: Exchange) -> None:
        if exchange.path not in paths:
            await fakes.serve(exchange, Scenario.HEALTHY, fakes.LlamaCpp)
        elif exchange.json:
            exchange.answer(200, ANSWERS[exchange.path])
        else:
            exchange.answer(400, {"error": {"code": 400, "message": "must be provided"}})

    async with ScriptedServer(script) as server:
        settings = LlamaCppSettings(adapter="llamacpp", url=server.url)
        adapter = LlamaCppAdapter(settings, adapter_context())
        try:
            yield adapter, server.exchanges
        finally:
            await adapter.aclose()


@pytest.mark.parametrize(
    ("paths", "endpoints"),
    [
        ((), ALWAYS),
        (("/v1/embeddings",), ALWAYS | {"embeddings"}),
        (("/v1/embeddings", "/v1/rerank"), ALWAYS | {"rerank"}),
    ],
)
async def test_it_serves_what_it_was_started_for(
    fakes: ModuleType, paths: tuple[str, ...], endpoints: set[str]
) -> None:
    async with started(fakes, *paths) as (adapter, exchanges):
        assert (await adapter.probe()).endpoints == endpoints
        asked = len([exchange for exchange in exchanges if exchange.method == "POST"])
        await adapter.probe()
        again = len([exchange for exchange in exchanges if exchange.method == "POST"])
        assert asked == again, "it is asked once"


async def test_tokens_and_text(fakes: ModuleType) -> None:
    async with started(fakes) as (adapter, exchanges):
        await adapter.probe()
        plain = TokenizeRequest(text="Hello", add_special_tokens=False, **common(parse_special=1))
        found = await adapter.perform(plain, Attempt())
        assert found == Tokens((9259, 478), None, 4096)
        assert exchanges[-1].json == {
            "content": "Hello",
            "add_special": False,
            "with_pieces": True,
            "parse_special": 1,
        }
        with_texts = TokenizeRequest(text="Hello", with_texts=True, **common())
        found = await adapter.perform(with_texts, Attempt())
        assert found == Tokens((2, 9259, 478), ("<bos>", "Hello", "\ufffd"), 4096)
        text = await adapter.perform(DetokenizeRequest(tokens=(5, 6), **common()), Attempt())
        assert text == Text("HelloHello")


async def test_a_chat_is_tokenized_as_it_is_prompted(fakes: ModuleType) -> None:
    async with started(fakes) as (adapter, exchanges):
        chat = (Message(role="user", content="Hi"),)
        request = TokenizeRequest(chat=chat, add_special_tokens=False, **common(tools=[]))
        tokens = await adapter.perform(request, Attempt())
        assert tokens == Tokens((2, 9259, 478))
        template, tokenize = exchanges
        assert template.path == "/apply-template"
        assert template.json == {"messages": [{"role": "user", "content": "Hi"}], "tools": []}
        assert tokenize.json["content"] == "<user>Hi"
        assert tokenize.json["add_special"] is True


async def test_embeddings_and_ranking(fakes: ModuleType) -> None:
    async with started(fakes, "/v1/embeddings", "/v1/rerank") as (adapter, _):
        vectors = await adapter.perform(EmbedRequest(inputs=("a",), **common()), Attempt())
        assert vectors == Embeddings(((1, 2),), Usage(4, 0))
        request = RerankRequest(query="a", documents=("b",), **common())
        assert await adapter.perform(request, Attempt()) == Ranking((Ranked(0, 1.5),), Usage(4, 0))
        shorter = EmbedRequest(inputs=("a",), dimensions=1, **common())
        with pytest.raises(BackendRefused, match=r"llama\.cpp") as refused:
            await adapter.perform(shorter, Attempt())
        assert refused.value.param == "dimensions"
        score = ScoreRequest(pairs=(("a", "b"),), **common())
        with pytest.raises(Unsupported):
            await adapter.perform(score, Attempt())


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("wanted", "schema"),
    [
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}, SCHEMA),
        ({"type": "json_object"}, {"type": "object"}),
    ],
)
async def test_completions_are_bound_in_the_servers_own_words(
    fakes: ModuleType, wanted: Any, schema: Any
) -> None:
    """There it ignores `response_format` without a word."""
    async with started(fakes) as (adapter, exchanges):
        for endpoint in ("completions", "chat"):
            request = chat_request(endpoint=endpoint, response_format=wanted)
            await collect(adapter, structs.replace(request, needs_schema=True))
        completions, chat = exchanges[-2:]
        assert completions.json["json_schema"] == schema
        assert "response_format" not in completions.json
        assert chat.json["response_format"] == wanted
        assert "json_schema" not in chat.json
        broken = chat_request(
            endpoint="completions", response_format={"type": "json_schema", "x": 1}
        )
        with pytest.raises(BackendRefused) as refused:
            await collect(adapter, structs.replace(broken, needs_schema=True))
        assert refused.value.param == "response_format"


async def test_it_gives_as_many_choices_as_it_has_slots(fakes: ModuleType) -> None:
    async with started(fakes) as (adapter, _):
        found = await adapter.probe()
        assert found.max_choices == found.slots > 1


async def test_logprobs_without_the_likeliest_tokens_are_asked_for_with_one(
    fakes: ModuleType,
) -> None:
    """LlamaIndex says `top_logprobs: 0`, for which the server gives no logprobs at all."""
    async with started(fakes) as (adapter, exchanges):
        asked = chat_request(logprobs=True, top_logprobs=0)
        await collect(adapter, structs.replace(asked, sampling=Sampling(logprobs=0)))
        assert exchanges[-1].json["top_logprobs"] == 1


async def test_logprobs_of_completions_are_no_chunks_of_chats() -> None:
    """It writes them in the form of chats; as events, the gateway can write them as it should."""
    entry = {"token": " b", "logprob": -0.5, "top_logprobs": [{"token": " b", "logprob": -0.5}]}

    async def script(exchange: Exchange) -> None:
        exchange.begin()
        for text, logprobs, reason in ((" b", {"content": [entry]}, None), ("", None, "length")):
            choice = {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": reason}
            chunk = {"object": "text_completion", "id": "c", "created": 1, "choices": [choice]}
            exchange.send(b"data: " + msgspec.json.encode(chunk) + b"\n\n")
        exchange.send(b"data: [DONE]\n\n")

    request = chat_request(endpoint="completions", stream=True, logprobs=1)
    request = structs.replace(request, sampling=Sampling(logprobs=1, max_tokens=1))
    async with ScriptedServer(script) as server:
        settings = LlamaCppSettings(adapter="llamacpp", url=server.url)
        adapter = LlamaCppAdapter(settings, adapter_context())
        events = await collect(adapter, request)
        await adapter.aclose()
    said = [event for event in events if isinstance(event, Delta)]
    assert said[0] == Delta(0, " b", logprobs=(TokenLogprob(" b", -0.5, ((" b", -0.5),)),))


async def test_a_prompt_that_is_to_be_echoed_is_refused(fakes: ModuleType) -> None:
    async with started(fakes) as (adapter, _):
        request = structs.replace(chat_request(endpoint="completions"), echo=True)
        with pytest.raises(BackendRefused) as refused:
            await collect(adapter, request)
        assert refused.value.param == "echo"
