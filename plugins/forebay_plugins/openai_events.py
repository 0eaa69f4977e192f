"""The typed lane of OpenAI-shaped servers: relayed chunks, or a whole body, become events.

It reads what the relay lane has already repaired (see :mod:`forebay_plugins.sse`), so ids, roles,
finish reasons and usage need no second thought here.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, cast

import msgspec
from msgspec import Struct

from forebay.api import (
    BackendGarbage,
    Delta,
    Event,
    Finished,
    FinishReason,
    GenerateRequest,
    Relayed,
    Started,
    TokenLogprob,
    ToolCallDelta,
)

__all__ = ["EventDecoder", "typed_events"]


class Function(Struct, frozen=True):
    name: str | None = None
    #: Some servers send the object itself where OpenAI sends its JSON.
    arguments: str | dict[str, Any] | None = None


class Call(Struct):
    index: int | None = None
    id: str | None = None
    function: Function = Function()


class Said(Struct):
    """A ``delta`` or a ``message``."""

    content: str | None = None
    refusal: str | None = None
    #: vLLM and Ollama say ``reasoning``, the others ``reasoning_content``.
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None


class Candidate(Struct):
    token: str
    logprob: float


class Token(Candidate):
    top_logprobs: list[Candidate] | None = None


class Logprobs(Struct):
    """Of a chat choice (``content``), or of a completions choice (the others)."""

    content: list[Token] | None = None
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class Choice(Struct):
    index: int = 0
    delta: Said | None = None
    message: Said | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None
    token_ids: list[int] | None = None


class Content(Struct):
    choices: list[Choice]


class EventDecoder:
    """Of one answer; feed it, in order, what the relay lane relays."""

    def __init__(self, request: GenerateRequest) -> None:
        self._request = request
        self._calls: dict[int, CallDecoder] = {}

    def feed(self, relayed: bytes) -> Iterator[Delta]:
        """What these whole events, or this body, say.

        :raises BackendGarbage: a field is not of OpenAI's type.
        """
        if not self._request.stream:
            yield from self._deltas(relayed)
            return
        for event in relayed.split(b"\n\n")[:-1]:
            yield from self._deltas(event.removeprefix(b"data: "))

    def _deltas(self, data: bytes) -> Iterator[Delta]:
        try:
            content = msgspec.json.decode(data, type=Content)
        except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
            raise BackendGarbage(
                f"the backend's answer is not of OpenAI's shape: {wrong}"
            ) from None
        for choice in content.choices:
            delta = self._delta(choice)
            if delta != Delta(choice.index):  # a role alone says nothing
                yield delta

    def _delta(self, choice: Choice) -> Delta:
        said = choice.delta or choice.message or Said()
        calls = self._calls.setdefault(choice.index, CallDecoder(self._request.id, choice.index))
        pieces = tuple(calls.piece(call) for call in said.tool_calls or ())
        reason = choice.finish_reason
        if reason == "function_call" or (reason == "stop" and calls.seen):
            reason = "tool_calls"  # vLLM says `stop` after a tool that the client had named
        return Delta(
            index=choice.index,
            text=choice.text or said.content or said.refusal or "",
            finish_reason=cast("FinishReason | None", reason),
            token_ids=tuple(choice.token_ids or ()),
            logprobs=tuple(_logprobs(choice.logprobs)) if choice.logprobs else (),
            reasoning=said.reasoning or said.reasoning_content or "",
            tool_calls=pieces,
        )


class CallDecoder:
    """The tool calls of one choice: index always, id and name exactly once."""

    def __init__(self, request_id: str, choice: int) -> None:
        self._prefix = f"call_{request_id}_{choice}_"
        self.seen: set[int] = set()
        self._places: dict[int, int] = {}
        self._named: set[int] = set()

    def piece(self, call: Call) -> ToolCallDelta:
        if call.index is None:  # then each comes whole
            index = len(self.seen)
        else:  # TensorRT-LLM begins with the choice's number where the client has named the tool
            index = self._places.setdefault(call.index, len(self._places))
        arguments, name = call.function.arguments or "", call.function.name
        if not isinstance(arguments, str):
            arguments = msgspec.json.encode(arguments).decode()
        first = index not in self.seen
        self.seen.add(index)
        unnamed = bool(name) and index not in self._named
        if unnamed:
            self._named.add(index)
        return ToolCallDelta(
            index=index,
            id=(call.id or f"{self._prefix}{index}") if first else None,
            name=name if unnamed else None,
            arguments=arguments,
        )


def _logprobs(logprobs: Logprobs) -> Iterator[TokenLogprob]:
    if logprobs.content is not None:
        for token in logprobs.content:
            top = tuple((other.token, other.logprob) for other in token.top_logprobs or ())
            yield TokenLogprob(token.token, token.logprob, top)
        return
    tops = logprobs.top_logprobs or [None] * len(logprobs.tokens)
    for text, logprob, likeliest in zip(
        logprobs.tokens, logprobs.token_logprobs, tops, strict=False
    ):
        if logprob is not None:  # the first token of an echoed prompt has none
            best = sorted((likeliest or {}).items(), key=lambda item: -item[1])
            yield TokenLogprob(text, logprob, tuple(best))


async def typed_events(
    request: GenerateRequest, relayed: AsyncGenerator[Event, None]
) -> AsyncGenerator[Event, None]:
    """The relay lane's events as those of the typed lane."""
    decoder = EventDecoder(request)
    started = False
    async with aclosing(relayed):
        async for event in relayed:
            if not started:
                started = True
                yield Started()
            if isinstance(event, Relayed):
                for delta in decoder.feed(event.data):
                    yield delta
            elif isinstance(event, Finished):
                # How each choice ended stands in its deltas.
                yield msgspec.structs.replace(event, finish_reasons=())
