"""The steps by anthropic-sdk-python."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import anthropic
from anthropic import Anthropic, AsyncAnthropic
from pydantic import BaseModel
from steps import (
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

client = Anthropic(base_url=GIVEN["url"], api_key=KEY)
QUESTION: Any = [{"role": "user", "content": TEXTS["question"]}]
TOOLS: Any = [
    {
        "name": TOOL["name"],
        "description": TOOL["description"],
        "input_schema": TOOL["parameters"],
    }
]
CALL_IT: Any = {"type": "tool", "name": TOOL["name"]}
# The client itself has no temperature any more; the dialect has.
GREEDY = {"extra_body": {"temperature": 0}}
SHORT: Any = {"model": MODEL, "messages": QUESTION, "max_tokens": 6, **GREEDY}
TOOL_REQUEST: Any = {**SHORT, "max_tokens": 60, "tools": TOOLS, "tool_choice": CALL_IT}
LONG: Any = {**SHORT, "messages": [{"role": "user", "content": ENDLESS}], "max_tokens": 2000}


class Place(BaseModel):
    name: Literal["Oslo", "Rome"]
    warm: bool


def asynchronous() -> AsyncAnthropic:
    return AsyncAnthropic(base_url=GIVEN["url"], api_key=KEY)


def check_message(message: Any) -> str:
    assert (message.type, message.role, message.model) == ("message", "assistant", MODEL)
    assert message.stop_reason in ("end_turn", "max_tokens")
    (block,) = message.content
    assert block.type == "text"
    assert message.usage.input_tokens > 0
    assert message.usage.output_tokens > 0
    return str(block.text)


def check_events(kinds: list[str]) -> list[str]:
    kinds = [kind for kind in kinds if kind != "ping"]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    return kinds


def check_call(message: Any) -> Any:
    assert message.stop_reason == "tool_use"
    (block,) = message.content
    assert (block.type, block.name) == ("tool_use", TOOL["name"])
    assert block.id
    assert block.input["place"] in ("Oslo", "Rome")
    return block.input


@step
def chat() -> object:
    return check_message(client.messages.create(**SHORT))


@step
def chat_stream() -> object:
    kinds = check_events([event.type for event in client.messages.create(**SHORT, stream=True)])
    with client.messages.stream(**SHORT) as stream:
        text = "".join(stream.text_stream)
        assert check_message(stream.get_final_message()) == text
    return kinds


@step
async def chat_async() -> object:
    async with asynchronous() as aclient:
        return check_message(await aclient.messages.create(**SHORT))


@step
async def chat_stream_async() -> object:
    async with asynchronous() as aclient, aclient.messages.stream(**SHORT) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        assert check_message(await stream.get_final_message()) == text
    return text


@step
def system() -> object:
    plain = client.messages.create(**SHORT)
    blocks: Any = [
        {"type": "text", "text": TEXTS["system"], "cache_control": {"type": "ephemeral"}}
    ]
    found = [client.messages.create(**SHORT, system=form) for form in (TEXTS["system"], blocks)]
    counts = [one.usage.input_tokens + (one.usage.cache_read_input_tokens or 0) for one in found]
    assert counts[0] == counts[1] > plain.usage.input_tokens
    return counts


@step
def parts() -> object:
    texts = [{"type": "text", "text": part} for part in (TEXTS["prompt"], TEXTS["question"])]
    messages: Any = [{"role": "user", "content": texts}]
    return check_message(client.messages.create(**{**SHORT, "messages": messages}))


@step
def turns() -> object:
    before = client.messages.create(**SHORT)
    messages: Any = [*QUESTION, {"role": "assistant", "content": before.content}, *QUESTION]
    return check_message(client.messages.create(**{**SHORT, "messages": messages}))


@step
def stop() -> object:
    messages: Any = [{"role": "user", "content": TEXTS["until_stop"]}]
    request = {**SHORT, "messages": messages, "max_tokens": 48}
    answer = client.messages.create(**request, stop_sequences=[TEXTS["stop"], " "])
    assert answer.stop_reason == "end_turn"
    assert not any(" " in block.text for block in answer.content if block.type == "text")
    return answer.content


@step
def max_tokens() -> object:
    answer = client.messages.create(**{**SHORT, "max_tokens": 2})
    assert answer.stop_reason == "max_tokens"
    assert answer.usage.output_tokens == 2
    return answer.usage


@step
def stream_usage() -> object:
    *_, delta, _stop = client.messages.create(**SHORT, stream=True)
    assert delta.type == "message_delta"
    assert delta.usage.output_tokens > 0
    assert delta.usage.input_tokens is not None
    return delta.usage


@step
def tool() -> object:
    return check_call(client.messages.create(**TOOL_REQUEST))


@step
def tool_stream() -> object:
    with client.messages.stream(**TOOL_REQUEST) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_message()
    assert "input_json" in kinds
    return check_call(message)


@step
async def tool_async() -> object:
    async with asynchronous() as aclient:
        return check_call(await aclient.messages.create(**TOOL_REQUEST))


@step
def tool_result() -> object:
    call = client.messages.create(**TOOL_REQUEST)
    (block,) = call.content
    assert block.type == "tool_use"
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "Rain."}
    messages: Any = [
        *QUESTION,
        {"role": "assistant", "content": call.content},
        {"role": "user", "content": [result]},
    ]
    answer = client.messages.create(**{**SHORT, "messages": messages}, tools=TOOLS)
    assert answer.stop_reason in ("end_turn", "max_tokens", "tool_use")
    return answer.content


@step
def structured() -> object:
    answer = client.messages.parse(**{**SHORT, "max_tokens": 100}, output_format=Place)
    assert isinstance(answer.parsed_output, Place)
    return answer.parsed_output


@step
def image() -> object:
    source = {"type": "base64", "media_type": "image/png", "data": "bm90IGxvb2tlZCBhdA=="}
    messages: Any = [{"role": "user", "content": [{"type": "image", "source": source}]}]
    return client.messages.create(**{**SHORT, "messages": messages})


@step
def unknown_model() -> object:
    request = {**SHORT, "model": "nonesuch"}
    error = raised(anthropic.NotFoundError, lambda: client.messages.create(**request))
    assert error.body["error"]["type"] == "not_found_error"
    return error.message


@step
def bad_key() -> object:
    stranger = Anthropic(base_url=GIVEN["url"], api_key="wrong")
    error = raised(anthropic.AuthenticationError, lambda: stranger.messages.create(**SHORT))
    assert error.body["error"]["type"] == "authentication_error"
    return error.message


@step
def bad_field() -> object:
    request = {**SHORT, "extra_body": {"temperature": "hot"}}
    error = raised(anthropic.BadRequestError, lambda: client.messages.create(**request))
    assert "temperature" in error.body["error"]["message"]
    return error.message


@step
def models() -> object:
    listed = [model.id for model in client.models.list()]
    assert MODEL in listed
    found = client.models.retrieve(MODEL)
    assert (found.type, found.display_name) == ("model", MODEL)
    assert isinstance(found.created_at, datetime)
    return listed


@step
def count_tokens() -> object:
    counted = client.messages.count_tokens(model=MODEL, messages=QUESTION, system=TEXTS["system"])
    answer = client.messages.create(**SHORT, system=TEXTS["system"])
    read = answer.usage.cache_read_input_tokens or 0
    assert counted.input_tokens == answer.usage.input_tokens + read
    return counted.input_tokens


@step
def leave() -> object:
    with client.messages.create(**LONG, stream=True) as stream:
        for _, _event in zip(range(5), stream, strict=False):
            pass
        wait_for_load(1)
    wait_for_load(0)
    return "freed"


@step
async def leave_async() -> object:
    async with asynchronous() as aclient:
        async with aclient.messages.stream(**LONG) as stream:
            async for _ in stream.text_stream:
                break
            await load_comes_to(1)
        await load_comes_to(0)
    return "freed"


@step
def timeout() -> object:
    hasty = client.with_options(timeout=1, max_retries=0)
    raised(anthropic.APITimeoutError, lambda: hasty.messages.create(**LONG))
    wait_for_load(0)
    return "freed"


@step
def defaults() -> object:
    answer = client.messages.with_raw_response.create(**SHORT)
    assert answer.retries_taken == 0
    return "one try"


main("anthropic", anthropic.BadRequestError)
