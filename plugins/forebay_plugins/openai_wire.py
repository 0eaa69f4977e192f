"""Backends that speak OpenAI's HTTP API: what their adapters have in common.

A subclass says how to probe its server, what to change in a request, and where timings stand.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from typing import Any, ClassVar

import msgspec
from msgspec import Raw

from forebay.api import (
    Attempt,
    BackendGarbage,
    BackendRefused,
    Capabilities,
    Event,
    Finished,
    GenerateRequest,
    Relayed,
    StreamTruncated,
    Timings,
    UpstreamResponse,
    Usage,
)
from forebay_plugins.http_server import HttpServer, drain
from forebay_plugins.openai_events import typed_events
from forebay_plugins.openai_shape import decode, finish_of
from forebay_plugins.openai_whole import WholeAnswer
from forebay_plugins.sse import Scanner

__all__ = ["ENGINE_NEUTRAL", "OPENAI_NEUTRAL", "OpenAIServer", "priority_of"]

#: OpenAI's sampling fields, and the values that change nothing.
OPENAI_NEUTRAL: Mapping[str, object] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}
#: With those that vLLM and SGLang have beside them, of which each takes its model's own values.
ENGINE_NEUTRAL: Mapping[str, object] = {
    **OPENAI_NEUTRAL,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}

_UNSAID = (None, Raw(b"null"))
#: The members of a message that hold what the model said.
_PARTS = ("content", "reasoning_content", "tool_calls")
_PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


class OpenAIServer(HttpServer):
    """One server; the answer is relayed as bytes (see :mod:`forebay_plugins.sse`).

    The model's name is replaced in both directions, so that clients see the one they asked for.
    """

    #: Headers for requests that it answers by a stream.
    stream_headers: ClassVar[Mapping[str, str]] = {}
    #: Answers that need not stream are streamed from the server all the same, and put together.
    always_streams: ClassVar[bool] = False
    #: What is sent for sampling fields of which nothing is said; only fields that it knows.
    neutral: ClassVar[Mapping[str, object]] = OPENAI_NEUTRAL
    #: A request may be the end of the whole server, so after a cut it is not tried elsewhere.
    dies_of_requests: ClassVar[bool] = False
    #: See :class:`Scanner`.
    usage_by_choice: ClassVar[bool] = False
    #: Fields of a choice for which Forebay asked, and not the client.
    unasked: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    async def probe(self) -> Capabilities: ...

    async def changes(self, request: GenerateRequest) -> dict[str, object]:
        """Fields to set in the request's body, or to remove with None."""
        return {}

    def whole_headers(self) -> Mapping[str, str]:
        """Headers for requests that it answers in one piece."""
        return {}

    def heard(self, headers: Mapping[str, str]) -> None:
        """The head of an answer has come; its headers may tell of the server."""

    def timings(self, closing: Mapping[str, Any], headers: Mapping[str, str]) -> Timings | None:
        """The backend's own timings: from the top-level fields at the end of an answer, or from the
        headers of its response (lower-case names)."""
        return None

    def trailer(self, rest: bytes) -> Mapping[str, str]:
        """Headers that could only be sent behind the answer; ``rest`` ends with what followed
        ``[DONE]``."""
        return {}

    def stream(self, request: GenerateRequest, attempt: Attempt) -> AsyncGenerator[Event, None]:
        relayed = self._relay(request, attempt)
        return typed_events(request, relayed) if request.typed else relayed

    async def _relay(
        self, request: GenerateRequest, attempt: Attempt
    ) -> AsyncGenerator[Event, None]:
        streams = request.stream or self.always_streams
        response = await self._send(request, attempt, streams)
        try:
            self.heard(response.headers)
            await self._check(response, "text/event-stream" if streams else "application/json")
            if not streams:
                body, finished = self._answer(request, await response.read(), response.headers)
                yield Relayed(body)
                yield finished
                return
            whole = None if request.stream else WholeAnswer(request)
            scanner, chunks = Scanner(request, self.usage_by_choice), response.chunks()
            rest = b""
            with suppress(StreamTruncated):  # a cut may be the end: the scanner knows
                async for chunk in chunks:
                    data = scanner.feed(chunk)
                    if data and whole is None:
                        yield Relayed(data, scanner.events)
                    elif data and whole is not None:
                        whole.add(data)
                    if scanner.failure is not None or scanner.done:
                        break
            if scanner.failure is not None:
                raise scanner.failure
            if scanner.done:
                rest = chunk + await drain(chunks)
            tail = scanner.end()
            if whole is not None:
                yield Relayed(whole.body(scanner.reported, scanner.closing))
            elif tail:
                yield Relayed(tail)
            headers = {**response.headers, **self.trailer(rest)}
            timings = self.timings(scanner.closing, headers)
            yield Finished(scanner.usage, timings, scanner.finish_reasons, scanner.model)
        except StreamTruncated as cut:
            cut.retryable = not self.dies_of_requests
            raise
        finally:
            await response.aclose()

    async def _send(
        self, request: GenerateRequest, attempt: Attempt, streams: bool
    ) -> UpstreamResponse:
        changes: dict[str, object] = {"model": self.settings.model or request.model}
        if streams:
            changes["stream"] = True
            # Always: the gateway needs the counts; the client only gets them if it asked.
            changes["stream_options"] = {
                **_object(request, "stream_options"),
                "include_usage": True,
            }
        changes |= await self.changes(request)
        if self.settings.neutral_sampling:
            said = {**request.fields, **changes}
            changes |= {k: v for k, v in self.neutral.items() if said.get(k) in _UNSAID}
        headers = self.stream_headers if streams else self.whole_headers()
        return await self.post(
            _PATHS[request.endpoint], request.openai_body(**changes), attempt, headers
        )

    def _answer(
        self, request: GenerateRequest, body: bytes, headers: Mapping[str, str]
    ) -> tuple[bytes, Finished]:
        """A whole body as the client is to get it, and what it says."""
        content, answer = decode(body)
        if not answer.choices:
            raise BackendGarbage("the backend's answer has no choices")
        if not all(choice.finish_reason for choice in answer.choices):
            raise BackendGarbage("a choice of the backend's answer has no finish_reason")
        reasons = tuple(finish_of(choice.finish_reason or "") for choice in answer.choices)
        timings = self.timings(content, headers)
        for choice, reason in zip(content["choices"], reasons, strict=True):
            choice["finish_reason"] = reason
            for name in self.unasked:
                choice.pop(name, None)
            message = choice.get("message") or {}
            if "reasoning" in message:  # the one name for it, as in streams
                message.setdefault("reasoning_content", message["reasoning"])
                del message["reasoning"]
        model = str(content.get("model") or "")
        content["model"] = request.model
        content["id"] = content.get("id") or request.id
        content["created"] = content.get("created") or request.created
        usage = answer.usage.usage() if answer.usage else _counted(content["choices"])
        return msgspec.json.encode(content), Finished(usage, timings, reasons, model)


def _counted(choices: list[dict[str, Any]]) -> Usage:
    """Where the server counts nothing: a token for four bytes; the prompt is the gateway's."""
    said = [choice.get("message") or {"content": choice.get("text")} for choice in choices]
    parts = [message.get(part) for message in said for part in _PARTS]
    size = sum(len(msgspec.json.encode(part)) for part in parts if part)
    return Usage(prompt_tokens=0, completion_tokens=-(-size // 4), source="counted")


def priority_of(request: GenerateRequest) -> int:
    """``priority`` has one direction for clients, vLLM's: the lowest value is served first.

    :raises BackendRefused: it is no integer.
    """
    try:
        return msgspec.json.decode(request.fields["priority"], type=int)
    except msgspec.ValidationError:
        raise BackendRefused("must be an integer, the lowest first", param="priority") from None


def _object(request: GenerateRequest, field: str) -> dict[str, object]:
    value = msgspec.json.decode(request.fields[field]) if field in request.fields else None
    return value if isinstance(value, dict) else {}
