"""The steps by LlamaIndex's models for servers with OpenAI's API."""

from __future__ import annotations

import gc
from typing import Any, Literal

import openai
from llama_index.core.base.llms.types import (
    ChatMessage,
    ImageBlock,
    MessageRole,
    TextBlock,
)
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike, OpenAILikeResponses
from pydantic import BaseModel
from steps import (
    EMBEDDER,
    ENDLESS,
    GIVEN,
    KEY,
    MODEL,
    TEXTS,
    TOOL,
    main,
    raised,
    step,
    wait_for_load,
)

URL = f"{GIVEN['url']}/v1"
QUESTION = [ChatMessage(TEXTS["question"])]
PIXEL = b"not looked at"


class Place(BaseModel):
    """A place."""

    name: Literal["Oslo", "Rome"]
    warm: bool


class Where(BaseModel):
    place: Literal["Oslo", "Rome"]


def get_weather(place: str) -> str:
    return f"Rain in {place}."


def make(**settings: Any) -> OpenAILike:
    given = {"model": MODEL, "max_tokens": 6, "temperature": 0.0, **settings}
    return OpenAILike(
        api_base=URL,
        api_key=given.pop("api_key", KEY),
        is_chat_model=given.pop("is_chat_model", True),
        is_function_calling_model=True,
        **given,
    )


def responding() -> OpenAILikeResponses:
    return OpenAILikeResponses(
        model=MODEL, api_base=URL, api_key=KEY, max_output_tokens=16, temperature=0.0
    )


llm = make()
calling = make(max_tokens=60)
structuring = make(max_tokens=100, should_use_structured_outputs=True)
WEATHER = FunctionTool.from_defaults(get_weather, description=TOOL["description"], fn_schema=Where)
CALL_IT: Any = {"tools": [WEATHER], "tool_required": True, "tool_choice": TOOL["name"]}


def check_answer(answer: Any) -> str:
    assert answer.message.role == MessageRole.ASSISTANT
    assert isinstance(answer.message.content, str)
    assert answer.raw.usage.completion_tokens > 0
    return str(answer.message.content)


def check_call(answer: Any) -> Any:
    (call,) = calling.get_tool_calls_from_response(answer)
    assert call.tool_name == TOOL["name"]
    assert call.tool_id
    assert call.tool_kwargs["place"] in ("Oslo", "Rome")
    return call.tool_kwargs


@step
def chat() -> object:
    return check_answer(llm.chat(QUESTION))


@step
def chat_stream() -> object:
    pieces = list(llm.stream_chat(QUESTION))
    assert "".join(piece.delta or "" for piece in pieces) == pieces[-1].message.content
    return len(pieces)


@step
async def chat_async() -> object:
    return check_answer(await make().achat(QUESTION))


@step
async def chat_stream_async() -> object:
    pieces = [piece async for piece in await make().astream_chat(QUESTION)]
    assert "".join(piece.delta or "" for piece in pieces) == pieces[-1].message.content
    return len(pieces)


@step
def completions() -> object:
    answer = make(is_chat_model=False).complete(TEXTS["prompt"])
    assert answer.text
    return answer.text


@step
def completions_stream() -> object:
    pieces = list(make(is_chat_model=False).stream_complete(TEXTS["prompt"]))
    assert pieces[-1].text == completions()
    return len(pieces)


@step
def system() -> object:
    answer = llm.chat([ChatMessage(TEXTS["system"], role=MessageRole.SYSTEM), *QUESTION])
    more, plain = (one.raw.usage.prompt_tokens for one in (answer, llm.chat(QUESTION)))
    assert more > plain
    return more


@step
def parts() -> object:
    blocks = [TextBlock(text=TEXTS[name]) for name in ("prompt", "question")]
    return check_answer(llm.chat([ChatMessage(role=MessageRole.USER, blocks=blocks)]))


@step
def turns() -> object:
    return check_answer(llm.chat([*QUESTION, llm.chat(QUESTION).message, *QUESTION]))


@step
def stop() -> object:
    answer = make(is_chat_model=False, max_tokens=48).complete(
        TEXTS["until_stop"], stop=[TEXTS["stop"]]
    )
    assert TEXTS["stop"] not in answer.text
    assert answer.raw.choices[0].finish_reason == "stop"
    return answer.text


@step
def max_tokens() -> object:
    answer = make(max_tokens=2).chat(QUESTION)
    assert answer.raw.choices[0].finish_reason == "length"
    assert answer.raw.usage.completion_tokens == 2
    return answer.message.content


