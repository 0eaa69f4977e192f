"""Backends that speak OpenAI's HTTP API: what their adapters have in common.

A subclass says how to probe its server, what to change in a request, and where timings stand.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any, ClassVar

import msgspec

from forebay.api import (
    Adapter,
    AdapterContext,
    Attempt,
    BackendGarbage,
    Capabilities,
    Event,
    Finished,
    GenerateRequest,
    HttpBackendSettings,
    Relayed,
    StreamTruncated,
    Timings,
    Upstream,
    UpstreamResponse,
)
from forebay_plugins.openai_errors import error_of
from forebay_plugins.openai_events import typed_events
from forebay_plugins.openai_shape import decode, finish_of
from forebay_plugins.openai_whole import WholeAnswer
from forebay_plugins.sse import Scanner

__all__ = ["OpenAIServer"]

_PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
#: Bytes of an error's body that are read.
_ERROR_BYTES = 64 << 10
#: Seconds after [DONE] in which the body should end; it does at once, or the connection is dropped.
_TRAILER = 0.25


class OpenAIServer(Adapter):
    """One server; the answer is relayed as bytes (see :mod:`forebay_plugins.sse`).

    The model's name is replaced in both directions, so that clients see the one they asked for.
    """

    #: Headers that must not reach this kind of server.
    withheld: ClassVar[frozenset[str]] = frozenset()
    #: Headers for requests that it answers by a stream.
    stream_headers: ClassVar[Mapping[str, str]] = {}
    #: Answers that need not stream are streamed from the server all the same, and put together.
    always_streams: ClassVar[bool] = False
    #: See :class:`Scanner`.
    usage_by_choice: ClassVar[bool] = False

    def __init__(self, settings: HttpBackendSettings, context: AdapterContext) -> None:
        self.settings = settings
        self._context = context

    @cached_property
    def _upstream(self) -> Upstream:
        return self._context.connect(self.settings.url)

    @abstractmethod
    async def probe(self) -> Capabilities: ...

    async def changes(self, request: GenerateRequest) -> dict[str, object]:
        """Fields to set in the request's body, or to remove with None."""
        return {}

    def timings(self, closing: Mapping[str, Any]) -> Timings | None:
        """The backend's own timings from the top-level fields at the end of an answer."""
        return None

    def stream(self, request: GenerateRequest, attempt: Attempt) -> AsyncGenerator[Event, None]:
        relayed = self._relay(request, attempt)
        return typed_events(request, relayed) if request.typed else relayed

    async def _relay(
        self, request: GenerateRequest, attempt: Attempt
    ) -> AsyncGenerator[Event, None]:
        streams = request.stream or self.always_streams
        response = await self._send(request, attempt, streams)
        try:
            await self._check(response, "text/event-stream" if streams else "application/json")
            if not streams:
                body, finished = self._answer(request, await response.read())
                yield Relayed(body)
                yield finished
                return
            whole = None if request.stream else WholeAnswer(request)
            scanner, chunks = Scanner(request, self.usage_by_choice), response.chunks()
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
                await _drain(chunks)
            tail = scanner.end()
            if whole is not None:
                yield Relayed(whole.body(scanner.reported, scanner.closing))
            elif tail:
                yield Relayed(tail)
            yield Finished(scanner.usage, self.timings(scanner.closing), scanner.finish_reasons)
        finally:
            await response.aclose()

    async def _send(
        self, request: GenerateRequest, attempt: Attempt, streams: bool
    ) -> UpstreamResponse:
        changes: dict[str, object] = {"model": self.settings.model or request.model}
        headers = {k: v for k, v in attempt.headers.items() if k not in self.withheld}
        if streams:
            headers.update(self.stream_headers)
            changes["stream"] = True
            # Always: the gateway needs the counts; the client only gets them if it asked.
            changes["stream_options"] = {
                **_object(request, "stream_options"),
                "include_usage": True,
            }
        changes |= await self.changes(request)
        return await self._upstream.send(
            "POST",
            _PATHS[request.endpoint],
            body=request.openai_body(**changes),
            headers={**headers, **self._headers},
            connect_timeout=attempt.timeouts.connect,
        )

    @cached_property
    def _headers(self) -> Mapping[str, str]:
        headers = {name.lower(): value for name, value in self.settings.headers.items()}
        if self.settings.api_key:
            headers["authorization"] = f"Bearer {self.settings.api_key}"
        return {name: value for name, value in headers.items() if name not in self.withheld}

    async def _check(self, response: UpstreamResponse, content_type: str) -> None:
        """Raise unless it is a 200 of this type."""
        if response.status != 200:
            try:
                body = await response.read(_ERROR_BYTES)
            except BackendGarbage:
                body = b""
            raise error_of(response.status, response.headers, body)
        found = response.headers.get("content-type", "")
        if not found.startswith(content_type):
            raise BackendGarbage(
                f"the backend sent {found[:80]!r} where {content_type} was expected"
            )

    def _answer(self, request: GenerateRequest, body: bytes) -> tuple[bytes, Finished]:
        """A whole body as the client is to get it, and what it says."""
        content, answer = decode(body)
        if not answer.choices:
            raise BackendGarbage("the backend's answer has no choices")
        if not all(choice.finish_reason for choice in answer.choices):
            raise BackendGarbage("a choice of the backend's answer has no finish_reason")
        reasons = tuple(finish_of(choice.finish_reason or "") for choice in answer.choices)
        for choice, reason in zip(content["choices"], reasons, strict=True):
            choice["finish_reason"] = reason
        content["model"] = request.model
        content["id"] = content.get("id") or request.id
        content["created"] = content.get("created") or request.created
        usage = answer.usage.usage() if answer.usage else None
        return msgspec.json.encode(content), Finished(usage, self.timings(content), reasons)

    async def get(self, path: str) -> bytes:
        """The body of a GET, for probes.

        :raises BackendError: it can't be had.
        """
        response = await self._upstream.send(
            "GET", path, headers=self._headers, connect_timeout=self.settings.probe_timeout
        )
        try:
            if response.status != 200:
                await self._check(response, "")
            return await response.read()
        finally:
            await response.aclose()

    async def get_json(self, path: str, shape: type[Any]) -> Any:
        """The JSON object at a path, as a struct.

        :raises BackendError: it can't be had, or is of another shape.
        """
        return _shaped(await self.get(path), shape, f"GET {path}")

    async def post_json(
        self, path: str, content: Mapping[str, object], shape: type[Any], attempt: Attempt
    ) -> Any:
        """The JSON object that answers this one, as a struct; for work that is no generation.

        :raises BackendError: as for :meth:`stream`.
        """
        headers = {k: v for k, v in attempt.headers.items() if k not in self.withheld}
        response = await self._upstream.send(
            "POST",
            path,
            body=msgspec.json.encode(content),
            headers={**headers, **self._headers},
            connect_timeout=attempt.timeouts.connect,
        )
        try:
            await self._check(response, "application/json")
            return _shaped(await response.read(), shape, f"POST {path}")
        finally:
            await response.aclose()

    async def status(self, method: str, path: str, content: object = None) -> int:
        """The status of the answer to a probe's question; its body is of no interest.

        :raises BackendError: there is none, or it tells of the server's state only (429, 5xx).
        """
        response = await self._upstream.send(
            method,
            path,
            body=b"" if content is None else msgspec.json.encode(content),
            headers=self._headers,
            connect_timeout=self.settings.probe_timeout,
        )
        try:
            if response.status == 429 or (response.status >= 500 and response.status != 501):
                await self._check(response, "")
            await response.read()
            return response.status
        finally:
            await response.aclose()

    async def aclose(self) -> None:
        if "_upstream" in self.__dict__:
            await self._upstream.aclose()


def _shaped(body: bytes, shape: type[Any], asked: str) -> Any:
    try:
        return msgspec.json.decode(body, type=shape)
    except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
        raise BackendGarbage(f"{asked} of the backend: {wrong}") from None


def _object(request: GenerateRequest, field: str) -> dict[str, object]:
    value = msgspec.json.decode(request.fields[field]) if field in request.fields else None
    return value if isinstance(value, dict) else {}


async def _drain(chunks: AsyncIterator[bytes]) -> None:
    """Read to the body's end, without which the connection could not be used again."""
    try:
        async with asyncio.timeout(_TRAILER):
            async for _ in chunks:
                pass
    except (TimeoutError, StreamTruncated):
        return  # the answer is complete all the same; closing it drops the connection
