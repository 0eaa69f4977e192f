"""The steps by openai-python."""

from __future__ import annotations

import base64
import json
from typing import Any, Literal

import openai
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel
from steps import (
    EMBEDDER,
    ENDLESS,
    GIVEN,
    KEY,
    MODEL,
    TEXTS,
    TOOL,
    load_comes_to,
    main,
    raised,
    step,
    wait_for_load,
)

URL = f"{GIVEN['url']}/v1"
client = OpenAI(base_url=URL, api_key=KEY)
# Each asynchronous step has an event loop of its own, and so a client of its own.
QUESTION: Any = [{"role": "user", "content": TEXTS["question"]}]
TOOLS: Any = [{"type": "function", "function": TOOL}]
CALL_IT: Any = {"type": "function", "function": {"name": TOOL["name"]}}
RESPONSES_TOOLS: Any = [{"type": "function", "strict": True, **TOOL}]
RESPONSES_CALL_IT: Any = {"type": "function", "name": TOOL["name"]}
SHORT: Any = {"model": MODEL, "messages": QUESTION, "max_tokens": 6, "temperature": 0}


class Place(BaseModel):
    name: Literal["Oslo", "Rome"]
    warm: bool


def asynchronous() -> AsyncOpenAI:
    return AsyncOpenAI(base_url=URL, api_key=KEY)