@step
def stream_usage() -> object:
    *_, last = llm.stream_chat(QUESTION, stream_options={"include_usage": True})
    assert last.raw.usage.completion_tokens > 0
    return last.raw.usage.total_tokens


@step
def logprobs() -> object:
    answer = make(logprobs=True).chat(QUESTION)
    found = answer.raw.choices[0].logprobs.content
    assert found
    assert all(one.logprob <= 0 for one in found)
    return len(found)


@step
def seed() -> object:
    warm = make(temperature=1.0)
    first, second = (warm.chat(QUESTION, seed=7).message.content for _ in range(2))
    assert first == second
    return first


@step
def tool() -> object:
    return check_call(calling.chat_with_tools(user_msg=QUESTION[0], **CALL_IT))


@step
def tool_stream() -> object:
    *_, last = calling.stream_chat_with_tools(user_msg=QUESTION[0], **CALL_IT)
    return check_call(last)


@step
async def tool_async() -> object:
    again = make(max_tokens=60)
    return check_call(await again.achat_with_tools(user_msg=QUESTION[0], **CALL_IT))


@step
def tool_result() -> object:
    call = calling.chat_with_tools(user_msg=QUESTION[0], **CALL_IT)
    (made,) = calling.get_tool_calls_from_response(call)
    result = ChatMessage(
        "Rain.", role=MessageRole.TOOL, additional_kwargs={"tool_call_id": made.tool_id}
    )
    return llm.chat([*QUESTION, call.message, result]).message.content


@step
def structured() -> object:
    answer = structuring.as_structured_llm(Place).chat(QUESTION)
    assert isinstance(answer.raw, Place)
    return answer.raw


@step
async def structured_async() -> object:
    again = make(max_tokens=100, should_use_structured_outputs=True)
    answer = await again.as_structured_llm(Place).achat(QUESTION)
    assert isinstance(answer.raw, Place)
    return answer.raw


@step
def image() -> object:
    block = ImageBlock(image=PIXEL, image_mimetype="image/png")
    return llm.chat([ChatMessage(role=MessageRole.USER, blocks=[block])])


@step
def unknown_model() -> object:
    strange = make(model="nonesuch")
    error = raised(openai.NotFoundError, lambda: strange.chat(QUESTION))
    assert error.code == "model_not_found"
    return error.message


@step
def bad_key() -> object:
    stranger = make(api_key="wrong")
    return raised(openai.AuthenticationError, lambda: stranger.chat(QUESTION)).message


@step
def bad_field() -> object:
    error = raised(openai.BadRequestError, lambda: llm.chat(QUESTION, top_p=7))
    assert error.param == "top_p"
    return error.message


def vectors() -> OpenAILikeEmbedding:
    return OpenAILikeEmbedding(model_name=EMBEDDER, api_base=URL, api_key=KEY)


@step
def embeddings() -> object:
    found = vectors().get_text_embedding_batch(["sea", "land"])
    assert [len(vector) for vector in found] == [64, 64]
    assert vectors().get_query_embedding("sea") == found[0]
    return len(found)


@step
async def embeddings_async() -> object:
    found = await vectors().aget_text_embedding_batch(["sea", "land"])
    assert [len(vector) for vector in found] == [64, 64]
    return len(found)


@step
def responses() -> object:
    answer = responding().chat(QUESTION)
    assert isinstance(answer.message.content, str)
    return answer.message.content


@step
def responses_stream() -> object:
    pieces = list(responding().stream_chat(QUESTION))
    assert "".join(piece.delta or "" for piece in pieces)
    return len(pieces)


LONG = [ChatMessage(ENDLESS)]


@step
def leave() -> object:
    """Closing a stream does not close the connection below it; its end as garbage does."""
    stream: Any = make(max_tokens=2000).stream_chat(LONG)
    next(stream)
    wait_for_load(1)
    stream.close()
    del stream
    gc.collect()
    wait_for_load(0)
    return "freed"


@step
def timeout() -> object:
    hasty = make(max_tokens=2000, timeout=1, max_retries=0)
    raised(openai.APITimeoutError, lambda: hasty.chat(LONG))
    wait_for_load(0)
    return "freed"


@step
def defaults() -> object:
    """As a newcomer writes it, by the default of a model that only completes."""
    plain = OpenAILike(model=MODEL, api_base=URL, api_key=KEY, max_tokens=6)
    return plain.complete(TEXTS["question"]).text


main("llama-index", openai.BadRequestError)
