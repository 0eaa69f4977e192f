"""OpenAI's Responses API on the way in: ``POST /v1/responses``.

Translated into the chat dialect, field by field (``docs/dialects.md``); what has no counterpart
there is refused by name. Source: OpenAI's API reference and the types of its Python SDK 3.54.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import msgspec
from msgspec import Raw, Struct

from forebay.api import Request, RequestError
from forebay.config import Limits
from forebay.http.decode import parse
from forebay.http.reply import Arrival, Dialect, Reply, openai_error
from forebay.http.response_store import ResponseStore, Stored, UnknownResponse
from forebay.http.responses_reply import ResponseReply
from forebay.http.segments import translated

_NAMES = {
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
}
_ROLES = frozenset({"user", "assistant", "system", "developer"})


class Part(Struct):
    """Any content part; which fields are there depends on ``type``."""

    type: str
    text: str = ""
    refusal: str = ""
    image_url: str | None = None
    detail: str | None = None


class Item(Struct):
    """Any input item; which fields are there depends on ``type``."""

    type: str = "message"
    role: str = ""
    content: str | tuple[Part, ...] | None = None
    call_id: str = ""
    name: str = ""
    arguments: str = ""
    output: str | tuple[Part, ...] = ""


class Tool(Struct, kw_only=True):
    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, Raw] | None = None
    strict: bool | None = None


class Choice(Struct):
    type: str
    name: str = ""


class Format(Struct):
    type: str = "text"
    name: str = ""
    schema: dict[str, Raw] | None = None
    description: str | None = None
    strict: bool | None = None


class Text(Struct, frozen=True, forbid_unknown_fields=True):
    format: Format | None = None
    verbosity: str | None = None


class Reasoning(Struct, frozen=True, forbid_unknown_fields=True):
    effort: str | None = None
    summary: None = None


class Create(Struct, kw_only=True, forbid_unknown_fields=True):
    model: str
    input: str | tuple[Item, ...]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: tuple[Tool, ...] | None = None
    tool_choice: str | Choice | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: Raw = Raw(b"null")
    metadata: dict[str, str] | None = None
    include: tuple[str, ...] | None = None
    truncation: str | None = None
    background: bool | None = None
    top_logprobs: int | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None


_CREATE = msgspec.json.Decoder(Create)
_encode = msgspec.json.encode


def responses_dialect(store: ResponseStore) -> Dialect:
    return Dialect("chat", "/v1/responses", partial(decode_response, store), openai_error)


def decode_response(
    store: ResponseStore, arrival: Arrival, limits: Limits
) -> tuple[Request, Reply]:
    """Decode ``POST /v1/responses``.

    :raises RequestError: naming the field in ``param``.
    """
    parsed, fields = parse(_CREATE, arrival.body, limits)
    _refuse(parsed)
    history = _history(store, arrival.identity.tenant, parsed.previous_response_id)
    said = [_encode(message) for message in _chat(parsed.input)]
    messages = [Raw(message) for message in (*history, *said)]
    if parsed.instructions:
        messages.insert(0, Raw(_encode({"role": "system", "content": parsed.instructions})))
    request = translated(arrival, {**_options(parsed), "messages": messages}, limits, _NAMES)
    response_id = f"resp_{os.urandom(16).hex()}"

    def keep(body: bytes, answer: Mapping[str, object]) -> None:
        conversation = (*history, *said, _encode(answer))
        store.put(request.identity.tenant, response_id, Stored(body, conversation))

    head = _head(response_id, arrival.created, parsed, fields)
    return request, ResponseReply(request, head, None if parsed.store is False else keep)


def _refuse(parsed: Create) -> None:
    """What would change the answer, or its form, and has no counterpart."""
    if parsed.background:
        raise RequestError("no work is done in the background here", param="background")
    if parsed.include:
        raise RequestError("nothing further can be included", param="include")
    if parsed.truncation not in (None, "disabled"):
        raise RequestError("only `disabled`: nothing is cut from the input", param="truncation")
    if parsed.top_logprobs:
        raise RequestError(
            "not in this dialect; /v1/chat/completions has them", param="top_logprobs"
        )


def _history(store: ResponseStore, tenant: str, previous: str | None) -> tuple[bytes, ...]:
    if previous is None:
        return ()
    try:
        return store.get(tenant, previous).messages
    except UnknownResponse as unknown:
        raise RequestError(
            unknown.message, param="previous_response_id", code="previous_response_not_found"
        ) from None


def _options(parsed: Create) -> dict[str, object]:
    """All but the messages, as fields of a chat body; None: not there."""
    text, reasoning = parsed.text or Text(), parsed.reasoning or Reasoning()
    return {
        "model": parsed.model,
        "stream": bool(parsed.stream),
        "max_tokens": parsed.max_output_tokens,
        "temperature": parsed.temperature,
        "top_p": parsed.top_p,
        "tools": [_function(i, tool) for i, tool in enumerate(parsed.tools or ())] or None,
        "tool_choice": _choice(parsed.tool_choice) if parsed.tools else None,
        "parallel_tool_calls": parsed.parallel_tool_calls if parsed.tools else None,
        "response_format": _response_format(text.format) if text.format else None,
        "verbosity": text.verbosity,
        "reasoning_effort": reasoning.effort,
        "user": parsed.user,
        "safety_identifier": parsed.safety_identifier,
        "prompt_cache_key": parsed.prompt_cache_key,
    }


def _present(**fields: object) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value is not None}


def _function(index: int, tool: Tool) -> dict[str, object]:
    if tool.type != "function":
        raise RequestError(
            f"the tool {tool.type!r} is built into OpenAI's service; only functions are translated",
            param=f"tools[{index}].type",
        )
    function = _present(
        name=tool.name,
        description=tool.description,
        parameters=tool.parameters,
        strict=tool.strict,
    )
    return {"type": "function", "function": function}


def _choice(choice: str | Choice | None) -> object:
    if choice is None or choice in ("auto", "none", "required"):
        return choice
    if isinstance(choice, str) or choice.type != "function":
        raise RequestError(
            "must be auto, none, required, or a function by its name", param="tool_choice"
        )
    return {"type": "function", "function": {"name": choice.name}}


def _response_format(wanted: Format) -> dict[str, object] | None:
    match wanted.type:
        case "text":
            return None
        case "json_object":
            return {"type": "json_object"}
        case "json_schema" if wanted.schema is not None and wanted.name:
            schema = _present(
                name=wanted.name,
                schema=wanted.schema,
                description=wanted.description,
                strict=wanted.strict,
            )
            return {"type": "json_schema", "json_schema": schema}
    raise RequestError(
        "must be text, json_object, or json_schema with name and schema", param="text.format"
    )


def _chat(given: str | tuple[Item, ...]) -> list[dict[str, Any]]:
    """Input items as chat messages; calls join the assistant's message before them.

    Earlier reasoning is left out: the chat dialect has no place for it.
    """
    items = (Item(role="user", content=given),) if isinstance(given, str) else given
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        where = f"input[{index}]"
        match item.type:
            case "message":
                messages.append(_message(item, where))
            case "function_call":
                _add_call(item, messages)
            case "function_call_output":
                text = _plain(item.output, f"{where}.output")
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text})
            case "reasoning":
                pass
            case _:
                raise RequestError(
                    f"an item of type {item.type!r} cannot be translated; messages, function "
                    "calls and their outputs can",
                    param=f"{where}.type",
                )
    return messages


def _message(item: Item, where: str) -> dict[str, Any]:
    if item.role not in _ROLES:
        raise RequestError(f"must be one of {', '.join(sorted(_ROLES))}", param=f"{where}.role")
    content = item.content or ""
    if isinstance(content, str):
        return {"role": item.role, "content": content}
    if item.role == "assistant":
        return {"role": item.role, "content": _plain(content, f"{where}.content")}
    parts = [_part(part, f"{where}.content[{index}]") for index, part in enumerate(content)]
    if len(parts) == 1 and parts[0]["type"] == "text":
        return {"role": item.role, "content": parts[0]["text"]}
    return {"role": item.role, "content": parts}


def _add_call(item: Item, messages: list[dict[str, Any]]) -> None:
    function = {"name": item.name, "arguments": item.arguments}
    call = {"id": item.call_id, "type": "function", "function": function}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    messages[-1].setdefault("tool_calls", []).append(call)


def _plain(content: str | Iterable[Part], where: str) -> str:
    """Content of which only text can be carried on."""
    if isinstance(content, str):
        return content
    parts = [_part(part, f"{where}[{index}]") for index, part in enumerate(content)]
    for index, part in enumerate(parts):
        if part["type"] != "text":
            raise RequestError("only text can stand here", param=f"{where}[{index}].type")
    return "".join(part["text"] for part in parts)


def _part(part: Part, where: str) -> dict[str, Any]:
    match part.type:
        case "input_text" | "output_text" | "text":
            return {"type": "text", "text": part.text}
        case "refusal":
            return {"type": "text", "text": part.refusal}
        case "input_image" if part.image_url:
            return {
                "type": "image_url",
                "image_url": _present(url=part.image_url, detail=part.detail),
            }
    raise RequestError(
        f"a part of type {part.type!r} cannot be translated; text and images by URL can",
        param=f"{where}.type",
    )


def _head(
    response_id: str, created: int, parsed: Create, fields: Mapping[str, Raw]
) -> dict[str, object]:
    """The fields of a response object that stay the same from the first event to the last."""
    text, reasoning = parsed.text or Text(), parsed.reasoning or Reasoning()
    return {
        "id": response_id,
        "object": "response",
        "created_at": created,
        "model": parsed.model,
        "background": False,
        "instructions": parsed.instructions,
        "max_output_tokens": parsed.max_output_tokens,
        "metadata": parsed.metadata or {},
        "parallel_tool_calls": parsed.parallel_tool_calls is not False,
        "previous_response_id": parsed.previous_response_id,
        "reasoning": {"effort": reasoning.effort, "summary": None},
        "store": parsed.store is not False,
        "temperature": parsed.temperature,
        "text": fields["text"] if text.format else {"format": {"type": "text"}},
        "tool_choice": fields["tool_choice"] if parsed.tool_choice else "auto",
        "tools": fields["tools"] if parsed.tools else [],
        "top_p": parsed.top_p,
        "truncation": "disabled",
        "user": parsed.user,
    }
