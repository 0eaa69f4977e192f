"""Requests and answers of Ollama's ``/api/chat``, ``/api/generate`` and ``/api/embed``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from msgspec import Struct

from forebay.api import (
    BackendFailed,
    BackendGarbage,
    BackendLacks,
    Delta,
    EmbedRequest,
    GenerateRequest,
    Message,
    TokenLogprob,
    ToolCallDelta,
)
from forebay_plugins.message_parts import Inline, image_of, parts_of

__all__ = ["Line", "Reader", "body_of", "embed_body"]

#: Sampling fields, and what ``options`` calls them.
_OPTIONS = {
    "max_tokens": "num_predict",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "repetition_penalty": "repeat_penalty",
    "seed": "seed",
}
#: Its own defaults come from the model's file, or are those of llama.cpp; these change nothing.
_NEUTRAL = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repeat_penalty": 1.0,
}
#: ``max_tokens`` of /v1/completions where none is given, by OpenAI's documentation.
_COMPLETION_TOKENS = 16


class Function(Struct):
    name: str
    arguments: dict[str, Any] = {}


class Call(Struct):
    function: Function
    id: str = ""


class Said(Struct):
    content: str = ""
    thinking: str = ""
    tool_calls: list[Call] = []


class Candidate(Struct):
    token: str
    logprob: float


class Token(Candidate):
    top_logprobs: list[Candidate] = []


class Line(Struct):
    """One line of an answer; durations in nanoseconds."""

    error: str = ""
    model: str = ""
    message: Said | None = None
    response: str = ""
    thinking: str = ""
    logprobs: list[Token] = []
    done: bool = False
    done_reason: str = ""
    prompt_eval_count: int = 0
    eval_count: int = 0
    load_duration: int = 0
    prompt_eval_duration: int = 0
    eval_duration: int = 0


def refused(field: str, why: str) -> BackendLacks:
    return BackendLacks(f"the Ollama backend cannot take this field: {why}", param=field)


def body_of(
    request: GenerateRequest, *, model: str, num_ctx: int, keep_alive: str, neutral: bool = True
) -> dict[str, object]:
    """The body for a request; ``neutral``: what is not said of sampling shall change nothing.

    :raises BackendLacks: a field has no counterpart there.
    """
    _refuse(request)
    options: dict[str, object] = dict(_NEUTRAL) if neutral else {}
    for name, option in _OPTIONS.items():
        value = getattr(request.sampling, name)
        if value is not None:
            options[option] = value
    if request.sampling.stop:
        options["stop"] = request.sampling.stop
    if num_ctx:
        options["num_ctx"] = num_ctx
    body: dict[str, object] = {
        "model": model,
        "stream": True,
        # A prompt that does not fit is an error, and not cut at its begin.
        "truncate": False,
        "shift": False,
        "options": options,
    }
    if keep_alive:
        body["keep_alive"] = keep_alive
    if request.sampling.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": request.sampling.logprobs}
    if request.endpoint == "completions":
        options.setdefault("num_predict", _COMPLETION_TOKENS)
        return {**body, "prompt": request.prompts[0], "raw": True}
    body["messages"] = [_message(message) for message in request.messages]
    if request.needs_tools:
        body["tools"] = request.fields["tools"]
    if request.needs_schema:
        body["format"] = _format(request)
    return body


def _refuse(request: GenerateRequest) -> None:
    """Raise if the request asks for what Ollama has not."""
    choice = request.fields.get("tool_choice")
    refusals = (
        (request.choices > 1, "n", "it gives one choice for one prompt"),
        (request.echo, "echo", "it does not repeat the prompt"),
        (request.sampling.min_tokens > 0, "min_tokens", "it has no such option"),
        (request.sampling.ignore_eos, "ignore_eos", "it has no such option"),
        (
            request.needs_tools
            and choice is not None
            and bytes(choice) not in (b'"auto"', b"null"),
            "tool_choice",
            "the model chooses",
        ),
        (
            request.endpoint == "completions"
            and not all(isinstance(prompt, str) for prompt in request.prompts),
            "prompt",
            "it takes no token ids",
        ),
        (bool(request.extra), next(iter(request.extra), ""), "it is not known there"),
    )
    for wrong, field, why in refusals:
        if wrong:
            raise refused(field, why)


def _message(message: Message) -> dict[str, object]:
    role = "system" if message.role == "developer" else message.role
    said: dict[str, object] = {"role": role, "content": message.text()}
    images = [image_of(part, "Ollama") for part in parts_of(message) if part.type != "text"]
    if images:
        said["images"] = [_bytes(image) for image in images]
    if message.reasoning_content:
        said["thinking"] = message.reasoning_content
    if message.tool_calls is not None:
        calls = [msgspec.json.decode(call) for call in message.tool_calls]
        said["tool_calls"] = [_past_call(call) for call in calls]
    if message.tool_call_id is not None:
        said["tool_call_id"] = message.tool_call_id
    if message.name is not None and role == "tool":
        said["tool_name"] = message.name
    return said


def _bytes(image: Inline | str) -> str:
    if isinstance(image, str):
        raise refused("messages", "it fetches no images; send them as data:image/...;base64,...")
    return image.data


def _past_call(call: Mapping[str, Any]) -> dict[str, object]:
    """A call in the history, its arguments as an object."""
    try:
        function = call["function"]
        arguments = msgspec.json.decode(function["arguments"] or "{}", type=dict[str, Any])
        return {
            "id": call.get("id") or "",
            "function": {"name": function["name"], "arguments": arguments},
        }
    except (KeyError, TypeError, AttributeError, msgspec.DecodeError):
        raise refused("messages", "a tool call has no name, or no JSON object in it") from None


def _format(request: GenerateRequest) -> object:
    wanted = msgspec.json.decode(request.fields["response_format"])
    if wanted["type"] == "json_object":
        return "json"
    schema = wanted.get("json_schema")
    if wanted["type"] != "json_schema" or not isinstance(schema, dict) or "schema" not in schema:
        raise refused("response_format", "it must be json_object, or json_schema with a schema")
    return schema["schema"]


def embed_body(
    request: EmbedRequest, *, model: str, num_ctx: int, keep_alive: str
) -> dict[str, object]:
    """The body for ``/api/embed``.

    :raises BackendLacks: an input is not text.
    """
    if not all(isinstance(text, str) for text in request.inputs):
        raise refused("input", "it takes no token ids")
    if request.extra:
        raise refused(request.extra[0], "it is not known there")
    body: dict[str, object] = {"model": model, "input": request.inputs, "truncate": False}
    if request.dimensions is not None:
        body["dimensions"] = request.dimensions
    if num_ctx:
        body["options"] = {"num_ctx": num_ctx}
    if keep_alive:
        body["keep_alive"] = keep_alive
    return body


class Reader:
    """Of one answer."""

    def __init__(self, request: GenerateRequest) -> None:
        self._id = request.id
        self._calls = 0

    def line(self, text: bytes) -> Line:
        """One line understood.

        :raises BackendGarbage: it is none of Ollama's.
        :raises BackendFailed: it is an error.
        """
        try:
            line = msgspec.json.decode(text, type=Line)
        except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
            raise BackendGarbage(f"a line of the backend's answer: {wrong}") from None
        if line.error:
            raise BackendFailed(line.error)
        return line

    def deltas(self, line: Line) -> Iterator[Delta]:
        """None for a line that says nothing."""
        said = line.message or Said(line.response, line.thinking)
        calls = []
        for call in said.tool_calls:
            arguments = msgspec.json.encode(call.function.arguments).decode()
            id_ = call.id or f"call_{self._id}_{self._calls}"
            calls.append(ToolCallDelta(self._calls, id_, call.function.name, arguments))
            self._calls += 1
        delta = Delta(
            text=said.content,
            reasoning=said.thinking,
            tool_calls=tuple(calls),
            logprobs=tuple(
                TokenLogprob(
                    token.token,
                    token.logprob,
                    tuple((other.token, other.logprob) for other in token.top_logprobs),
                )
                for token in line.logprobs
            ),
            finish_reason=self._reason(line) if line.done else None,
        )
        if delta != Delta():
            yield delta

    def _reason(self, line: Line) -> Any:
        if line.done_reason == "length":
            return "length"
        return "tool_calls" if self._calls else "stop"
