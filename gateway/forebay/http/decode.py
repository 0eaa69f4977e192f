"""From bytes to a valid request: the only place that sees the client's JSON.

Source of the fields and bounds: OpenAI's API reference for chat completions and completions, plus
the sampling fields that vLLM, SGLang and llama.cpp share (`top_k`, `min_p`, ...).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Raw, Struct

from forebay.api import GenerateRequest, Message, Request, RequestError, Sampling
from forebay.config import Limits
from forebay.http.encode import OpenAIReply
from forebay.http.reply import Arrival, Reply

_FIELDS = msgspec.json.Decoder(dict[str, Raw])
_PATH = re.compile(r" - at `\$\.?(.*)`$")
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]')


class StreamOptions(Struct):
    include_usage: bool | None = None


class Typed(Struct):
    """Just the tag of an object such as ``response_format``."""

    type: str = "text"


class Body(Struct, kw_only=True):
    """Fields of both endpoints. ``null`` always means: not said."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | tuple[str, ...] | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    response_format: Typed | None = None


class ChatBody(Body, kw_only=True):
    messages: tuple[Message, ...]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: tuple[Raw, ...] | None = None
    tool_choice: Raw = Raw(b"null")


class CompletionBody(Body, kw_only=True):
    # A text, texts, token ids, or lists of token ids; `_prompts` refuses a mixture.
    prompt: str | tuple[str | int | tuple[int, ...], ...]
    logprobs: int | None = None
    echo: bool | None = None


# Fields that do not change the text of the answer: every backend may ignore them.
HARMLESS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
_NOTHING = frozenset({b"null", b"{}", b"[]"})
_CHAT_NAMES = frozenset(ChatBody.__struct_fields__) | HARMLESS
_COMPLETION_NAMES = frozenset(CompletionBody.__struct_fields__) | HARMLESS
_CHAT = msgspec.json.Decoder(ChatBody)
_COMPLETION = msgspec.json.Decoder(CompletionBody)

# (field, least, greatest); None: unbounded. OpenAI bounds temperature by 2; engines do not.
_RANGES: tuple[tuple[str, float, float | None], ...] = (
    ("temperature", 0.0, None),
    ("top_p", 0.0, 1.0),
    ("top_k", -1, None),
    ("min_p", 0.0, 1.0),
    ("frequency_penalty", -2.0, 2.0),
    ("presence_penalty", -2.0, 2.0),
    ("repetition_penalty", 0.0, None),
    ("min_tokens", 0, None),
    ("top_logprobs", 0, 20),
)


def decode_chat(arrival: Arrival, limits: Limits) -> tuple[Request, Reply]:
    """Decode ``/v1/chat/completions``.

    :raises RequestError: naming the field in ``param``.
    """
    request = chat_request(arrival, limits)
    return request, OpenAIReply(request)


def chat_request(arrival: Arrival, limits: Limits) -> GenerateRequest:
    """The request in a chat body.

    :raises RequestError: naming the field in ``param``.
    """
    parsed, fields = parse(_CHAT, arrival.body, limits)
    if b'"reasoning"' in arrival.body:
        body = msgspec.json.encode({**fields, "messages": _one_reasoning(fields["messages"])})
        parsed, fields = parse(_CHAT, body, limits)
    if not parsed.messages:
        raise RequestError("must have at least one message", param="messages")
    if parsed.max_completion_tokens is not None:
        parsed.max_tokens = parsed.max_completion_tokens
    if parsed.top_logprobs is not None and not parsed.logprobs:
        raise RequestError("needs `logprobs: true`", param="top_logprobs")
    logprobs = (parsed.top_logprobs or 0) if parsed.logprobs else None
    tools = parsed.tools or ()
    if parsed.tools is not None and not tools:
        raise RequestError("must not be empty; leave it out instead", param="tools")
    return GenerateRequest(
        id=arrival.request_id,
        endpoint="chat",
        created=arrival.created,
        messages=parsed.messages,
        needs_tools=bool(tools) and bytes(fields.get("tool_choice", b"")) != b'"none"',
        needs_multimodal=any(
            part.type != "text"
            for message in parsed.messages
            if isinstance(message.content, tuple)
            for part in message.content
        ),
        extra=extra_fields(fields, _CHAT_NAMES),
        fields=fields,
        identity=arrival.identity,
        **_common(parsed, limits, logprobs, choices=parsed.n or 1),
    )


def _one_reasoning(messages: Raw) -> list[dict[str, Raw]]:
    """Clients send back what they were given, by the name that their server gave it."""
    renamed = msgspec.json.decode(messages, type=list[dict[str, Raw]])
    for message in renamed:
        if "reasoning" in message:
            reasoning = message.pop("reasoning")
            message.setdefault("reasoning_content", reasoning)
    return renamed


