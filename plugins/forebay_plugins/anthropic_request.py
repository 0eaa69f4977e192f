"""A chat request in the words of Anthropic's Messages API.

System messages go to ``system``; an assistant's calls become ``tool_use`` blocks, and the messages
of tools ``tool_result`` blocks of the user. Neighbours of one role are joined, as the API wants
the roles to alternate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from forebay.api import BackendLacks, ContentPart, GenerateRequest, Message
from forebay_plugins.message_parts import image_of, parts_of

__all__ = ["body_of"]

#: Sampling fields without a counterpart, and the values that change nothing.
_UNKNOWN: dict[str, tuple[object, ...]] = {
    "seed": (None,),
    "logprobs": (None,),
    "min_p": (None, 0.0),
    "frequency_penalty": (None, 0.0),
    "presence_penalty": (None, 0.0),
    "repetition_penalty": (None, 1.0),
    "min_tokens": (0,),
    "ignore_eos": (False,),
}
_CHOICES = {"auto": "auto", "none": "none", "required": "any"}
Block = dict[str, Any]


def refused(field: str, why: str) -> BackendLacks:
    return BackendLacks(f"the Anthropic backend cannot take this field: {why}", param=field)


def body_of(request: GenerateRequest, model: str, max_tokens: int) -> dict[str, object]:
    """The body for a request; ``max_tokens`` where the client sets none.

    :raises BackendLacks: a field has no counterpart there.
    """
    _refuse(request)
    sampling = request.sampling
    system, messages = _messages(request.messages)
    body: dict[str, object] = {
        "model": model,
        "messages": messages,
        "max_tokens": sampling.max_tokens or max_tokens,
        "stream": True,
    }
    optional = {
        "system": system,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k if sampling.top_k and sampling.top_k > 0 else None,
        "stop_sequences": sampling.stop,
    }
    body |= {name: value for name, value in optional.items() if value not in (None, "", ())}
    if bytes(request.fields.get("tools", b"null")) != b"null":
        body |= _tools(request)
    return body


def _refuse(request: GenerateRequest) -> None:
    for field, harmless in _UNKNOWN.items():
        if getattr(request.sampling, field) not in harmless:
            raise refused(field, "it is not known there")
    temperature = request.sampling.temperature
    refusals = (
        (request.endpoint != "chat", "prompt", "it serves chats only"),
        (request.n > 1, "n", "it gives one choice"),
        (
            temperature is not None and temperature > 1,
            "temperature",
            "it must be at most 1 there",
        ),
        (request.needs_schema, "response_format", "it is not known there"),
        (bool(request.extra), next(iter(request.extra), ""), "it is not known there"),
    )
    for wrong, field, why in refusals:
        if wrong:
            raise refused(field, why)


def _messages(messages: tuple[Message, ...]) -> tuple[str, list[Block]]:
    """The system prompt, and the turns."""
    system: list[str] = []
    turns: list[Block] = []
    for message in messages:
        if message.role in ("system", "developer"):
            system.append(_text(message))
            continue
        role = "assistant" if message.role == "assistant" else "user"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += _blocks(message)
        else:
            turns.append({"role": role, "content": _blocks(message)})
    if not turns:
        raise refused("messages", "there must be one that is not of the system")
    return "\n\n".join(system), turns


def _blocks(message: Message) -> list[Block]:
    if message.role == "function":
        raise refused("messages", "a message of role function is not known; use role tool")
    if message.role == "tool":
        if not message.tool_call_id:
            raise refused("messages", "a message of role tool needs its tool_call_id")
        text = _text(message)
        return [{"type": "tool_result", "tool_use_id": message.tool_call_id, "content": text}]
    # It refuses texts without a character.
    parts = [part for part in parts_of(message) if part.type != "text" or part.text]
    blocks = [_block(part) for part in parts]
    return blocks + [_call(msgspec.json.decode(call)) for call in message.tool_calls or ()]


def _block(part: ContentPart) -> Block:
    if part.type == "text":
        return {"type": "text", "text": part.text or ""}
    image = image_of(part, "Anthropic")
    if isinstance(image, str):
        return {"type": "image", "source": {"type": "url", "url": image}}
    source = {"type": "base64", "media_type": image.media_type, "data": image.data}
    return {"type": "image", "source": source}


def _text(message: Message) -> str:
    if isinstance(message.content, tuple) and any(p.type != "text" for p in message.content):
        raise refused("messages", "only the user's messages may hold parts that are not text")
    return message.text()


def _call(call: Any) -> Block:
    try:
        function = call["function"]
        arguments = msgspec.json.decode(function["arguments"] or "{}", type=dict[str, Any])
        return {
            "type": "tool_use",
            "id": call["id"],
            "name": function["name"],
            "input": arguments,
        }
    except (KeyError, TypeError, msgspec.DecodeError):
        raise refused("messages", "a tool call lacks id, name, or a JSON object") from None


def _tools(request: GenerateRequest) -> dict[str, object]:
    tools = msgspec.json.decode(msgspec.json.encode(request.fields["tools"]))
    body: dict[str, object] = {"tools": [_tool(tool) for tool in tools]}
    choice = _choice(request.fields)
    if bytes(request.fields.get("parallel_tool_calls", b"null")) == b"false":
        choice = choice or {"type": "auto"}
        if choice["type"] != "none":
            choice["disable_parallel_tool_use"] = True
    return {**body, "tool_choice": choice} if choice else body


def _tool(tool: Any) -> Block:
    try:
        function = tool["function"]
        made = {
            "name": function["name"],
            "input_schema": function.get("parameters") or {"type": "object", "properties": {}},
        }
    except (KeyError, TypeError, AttributeError):
        raise refused("tools", "each must be a function with a name") from None
    for name in ("description", "strict"):
        if function.get(name):
            made[name] = function[name]
    return made


def _choice(fields: Mapping[str, msgspec.Raw]) -> Block | None:
    choice = msgspec.json.decode(fields["tool_choice"]) if "tool_choice" in fields else None
    if choice is None:
        return None
    if isinstance(choice, str) and choice in _CHOICES:
        return {"type": _CHOICES[choice]}
    try:
        return {"type": "tool", "name": choice["function"]["name"]}
    except (KeyError, TypeError):
        raise refused("tool_choice", "it is no mode, and names no function") from None