def check_chunks(chunks: list[Any]) -> int:
    assert len({(chunk.id, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert (chunks[0].model, chunks[0].object) == (MODEL, "chat.completion.chunk")
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert [c.delta.role for c in choices] == ["assistant"] + [None] * (len(choices) - 1)
    assert choices[-1].finish_reason in ("stop", "length")
    assert not any(choice.finish_reason for choice in choices[:-1])
    return len(chunks)


def check_call(call: Any) -> str:
    assert call.type == "function"
    assert call.id
    assert call.function.name == TOOL["name"]
    assert json.loads(call.function.arguments)["place"] in ("Oslo", "Rome")
    return str(call.function.arguments)


@step
def chat() -> object:
    answer = client.chat.completions.create(**SHORT)
    assert (answer.model, answer.object) == (MODEL, "chat.completion")
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert isinstance(choice.message.content, str)
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 5
    total = answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.total_tokens == total
    return choice.message.content


@step
def chat_stream() -> object:
    chunks = list(client.chat.completions.create(**SHORT, stream=True))
    assert not any(chunk.usage for chunk in chunks)
    return check_chunks(chunks)


@step
async def chat_async() -> object:
    async with asynchronous() as aclient:
        answer = await aclient.chat.completions.create(**SHORT)
    assert isinstance(answer.choices[0].message.content, str)
    return answer.choices[0].message.content


@step
async def chat_stream_async() -> object:
    async with asynchronous() as aclient:
        stream = await aclient.chat.completions.create(**SHORT, stream=True)
        return check_chunks([chunk async for chunk in stream])


@step
def completions() -> object:
    answer = client.completions.create(
        model=MODEL, prompt=TEXTS["prompt"], max_tokens=5, temperature=0
    )
    assert answer.object == "text_completion"
    assert answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    return answer.choices[0].text


@step
def completions_stream() -> object:
    chunks = client.completions.create(
        model=MODEL, prompt=TEXTS["prompt"], max_tokens=5, temperature=0, stream=True
    )
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert choices[-1].finish_reason == "length"
    assert "".join(choice.text for choice in choices) == completions()
    return len(choices)


@step
def system() -> object:
    messages: Any = [{"role": "system", "content": TEXTS["system"]}, *QUESTION]
    answer = client.chat.completions.create(**{**SHORT, "messages": messages})
    plain = client.chat.completions.create(**SHORT)
    assert answer.usage is not None
    assert plain.usage is not None
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens
    return answer.usage.prompt_tokens


@step
def parts() -> object:
    texts = [{"type": "text", "text": part} for part in (TEXTS["prompt"], TEXTS["question"])]
    messages: Any = [{"role": "user", "content": texts}]
    answer = client.chat.completions.create(**{**SHORT, "messages": messages})
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 12
    return answer.usage.prompt_tokens


@step
def turns() -> object:
    before = client.chat.completions.create(**SHORT).choices[0].message
    messages: Any = [*QUESTION, before, *QUESTION]
    answer = client.chat.completions.create(**{**SHORT, "messages": messages})
    assert isinstance(answer.choices[0].message.content, str)
    return answer.choices[0].message.content


@step
def stop() -> object:
    answer = client.completions.create(
        model=MODEL, prompt=TEXTS["until_stop"], max_tokens=48, temperature=0, stop=TEXTS["stop"]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert TEXTS["stop"] not in answer.choices[0].text
    return answer.choices[0].text


@step
def max_tokens() -> object:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, **{name: 2}
        )
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2
    return "by both names"


@step
def n() -> object:
    answer = client.chat.completions.create(**{**SHORT, "temperature": 1}, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    return [choice.message.content for choice in answer.choices]


@step
def n_stream() -> object:
    ended = [
        choice.index
        for chunk in client.chat.completions.create(**{**SHORT, "temperature": 1}, n=2, stream=True)
        for choice in chunk.choices
        if choice.finish_reason
    ]
    assert sorted(ended) == [0, 1]
    return ended


@step
def stream_usage() -> object:
    *chunks, last = client.chat.completions.create(
        **SHORT, stream=True, stream_options={"include_usage": True}
    )
    assert not any(chunk.usage for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
    return last.usage.total_tokens


@step
def logprobs() -> object:
    answer = client.chat.completions.create(**SHORT, logprobs=True)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content
    assert all(one.logprob <= 0 and isinstance(one.token, str) for one in found.content)
    return len(found.content)


@step
def seed() -> object:
    request = {**SHORT, "temperature": 1, "seed": 7}
    first, second = (client.chat.completions.create(**request) for _ in range(2))
    assert first.choices[0].message.content == second.choices[0].message.content
    return first.choices[0].message.content


TOOL_REQUEST: Any = {
    "model": MODEL,
    "messages": QUESTION,
    "tools": TOOLS,
    "tool_choice": CALL_IT,
    "max_tokens": 60,
    "temperature": 0,
}


@step
def tool() -> object:
    answer = client.chat.completions.create(**TOOL_REQUEST)
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert len(calls) == 1
    return check_call(calls[0])


@step
def tool_stream() -> object:
    with client.chat.completions.stream(**TOOL_REQUEST) as stream:
        kinds = {event.type for event in stream}
        answer = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    return check_call(calls[0])


@step
async def tool_async() -> object:
    async with asynchronous() as aclient:
        answer = await aclient.chat.completions.create(**TOOL_REQUEST)
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    return check_call(calls[0])


@step
def tool_result() -> object:
    call = client.chat.completions.create(**TOOL_REQUEST).choices[0].message
    assert call.tool_calls is not None
    result = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "Rain."}
    messages: Any = [*QUESTION, call, result]
    answer = client.chat.completions.create(**{**SHORT, "messages": messages}, tools=TOOLS)
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")
    return answer.choices[0].message.content


PARSED: Any = {"model": MODEL, "messages": QUESTION, "max_tokens": 100, "temperature": 0}


@step
def structured() -> object:
    answer = client.chat.completions.parse(**PARSED, response_format=Place)
    assert isinstance(answer.choices[0].message.parsed, Place)
    return answer.choices[0].message.parsed


@step
def structured_stream() -> object:
    with client.chat.completions.stream(**PARSED, response_format=Place) as stream:
        for _ in stream:
            pass
        answer = stream.get_final_completion()
    assert isinstance(answer.choices[0].message.parsed, Place)
    return answer.choices[0].message.parsed


@step
async def structured_async() -> object:
    async with asynchronous() as aclient:
        answer = await aclient.chat.completions.parse(**PARSED, response_format=Place)
    assert isinstance(answer.choices[0].message.parsed, Place)
    return answer.choices[0].message.parsed


@step
def image() -> object:
    pixel = base64.b64encode(b"not looked at").decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{pixel}"}}
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "What?"}, part]}]
    return client.chat.completions.create(**{**SHORT, "messages": messages})


@step
def unknown_model() -> object:
    request = {**SHORT, "model": "nonesuch"}
    error = raised(openai.NotFoundError, lambda: client.chat.completions.create(**request))
    assert (error.code, error.param) == ("model_not_found", "model")
    return error.message


@step
def bad_key() -> object:
    stranger = OpenAI(base_url=URL, api_key="wrong")
    error = raised(openai.AuthenticationError, lambda: stranger.chat.completions.create(**SHORT))
    assert error.code == "invalid_api_key"
    return error.message


@step
def bad_field() -> object:
    request = {**SHORT, "temperature": "hot"}
    error = raised(openai.BadRequestError, lambda: client.chat.completions.create(**request))
    assert error.param == "temperature"
    assert error.type == "invalid_request_error"
    return error.message


@step
def models() -> object:
    listed = [model.id for model in client.models.list()]
    assert {MODEL, EMBEDDER} <= set(listed)
    assert client.models.retrieve(MODEL).id == MODEL
    return listed