def decode_completion(arrival: Arrival, limits: Limits) -> tuple[Request, Reply]:
    """Decode ``/v1/completions``.

    :raises RequestError: naming the field in ``param``.
    """
    parsed, fields = parse(_COMPLETION, arrival.body, limits)
    prompts = _prompts(parsed.prompt)
    if parsed.logprobs is not None and not 0 <= parsed.logprobs <= 20:
        raise RequestError("must be between 0 and 20", param="logprobs")
    request = GenerateRequest(
        id=arrival.request_id,
        endpoint="completions",
        created=arrival.created,
        prompts=prompts,
        echo=bool(parsed.echo),
        extra=extra_fields(fields, _COMPLETION_NAMES),
        fields=fields,
        identity=arrival.identity,
        **_common(parsed, limits, parsed.logprobs, choices=(parsed.n or 1) * len(prompts)),
    )
    return request, OpenAIReply(request)


def _prompts(prompt: Any) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if not prompt:
        raise RequestError("must not be an empty list", param="prompt")
    if len({type(item) for item in prompt}) > 1:
        raise RequestError("must not mix texts and token ids", param="prompt")
    return (prompt,) if isinstance(prompt[0], int) else prompt


def parse(decoder: Any, body: bytes, limits: Limits) -> tuple[Any, Mapping[str, Raw]]:
    """The body by the decoder of its type, and its top-level fields as they came.

    :raises RequestError: it is not JSON, or not of that type; naming the field in ``param``.
    """
    check_depth(body, limits.json_depth)
    try:
        return decoder.decode(body), _FIELDS.decode(body)
    except msgspec.ValidationError as error:
        text = str(error)
        where = _PATH.search(text)
        named = re.search(r"(?:missing required|unknown) field `(\w+)`", text)
        param = where.group(1) if where else None
        if named:
            param = f"{param}.{named.group(1)}" if param else named.group(1)
        raise RequestError(_PATH.sub("", text), param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None


def check_depth(body: bytes, limit: int) -> None:
    """Refuse JSON nested deeper than ``limit`` before any parser walks it.

    :raises RequestError: it is.
    """
    if body.count(b"{") + body.count(b"[") <= limit:
        return
    depth = 0
    for token in _TOKEN.finditer(body):
        first = body[token.start()]
        if first in b"{[":
            depth += 1
            if depth > limit:
                raise RequestError(
                    f"the body is nested deeper than {limit} levels", code="json_too_deep"
                )
        elif first in b"}]":
            depth -= 1


def extra_fields(fields: Mapping[str, Raw], known: frozenset[str]) -> tuple[str, ...]:
    """Names of the fields that say something and are not among the known."""
    unknown = fields.keys() - known
    if not unknown:
        return ()
    return tuple(sorted(name for name in unknown if bytes(fields[name]) not in _NOTHING))


def _common(parsed: Any, limits: Limits, logprobs: int | None, choices: int) -> dict[str, Any]:
    """What both endpoints share, checked against the limits."""
    for name, least, greatest in _RANGES:
        value = getattr(parsed, name, None)
        if value is not None and (value < least or (greatest is not None and value > greatest)):
            bound = f"at least {least:g}" if greatest is None else f"from {least:g} to {greatest:g}"
            raise RequestError(f"must be {bound}, not {value:g}", param=name)
    n = parsed.n if parsed.n is not None else 1
    if n < 1 or choices > limits.n:
        raise RequestError(f"at most {limits.n} choices are allowed, at least 1", param="n")
    least = 0 if getattr(parsed, "echo", False) else 1
    if parsed.max_tokens is not None and not least <= parsed.max_tokens <= limits.max_tokens:
        raise RequestError(f"must be from {least} to {limits.max_tokens}", param="max_tokens")
    options = parsed.stream_options
    if options is not None and not parsed.stream:
        raise RequestError("is only allowed with `stream: true`", param="stream_options")
    sampling = Sampling(
        max_tokens=parsed.max_tokens,
        temperature=parsed.temperature,
        top_p=parsed.top_p,
        top_k=parsed.top_k,
        min_p=parsed.min_p,
        frequency_penalty=parsed.frequency_penalty,
        presence_penalty=parsed.presence_penalty,
        repetition_penalty=parsed.repetition_penalty,
        seed=parsed.seed,
        stop=_stop(parsed.stop, limits),
        logprobs=logprobs,
        min_tokens=parsed.min_tokens or 0,
        ignore_eos=bool(parsed.ignore_eos),
    )
    return {
        "model": parsed.model,
        "sampling": sampling,
        "n": n,
        "stream": bool(parsed.stream),
        "include_usage": bool(options and options.include_usage),
        "needs_schema": parsed.response_format is not None
        and parsed.response_format.type != "text",
    }


def _stop(stop: str | tuple[str, ...] | None, limits: Limits) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop or ()
    if len(strings) > limits.stop:
        raise RequestError(f"at most {limits.stop} stop strings are allowed", param="stop")
    for string in strings:
        if not string:
            raise RequestError("a stop string must not be empty", param="stop")
        if len(string.encode()) > limits.stop_bytes:
            raise RequestError(
                f"a stop string may have at most {limits.stop_bytes} bytes", param="stop"
            )
    return strings
