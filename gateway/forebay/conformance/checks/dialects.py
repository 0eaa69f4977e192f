"""Other dialects over the same backend: OpenAI's Responses, Anthropic's Messages.

Sources: both API references, and what the events' order means to their SDKs.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from forebay.conformance.answer import Answer, Broken, Lacking, shaped
from forebay.conformance.check import check
from forebay.conformance.talk import PROMPT, Talk

RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
Count = Annotated[int, Meta(ge=0)]


class Spent(Struct, frozen=True):
    input_tokens: Count
    output_tokens: Count


class OutputText(Struct, frozen=True):
    type: Literal["output_text"]
    text: str


class Item(Struct, frozen=True):
    type: str
    id: str
    content: list[OutputText] = []


class Response(Struct, frozen=True):
    id: str
    object: Literal["response"]
    created_at: float
    model: str
    status: Literal["completed", "incomplete"]
    output: list[Item]
    usage: Spent

    @property
    def text(self) -> str:
        return "".join(part.text for item in self.output for part in item.content)


class Block(Struct, frozen=True):
    type: Literal["text"]
    text: str


class Message(Struct, frozen=True):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Block]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence"]
    usage: Spent


@check("dialects.responses", "`/v1/responses` answers a response object")
async def responses(talk: Talk) -> None:
    found = (await _respond(talk)).read(Response)
    if not found.output or not found.usage.input_tokens:
        raise Broken("it has no output, or no usage")


@check("dialects.responses-stream", "Its events come in order, numbered, and join to its text")
async def responses_stream(talk: Talk) -> None:
    events = [event.json for event in (await _respond(talk, stream=True)).events]
    kinds = [event["type"] for event in events]
    numbers = [event["sequence_number"] for event in events]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise Broken(f"they are numbered {numbers}")
    if kinds[0] != "response.created" or kinds[-1] not in (
        "response.completed",
        "response.incomplete",
    ):
        raise Broken(f"they begin with {kinds[0]} and end with {kinds[-1]}")
    deltas = "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
    text = shaped(events[-1]["response"], Response).text
    if deltas != text:
        raise Broken(f"pieces {deltas!r}, text {text!r}")


@check("dialects.responses-stored", "A stored response can be had again, and gone on from")
async def responses_stored(talk: Talk) -> None:
    first = (await _respond(talk, store=True)).read(Response)
    again = (await talk.ask(f"{RESPONSES}/{first.id}", method="GET")).expect().read(Response)
    if again.text != first.text:
        raise Broken("it is another one")
    later = (await _respond(talk, previous_response_id=first.id)).read(Response)
    if later.usage.input_tokens <= first.usage.input_tokens:
        raise Broken("what was said before is not read")


@check("dialects.responses-limit", "A response that `max_output_tokens` cut is incomplete")
async def responses_limit(talk: Talk) -> None:
    found = (await _respond(talk, max_output_tokens=16, input=f"{PROMPT} nine ten")).body
    if found["status"] == "incomplete" and (
        found["incomplete_details"]["reason"] != "max_output_tokens"
    ):
        raise Broken(f"because of {found['incomplete_details']}")
    if found["status"] == "completed" and found["usage"]["output_tokens"] > 16:
        raise Broken(f"it has {found['usage']['output_tokens']} tokens")


@check("dialects.responses-error", "An unknown field of a response is refused by name")
async def responses_error(talk: Talk) -> None:
    body = {"model": talk.model, "input": PROMPT, "max_output_tokens": 16, "no_such_field": 1}
    (await talk.ask(RESPONSES, body)).refused("no_such_field")


@check("dialects.messages", "`/v1/messages` answers a message")
async def messages(talk: Talk) -> None:
    found = (await _message(talk)).read(Message)
    if not found.usage.input_tokens or found.usage.output_tokens > 8:
        raise Broken(f"of at most 8 tokens it says {found.usage}")


@check("dialects.messages-stream", "Its events come in the order that SDKs need")
async def messages_stream(talk: Talk) -> None:
    answer = await _message(talk, stream=True)
    names = [event.name for event in answer.events if event.name != "ping"]
    if any(event.json["type"] != event.name for event in answer.events):
        raise Broken("an event's name is not its type")
    kept = [name for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
    wanted = [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    if kept != wanted:
        raise Broken(f"they come as {', '.join(kept)}")


@check("dialects.messages-usage", "A message's stream says what it took at its end")
async def messages_usage(talk: Talk) -> None:
    events = [event.json for event in (await _message(talk, stream=True)).events]
    (last,) = [event for event in events if event["type"] == "message_delta"]
    if not 1 <= last["usage"]["output_tokens"] <= 8:
        raise Broken(f"of at most 8 tokens it says {last['usage']}")
    if last["delta"]["stop_reason"] not in ("end_turn", "max_tokens"):
        raise Broken(f"ends by {last['delta']}")


@check("dialects.messages-error", "A mistake in a message is an error in Anthropic's shape")
async def messages_error(talk: Talk) -> None:
    answer = await talk.ask(MESSAGES, {"model": talk.model, "messages": [], "max_tokens": 4})
    answer.refused()
    error: dict[str, Any] = answer.body
    if error["type"] != "error" or error["error"]["type"] != "invalid_request_error":
        raise Broken(f"it is {error}")


@check("dialects.count-tokens", "`/v1/messages/count_tokens` counts a prompt")
async def count_tokens(talk: Talk) -> None:
    asked = [{"role": "user", "content": PROMPT}]
    answer = await talk.ask(f"{MESSAGES}/count_tokens", {"model": talk.model, "messages": asked})
    if answer.refuses("messages"):
        raise Lacking(answer.told())
    counted = _told(answer).body["input_tokens"]
    usage = (await _message(talk)).body["usage"]
    # What came from the cache is counted apart.
    taken = usage["input_tokens"] + (usage.get("cache_read_input_tokens") or 0)
    if counted != taken:
        raise Broken(f"it counts {counted}, the message's usage {taken}")


async def _respond(talk: Talk, **fields: Any) -> Answer:
    body = {
        "model": talk.model,
        "input": PROMPT,
        "max_output_tokens": 16,
        "temperature": 0,
        **fields,
    }
    return (await talk.ask(RESPONSES, body)).expect()


async def _message(talk: Talk, **fields: Any) -> Answer:
    asked = [{"role": "user", "content": PROMPT}]
    body = {"model": talk.model, "messages": asked, "max_tokens": 8, **fields}
    return _told(await talk.ask(MESSAGES, body))


def _told(answer: Answer) -> Answer:
    """Anthropic's errors have no code: what nobody can do is told by its words."""
    return answer.expect("no backend of")
