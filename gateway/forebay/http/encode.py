"""The typed lane's way out: events become OpenAI chunks, or one OpenAI body.

What strict clients need (openai-node, LangChain) and get: ``id`` and ``created`` constant, the role
once per choice, every choice finished by a reason within the enum, usage in the last chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Raw, Struct, structs

from forebay.api import (
    Delta,
    Finished,
    ForebayError,
    GenerateRequest,
    Relayed,
    TokenLogprob,
    Usage,
)
from forebay.attempt import FlightEvent
from forebay.http.reply import Reply, openai_error

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.encode


class Head(Struct):
    """What is the same in every chunk of a stream."""

    id: str
    object: str
    created: int
    model: str


class OpenAIReply(Reply):
    """The answer to a chat or completions request, streamed or whole."""

    def __init__(self, request: GenerateRequest) -> None:
        self._request = request
        self._chunks: ChunkEncoder | None = None
        self._answer = Answer(request)
        #: The first bytes of a stream; all of an answer that does not stream.
        self._relayed = b""

    def chunk(self, event: FlightEvent) -> bytes:
        match event:
            case Relayed():
                self._relayed = self._relayed or event.data
                return event.data
            case Delta():
                return self._typed().delta(event)
            case Finished():
                return self._usage(event.usage) + DONE
        raise TypeError(f"{event!r} is no part of generated text")

    def _usage(self, usage: Usage | None) -> bytes:
        """The usage chunk; one that a backend reports has been relayed."""
        if self._chunks is not None or not self._relayed:
            return self._typed().usage(usage)
        if usage is None or usage.source == "reported" or not self._request.include_usage:
            return b""
        first, _, _ = self._relayed.partition(b"\n\n")
        head = msgspec.json.decode(first.removeprefix(b"data: "), type=Head)
        chunk = {**structs.asdict(head), "choices": [], "usage": usage_object(usage)}
        return b"data: " + _encode(chunk) + b"\n\n"

    def _typed(self) -> ChunkEncoder:
        if self._chunks is None:
            self._chunks = ChunkEncoder(self._request)
        return self._chunks

    def add(self, event: FlightEvent) -> None:
        if isinstance(event, Relayed):
            self._relayed += event.data
        elif isinstance(event, Delta):
            self._answer.add(event)

    def body(self, finished: Finished) -> bytes:
        if not self._relayed:
            return self._answer.body(finished.usage)
        usage = finished.usage
        if usage is None or usage.source == "reported":
            return self._relayed
        answer = msgspec.json.decode(self._relayed, type=dict[str, Raw])
        return _encode({**answer, "usage": usage_object(usage)})

    def failure(self, error: ForebayError) -> bytes:
        return b"data: " + openai_error(error) + b"\n\n"


class ChunkEncoder:
    """Of one streamed answer."""

    def __init__(self, request: GenerateRequest) -> None:
        self._chat = request.endpoint == "chat"
        self._include_usage = request.include_usage
        self._token_ids = request.return_token_ids
        self._offsets: dict[int, int] = {}
        head: dict[str, object] = {
            "id": answer_id(request),
            "object": "chat.completion.chunk" if self._chat else "text_completion",
            "created": request.created,
            "model": request.model,
        }
        # The head is the same in every chunk: encoded once, without its closing brace.
        self._head = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if request.include_usage else b"]}\n\n"
        self._choices = request.choices
        self._begun = False

    def _roles(self) -> bytes:
        """The role of each choice, in order of index; nothing for completions."""
        if not self._chat:
            return b""
        return b"".join(
            self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}})
            for index in range(self._choices)
        )

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        choice.setdefault("logprobs", None)
        choice.setdefault("finish_reason", None)
        return self._head + _encode(choice) + self._tail

    def delta(self, delta: Delta) -> bytes:
        """The delta's chunk; before the first one the chunks with the roles."""
        roles = b"" if self._begun else self._roles()
        self._begun = True
        choice: dict[str, Any] = {"index": delta.index, "finish_reason": delta.finish_reason}
        if self._chat:
            choice["delta"] = _chat_delta(delta)
            if delta.logprobs:
                choice["logprobs"] = chat_logprobs(delta.logprobs)
        else:
            choice["text"] = delta.text
            if delta.logprobs:
                offset = self._offsets.get(delta.index, 0)
                logprobs = completion_logprobs(delta.logprobs, offset)
                self._offsets[delta.index] = logprobs["text_offset"][-1] + len(
                    logprobs["tokens"][-1]
                )
                choice["logprobs"] = logprobs
        if self._token_ids:
            choice["token_ids"] = delta.token_ids
        choice |= _prompt_logprobs((delta,))
        return roles + self._chunk(choice)

    def usage(self, usage: Usage | None) -> bytes:
        """The usage chunk, if it was asked for."""
        if not self._include_usage or usage is None:
            return b""
        return self._head + b'],"usage":' + _encode(usage_object(usage)) + b"}\n\n"


