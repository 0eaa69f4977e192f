"""Anthropic's Messages API on the way in: ``/v1/messages`` and ``/v1/messages/count_tokens``.

Translated into the chat dialect, field by field (``docs/dialects.md``); what has no counterpart
there is refused by name. Source: Anthropic's API reference and the types of its Python SDK 2.12.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec
from msgspec import Raw, Struct

from forebay.api import Request, RequestError, TokenizeRequest
from forebay.config import Limits
from forebay.http.anthropic_reply import CountReply, MessageReply, error_body, status
from forebay.http.decode import parse
from forebay.http.reply import Arrival, Dialect, Reply
from forebay.http.segments import as_text, translated

_NAMES = {"stop": "stop_sequences", "reasoning_effort": "output_config.effort"}


class Source(Struct):
    type: str
    media_type: str = ""
    data: str = ""
    url: str = ""


class Block(Struct):
    """Any content block; which fields are there depends on ``type``."""

    type: str
    text: str = ""
    source: Source | None = None
    id: str = ""
    name: str = ""
    input: Raw = Raw(b"{}")
    tool_use_id: str = ""
    content: str | tuple[Block, ...] = ""
    is_error: bool | None = None


class Turn(Struct):
    role: Literal["user", "assistant"]
    content: str | tuple[Block, ...]


class Tool(Struct, kw_only=True, forbid_unknown_fields=True):
    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Raw] | None = None
    strict: bool | None = None
    cache_control: Raw = Raw(b"null")
    eager_input_streaming: bool | None = None


class ToolChoice(Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Format(Struct):
    type: Literal["json_schema"]
    schema: Raw


class OutputConfig(Struct, frozen=True, forbid_unknown_fields=True):
    effort: str | None = None
    format: Format | None = None


class Thinking(Struct):
    type: str


class Metadata(Struct):
    user_id: str | None = None


class Prompt(Struct, kw_only=True, forbid_unknown_fields=True):
    """What both routes take."""

    model: str
    messages: tuple[Turn, ...]
    system: str | tuple[Block, ...] = ""
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig = OutputConfig()
    cache_control: Raw = Raw(b"null")


class Create(Prompt, kw_only=True):
    max_tokens: int
    stop_sequences: tuple[str, ...] = ()
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


_CREATE = msgspec.json.Decoder(Create)
_PROMPT = msgspec.json.Decoder(Prompt)


def decode_message(arrival: Arrival, limits: Limits) -> tuple[Request, Reply]:
    """Decode ``/v1/messages``.

    :raises RequestError: naming the field in ``param``.
    """
    parsed, _ = parse(_CREATE, arrival.body, limits)
    body = {
        **_prompt(parsed),
        "max_tokens": parsed.max_tokens,
        "stop": parsed.stop_sequences or None,
        "stream": parsed.stream,
        "temperature": parsed.temperature,
        "top_p": parsed.top_p,
        "top_k": parsed.top_k,
        "user": parsed.metadata.user_id if parsed.metadata else None,
    }
    request = translated(arrival, body, limits, _NAMES)
    return request, MessageReply(request)


def decode_count(arrival: Arrival, limits: Limits) -> tuple[Request, Reply]:
    """Decode ``/v1/messages/count_tokens``.

    :raises RequestError: naming the field in ``param``.
    """
    parsed, _ = parse(_PROMPT, arrival.body, limits)
    chat = translated(arrival, _prompt(parsed), limits, _NAMES)
    if chat.needs_multimodal:
        raise RequestError("only the tokens of text can be counted", param="messages")
    request = TokenizeRequest(
        id=chat.id,
        model=chat.model,
        created=chat.created,
        identity=chat.identity,
        chat=chat.messages,
        add_special_tokens=False,  # the chat template writes them
        fields=chat.fields,
        extra=("tools",) if parsed.tools else (),
    )
    return request, CountReply()


DIALECTS = (
    Dialect("chat", "/v1/messages", decode_message, error_body, status),
    Dialect("tokenize", "/v1/messages/count_tokens", decode_count, error_body, status),
)


def _prompt(parsed: Prompt) -> dict[str, object]:
    """The fields of both routes as those of a chat body; None: not there."""
    if not parsed.messages or parsed.messages[-1].role != "user":
        raise RequestError(
            "the last message must be the user's: an assistant's cannot be continued here",
            param="messages",
        )
    if parsed.thinking is not None and parsed.thinking.type != "disabled":
        raise RequestError(
            "a budget for thinking cannot be carried to other models; leave it out, and models "
            "that think do so on their own",
            param="thinking",
        )
    choice, config = parsed.tool_choice, parsed.output_config
    return {
        "model": parsed.model,
        "messages": [*_system(parsed.system), *_chat(parsed.messages)],
        "tools": [_function(index, tool) for index, tool in enumerate(parsed.tools)] or None,
        "tool_choice": _choice(choice) if choice else None,
        "parallel_tool_calls": False if choice and choice.disable_parallel_tool_use else None,
        "reasoning_effort": config.effort,
        "response_format": _response_format(config.format) if config.format else None,
    }


def _system(system: str | tuple[Block, ...]) -> Iterator[dict[str, object]]:
    if isinstance(system, str):
        text = system
    else:
        for index, block in enumerate(system):
            if block.type != "text":
                raise _no_block(block, f"system[{index}]")
        text = "\n\n".join(block.text for block in system)
    if text:
        yield {"role": "system", "content": text}


def _chat(turns: tuple[Turn, ...]) -> Iterator[dict[str, object]]:
    for index, turn in enumerate(turns):
        where = f"messages[{index}].content"
        blocks = (Block("text", turn.content),) if isinstance(turn.content, str) else turn.content
        if turn.role == "assistant":
            yield _assistant(blocks, where)
        else:
            yield from _user(blocks, where)


def _assistant(blocks: tuple[Block, ...], where: str) -> dict[str, object]:
    """Earlier thinking is left out, as Anthropic leaves it out of its own models' prompts."""
    text: list[str] = []
    calls: list[dict[str, object]] = []
    for index, block in enumerate(blocks):
        match block.type:
            case "text":
                text.append(block.text)
            case "tool_use":
                function = {"name": block.name, "arguments": as_text(block.input)}
                calls.append({"id": block.id, "type": "function", "function": function})
            case "thinking" | "redacted_thinking":
                pass
            case _:
                raise _no_block(block, f"{where}[{index}]")
    message: dict[str, object] = {"role": "assistant", "content": "".join(text)}
    if calls:
        message["tool_calls"] = calls
        message["content"] = message["content"] or None
    return message