@step
def embeddings() -> object:
    answer = client.embeddings.create(model=EMBEDDER, input=["sea", "land"])
    plain = client.embeddings.create(model=EMBEDDER, input="sea", encoding_format="float")
    assert [len(one.embedding) for one in answer.data] == [64, 64]
    assert plain.data[0].embedding[0] == answer.data[0].embedding[0]
    return [one.index for one in answer.data]


@step
async def embeddings_async() -> object:
    async with asynchronous() as aclient:
        answer = await aclient.embeddings.create(model=EMBEDDER, input=["sea", "land"])
    assert [len(one.embedding) for one in answer.data] == [64, 64]
    return [one.index for one in answer.data]


ASKED: Any = {
    "model": MODEL,
    "input": TEXTS["question"],
    "max_output_tokens": 16,
    "temperature": 0,
}


@step
def responses() -> object:
    answer = client.responses.create(**ASKED, instructions=TEXTS["system"])
    assert (answer.object, answer.model) == ("response", MODEL)
    assert answer.status in ("completed", "incomplete")
    assert [item.type for item in answer.output] == ["message"]
    assert answer.usage is not None
    assert answer.usage.total_tokens > 5
    return answer.output_text


@step
def responses_stream() -> object:
    events = list(client.responses.create(**ASKED, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    start = ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[:4] == start
    end = ["output_text.done", "content_part.done", "output_item.done"]
    assert kinds[-4:-1] == end
    assert kinds[-1] in ("completed", "incomplete")
    assert set(kinds[4:-4]) == {"output_text.delta"}
    with client.responses.stream(**ASKED) as stream:
        for _ in stream:
            pass
    return len(events)


@step
async def responses_async() -> object:
    async with asynchronous() as aclient:
        stream = await aclient.responses.create(**ASKED, stream=True)
        kinds = [event.type async for event in stream]
        answer = await aclient.responses.create(**ASKED)
    assert kinds[0] == "response.created"
    return answer.output_text


@step
def responses_continued() -> object:
    first = client.responses.create(**ASKED)
    second = client.responses.create(**ASKED, previous_response_id=first.id)
    assert second.previous_response_id == first.id
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    raised(openai.NotFoundError, lambda: client.responses.retrieve(first.id))
    return second.usage.input_tokens


@step
def responses_tool() -> object:
    request = {**ASKED, "max_output_tokens": 60}
    answer = client.responses.create(
        **request, tools=RESPONSES_TOOLS, tool_choice=RESPONSES_CALL_IT
    )
    (call,) = answer.output
    assert call.type == "function_call"
    assert call.name == TOOL["name"]
    assert json.loads(call.arguments)["place"] in ("Oslo", "Rome")
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}
    again = client.responses.create(
        **{**ASKED, "input": [result]}, previous_response_id=answer.id, tools=RESPONSES_TOOLS
    )
    assert again.status in ("completed", "incomplete")
    return call.arguments


@step
def responses_structured() -> object:
    answer = client.responses.parse(**{**ASKED, "max_output_tokens": 100}, text_format=Place)
    assert isinstance(answer.output_parsed, Place)
    return answer.output_parsed


LONG: Any = {
    "model": MODEL,
    "messages": [{"role": "user", "content": ENDLESS}],
    "max_tokens": 2000,
    "temperature": 0,
}


@step
def leave() -> object:
    with client.chat.completions.create(**LONG, stream=True) as stream:
        for _, _chunk in zip(range(3), stream, strict=False):
            pass
        wait_for_load(1)
    wait_for_load(0)
    return "freed"


@step
async def leave_async() -> object:
    async with asynchronous() as aclient:
        stream = await aclient.chat.completions.create(**LONG, stream=True)
        async for _ in stream:
            break
        await load_comes_to(1)
        await stream.close()
        await load_comes_to(0)
    return "freed"


@step
def timeout() -> object:
    hasty = client.with_options(timeout=1, max_retries=0)
    raised(openai.APITimeoutError, lambda: hasty.chat.completions.create(**LONG))
    wait_for_load(0)
    return "freed"


@step
def defaults() -> object:
    answer = client.chat.completions.with_raw_response.create(**SHORT)
    assert answer.retries_taken == 0
    request = {**SHORT, "model": "nonesuch"}
    error = raised(openai.NotFoundError, lambda: client.chat.completions.create(**request))
    assert error.response.request.headers["x-stainless-retry-count"] == "0"
    return "one try"


main("openai-python", openai.BadRequestError)
