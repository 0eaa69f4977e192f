"""Shapes: what OpenAI's clients parse. Source: OpenAI's API reference, the types of its SDKs."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from forebay.conformance.answer import Answer, Broken, shaped
from forebay.conformance.check import check
from forebay.conformance.talk import Talk

Text = Annotated[str, Meta(min_length=1)]
#: Unix seconds of this century: not 0, and not milliseconds.
Seconds = Annotated[int, Meta(gt=978_307_200, lt=10_000_000_000)]
Finish = Literal["stop", "length", "tool_calls", "content_filter", "function_call"]


class Said(Struct, frozen=True):
    role: Literal["assistant"]
    content: str | None


class ChatChoice(Struct, frozen=True):
    index: int
    message: Said
    finish_reason: Finish


class ChatBody(Struct, frozen=True):
    id: Text
    object: Literal["chat.completion"]
    created: Seconds
    model: Text
    choices: Annotated[list[ChatChoice], Meta(min_length=1)]


class CompletionChoice(Struct, frozen=True):
    index: int
    text: str
    finish_reason: Finish


class CompletionBody(Struct, frozen=True):
    id: Text
    object: Literal["text_completion"]
    created: Seconds
    model: Text
    choices: Annotated[list[CompletionChoice], Meta(min_length=1)]


class Delta(Struct, frozen=True):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Struct, frozen=True):
    index: int
    delta: Delta
    finish_reason: Finish | None = None


class ChatChunk(Struct, frozen=True):
    id: Text
    object: Literal["chat.completion.chunk"]
    created: Seconds
    model: Text
    choices: list[ChunkChoice]


class TextChoice(Struct, frozen=True):
    index: int
    text: str
    finish_reason: Finish | None = None


class TextChunk(Struct, frozen=True):
    id: Text
    object: Literal["text_completion"]
    created: Seconds
    model: Text
    choices: list[TextChoice]


class Card(Struct, frozen=True):
    id: Text
    object: Literal["model"]


class Models(Struct, frozen=True):
    object: Literal["list"]
    data: list[Card]


@check("shapes.chat", "A whole chat answer has OpenAI's fields", claim="chat")
async def chat(talk: Talk) -> None:
    (await talk.chat()).expect().read(ChatBody)


@check("shapes.chat-stream", "Every chunk of a chat stream has OpenAI's fields")
async def chat_stream(talk: Talk) -> None:
    answer = (await talk.chat(stream=True)).expect()
    if not [shaped(chunk, ChatChunk) for chunk in answer.chunks]:
        raise Broken("the stream has no chunks")


@check("shapes.completion", "A whole completion has OpenAI's fields", claim="completions")
async def completion(talk: Talk) -> None:
    (await talk.complete()).expect().read(CompletionBody)


@check("shapes.completion-stream", "Every chunk of a completions stream has OpenAI's fields")
async def completion_stream(talk: Talk) -> None:
    answer = (await talk.complete(stream=True)).expect()
    if not [shaped(chunk, TextChunk) for chunk in answer.chunks]:
        raise Broken("the stream has no chunks")


@check("shapes.id-constant", "`id` is the same in all chunks, and not empty")
async def id_constant(talk: Talk) -> None:
    ids = [chunk.id for chunk in (await _stream(talk)).parts]
    if not ids[0] or len(set(ids)) > 1:
        raise Broken(f"{len(set(ids))} ids in one stream, the first is {ids[0]!r}")


@check("shapes.ids-differ", "Two answers have different ids")
async def ids_differ(talk: Talk) -> None:
    first, second = [(await talk.generate(max_tokens=1)).expect().parts[0].id for _ in range(2)]
    if first == second:
        raise Broken(f"both are {first!r}")


@check("shapes.created-constant", "`created` is the same in all chunks")
async def created_constant(talk: Talk) -> None:
    times = {chunk.created for chunk in (await _stream(talk)).parts}
    if len(times) != 1:
        raise Broken(f"{len(times)} times in one stream")


@check("shapes.model-name", "Answers and chunks name the model as it was asked for")
async def model_name(talk: Talk) -> None:
    whole = (await talk.generate(max_tokens=2)).expect()
    for chunk in [*whole.parts, *(await _stream(talk)).parts]:
        if chunk.model != talk.model:
            raise Broken(f"asked for {talk.model!r}, named {chunk.model!r}")


@check("shapes.content-type", "A whole answer is JSON, a stream is `text/event-stream`")
async def content_type(talk: Talk) -> None:
    whole = (await talk.generate(max_tokens=1)).expect()
    for answer, kind in ((whole, "application/json"), (await _stream(talk), "text/event-stream")):
        given = answer.headers.get("content-type", "")
        if not given.startswith(kind):
            raise Broken(f"expected {kind}, got {given!r}")


@check("shapes.null-fields", "A field that is null is as good as left out")
async def null_fields(talk: Talk) -> None:
    nothing = dict.fromkeys(("stop", "seed", "n", "top_p", "logit_bias", "stream_options"))
    path, body = talk.generation("one")
    (await talk.ask(path, {**body, **nothing})).expect()


@check("shapes.models", "`/v1/models` lists the model")
async def models(talk: Talk) -> None:
    found = (await talk.ask("/v1/models", method="GET")).expect().read(Models)
    if talk.model not in [card.id for card in found.data]:
        raise Broken(f"lists {[card.id for card in found.data]}, not {talk.model!r}")


async def _stream(talk: Talk) -> Answer:
    answer = (await talk.generate(stream=True)).expect()
    if not answer.parts:
        raise Broken("the stream has no chunks")
    return answer