def _user(blocks: tuple[Block, ...], where: str) -> Iterator[dict[str, object]]:
    """Results of tools first, each a message of its own; what else there is as one message."""
    parts: list[dict[str, Any]] = []
    for index, block in enumerate(blocks):
        at = f"{where}[{index}]"
        if block.type == "tool_result":
            result, images = _result(block, at)
            parts += images
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": result}
        else:
            parts.append(_part(block, at))
    if len(parts) == 1 and parts[0]["type"] == "text":
        yield {"role": "user", "content": parts[0]["text"]}
    elif parts:
        yield {"role": "user", "content": parts}


def _result(block: Block, where: str) -> tuple[str, list[dict[str, Any]]]:
    """The text of a tool's result, and its images, which a tool message cannot hold."""
    content = block.content
    inner = (Block("text", content),) if isinstance(content, str) else content
    parts = [_part(part, f"{where}.content[{index}]") for index, part in enumerate(inner)]
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    images = [part for part in parts if part["type"] != "text"]
    return (f"Error: {text}" if block.is_error else text), images


def _part(block: Block, where: str) -> dict[str, Any]:
    if block.type == "text":
        return {"type": "text", "text": block.text}
    if block.type != "image" or block.source is None:
        raise _no_block(block, where)
    source = block.source
    match source.type:
        case "base64":
            url = f"data:{source.media_type};base64,{source.data}"
        case "url":
            url = source.url
        case _:
            raise RequestError(
                f"an image from {source.type!r} is not supported; send it as base64 or url",
                param=f"{where}.source.type",
            )
    return {"type": "image_url", "image_url": {"url": url}}


def _no_block(block: Block, where: str) -> RequestError:
    return RequestError(
        f"a block of type {block.type!r} cannot stand here; text, images, tool_use and "
        "tool_result are translated",
        param=f"{where}.type",
    )


def _function(index: int, tool: Tool) -> dict[str, object]:
    if tool.type not in (None, "custom") or tool.input_schema is None:
        raise RequestError(
            f"the tool {tool.type!r} runs at Anthropic; only tools with an input_schema are "
            "translated",
            param=f"tools[{index}].type",
        )
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
        "strict": tool.strict,
    }
    present = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", "function": present}


def _choice(choice: ToolChoice) -> object:
    if choice.type != "tool":
        return "required" if choice.type == "any" else choice.type
    if choice.name is None:
        raise RequestError("names the tool where the type is `tool`", param="tool_choice.name")
    return {"type": "function", "function": {"name": choice.name}}


def _response_format(format_: Format) -> Mapping[str, object]:
    schema = {"name": "output", "schema": format_.schema, "strict": True}
    return {"type": "json_schema", "json_schema": schema}
