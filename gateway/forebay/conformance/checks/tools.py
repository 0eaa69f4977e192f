"""Tools: calls have the form that clients run them by."""

from __future__ import annotations

from typing import Any

import msgspec

from forebay.conformance.answer import Answer, Broken, Call, Lacking
from forebay.conformance.check import check
from forebay.conformance.talk import Talk

_PROMPT = "What is the weather in Oslo?"
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
_FORCED = {"type": "function", "function": {"name": "weather"}}
_FIELDS = ("tools", "tool_choice", "tool")


@check("tools.forced", "A function that is forced is called, with JSON arguments")
async def forced(talk: Talk) -> None:
    _called(await _ask(talk, tool_choice=_FORCED))


@check("tools.arguments", "The arguments keep to the function's parameters")
async def arguments(talk: Talk) -> None:
    given = _called(await _ask(talk, tool_choice=_FORCED))
    if given.get("city") not in ("Oslo", "Rome") or len(given) != 1:
        raise Broken(f"they are {given}")


@check("tools.required", "With `required` one is called, and the finish is `tool_calls`")
async def required(talk: Talk) -> None:
    answer = await _ask(talk, tool_choice="required")
    _called(answer)
    if answer.choice.finish != "tool_calls":
        raise Broken(f"it is {answer.choice.finish!r}")


@check("tools.stream", "Streamed: id and name once, arguments in pieces that join to JSON")
async def stream(talk: Talk) -> None:
    _called(await _ask(talk, tool_choice=_FORCED, stream=True))


@check("tools.auto", "With `auto` the model may answer either way", claim="tools")
async def auto(talk: Talk) -> None:
    answer = await _ask(talk, tool_choice="auto", max_tokens=12)
    if not answer.choice.finish:
        raise Broken("the answer is not finished")


@check("tools.none", "With `none` no function is called")
async def none(talk: Talk) -> None:
    if (await _ask(talk, tool_choice="none", max_tokens=8)).choice.calls:
        raise Broken("one is called")


@check("tools.result", "The result of a call is taken, and answered")
async def result(talk: Talk) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
    }
    messages = [
        {"role": "user", "content": _PROMPT},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Rain"},
    ]
    answer = await talk.chat(messages=messages, tools=_TOOLS, tool_choice="none")
    if not answer.expect(*_FIELDS, "messages").choice.finish:
        raise Broken("the answer is not finished")


@check("tools.empty", "An empty list of tools is refused, or is none")
async def empty(talk: Talk) -> None:
    answer = await talk.chat(tools=[])
    if answer.status != 200:
        answer.refused("tools")


@check("tools.malformed", "A tool without a name is refused with a 400")
async def malformed(talk: Talk) -> None:
    tools = [{"type": "function", "function": {"description": "nameless"}}]
    answer = await talk.chat(tools=tools, tool_choice="required")
    if answer.error.get("code") == "unsupported":
        raise Lacking(answer.told())
    if answer.status not in (400, 422):
        raise Broken(f"expected HTTP 400, got {answer.told()}")


async def _ask(talk: Talk, **fields: Any) -> Answer:
    answer = await talk.chat(_PROMPT, tools=_TOOLS, **{"max_tokens": 64, **fields})
    return answer.expect(*_FIELDS)


def _called(answer: Answer) -> dict[str, Any]:
    """The arguments of the one call."""
    calls = answer.choice.calls
    if not calls and not answer.text and answer.choice.finish == "length":
        # Some servers tell of no call before its end, and small models fill it with blanks.
        raise Lacking("the model did not end its call within the limit, so there is none to see")
    if len(calls) != 1:
        raise Broken(f"{len(calls)} calls; the text is {answer.text[:60]!r}")
    pieces = calls[0]
    _once("id", [piece.id for piece in pieces if piece.id])
    name = _once("name", [piece.function.name for piece in pieces if piece.function.name])
    if name != "weather":
        raise Broken(f"calls {name!r}")
    if answer.choice.finish not in ("tool_calls", "stop"):
        raise Broken(f"ends by {answer.choice.finish!r}")
    return _arguments(pieces)


def _once(what: str, found: list[str]) -> str:
    if len(found) != 1:
        raise Broken(f"the {what} of the call comes {len(found)} times")
    return found[0]


def _arguments(pieces: list[Call]) -> dict[str, Any]:
    text = "".join(piece.function.arguments or "" for piece in pieces)
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError:
        raise Broken(f"the arguments are no JSON object: {text[:80]!r}") from None