def _chat_delta(delta: Delta) -> dict[str, Any]:
    message: dict[str, Any] = {}
    if delta.text or not (delta.tool_calls or delta.reasoning or delta.finish_reason):
        message["content"] = delta.text
    if delta.reasoning:
        message["reasoning_content"] = delta.reasoning
    if delta.tool_calls:
        message["tool_calls"] = [
            {
                "index": call.index,
                **({"id": call.id, "type": "function"} if call.id else {}),
                "function": {
                    **({"name": call.name} if call.name else {}),
                    "arguments": call.arguments,
                },
            }
            for call in delta.tool_calls
        ]
    return message


class Answer:
    """One non-streamed answer, put together from its events."""

    def __init__(self, request: GenerateRequest) -> None:
        self._request = request
        self._parts: list[list[Delta]] = [[] for _ in range(request.choices)]

    def add(self, delta: Delta) -> None:
        self._parts[delta.index].append(delta)

    def body(self, usage: Usage | None) -> bytes:
        request = self._request
        chat = request.endpoint == "chat"
        choice = _chat_choice if chat else _completion_choice
        answer: dict[str, object] = {
            "id": answer_id(request),
            "object": "chat.completion" if chat else "text_completion",
            "created": request.created,
            "model": request.model,
            "choices": [
                {**choice(index, parts), **self._token_ids(parts), **_prompt_logprobs(parts)}
                for index, parts in enumerate(self._parts)
            ],
            "usage": usage_object(usage or Usage(0, 0, source="counted")),
        }
        return _encode(answer)

    def _token_ids(self, parts: Sequence[Delta]) -> dict[str, Any]:
        """A further member of a choice, as vLLM gives it, for those who ask."""
        if not self._request.return_token_ids:
            return {}
        return {"token_ids": [token_id for part in parts for token_id in part.token_ids]}


def _prompt_logprobs(parts: Sequence[Delta]) -> dict[str, Any]:
    """A further member of a choice, as vLLM gives it: nothing is known of the first token."""
    places = next((part.prompt_logprobs for part in parts if part.prompt_logprobs), ())
    if not places:
        return {}
    known = [
        {
            str(entry.token_id): {
                "logprob": entry.logprob,
                "rank": entry.rank,
                "decoded_token": entry.token,
            }
            for entry in place
        }
        for place in places
    ]
    return {"prompt_logprobs": [None, *known]}


def _chat_choice(index: int, parts: Sequence[Delta]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": "".join(p.text for p in parts)}
    if reasoning := "".join(part.reasoning for part in parts):
        message["reasoning_content"] = reasoning
    if calls := _tool_calls(parts):
        message["tool_calls"] = calls
        message["content"] = message["content"] or None
    logprobs = [entry for part in parts for entry in part.logprobs]
    return {
        "index": index,
        "message": message,
        "logprobs": chat_logprobs(logprobs) if logprobs else None,
        "finish_reason": _reason(parts),
    }


def _completion_choice(index: int, parts: Sequence[Delta]) -> dict[str, Any]:
    logprobs = [entry for part in parts for entry in part.logprobs]
    return {
        "index": index,
        "text": "".join(part.text for part in parts),
        "logprobs": completion_logprobs(logprobs, 0) if logprobs else None,
        "finish_reason": _reason(parts),
    }


def _tool_calls(parts: Sequence[Delta]) -> list[dict[str, Any]]:
    calls: dict[int, dict[str, Any]] = {}
    for piece in (call for part in parts for call in part.tool_calls):
        call = calls.setdefault(
            piece.index,
            {"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": ""}},
        )
        call["function"]["arguments"] += piece.arguments
    return [calls[index] for index in sorted(calls)]


def _reason(parts: Sequence[Delta]) -> str:
    return next((p.finish_reason for p in reversed(parts) if p.finish_reason), "stop")


def answer_id(request: GenerateRequest) -> str:
    """``chatcmpl-…`` or ``cmpl-…`` of the request's own id."""
    return f"{'chatcmpl' if request.endpoint == 'chat' else 'cmpl'}-{request.id}"


def usage_object(usage: Usage) -> dict[str, object]:
    answer: dict[str, object] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    if usage.cached_tokens is not None:
        answer["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
    return {**answer, **counted_mark(usage)}


def counted_mark(usage: Usage) -> dict[str, str]:
    """A further member of usage objects, in each dialect, if the figures are not the backend's."""
    return {"source": usage.source} if usage.source == "counted" else {}


def chat_logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """``logprobs`` of a chat choice."""
    return {
        "content": [
            {
                **_token(entry.token, entry.logprob),
                "top_logprobs": [_token(token, logprob) for token, logprob in entry.top],
            }
            for entry in entries
        ],
        "refusal": None,
    }


def _token(token: str, logprob: float | None) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def completion_logprobs(entries: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """``logprobs`` of a completions choice; ``offset`` in characters from the answer's begin."""
    offsets = []
    for entry in entries:
        offset = offset if entry.offset is None else entry.offset
        offsets.append(offset)
        offset += len(entry.token)
    return {
        "tokens": [entry.token for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [dict(entry.top) or None for entry in entries],
        "text_offset": offsets,
    }
