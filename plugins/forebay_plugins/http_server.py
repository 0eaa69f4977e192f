"""Backends behind HTTP: questions and answers, whatever the dialect."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any, ClassVar

import msgspec

from forebay.api import (
    Adapter,
    AdapterContext,
    Attempt,
    BackendError,
    BackendGarbage,
    HttpBackendSettings,
    StreamTruncated,
    Upstream,
    UpstreamResponse,
)
from forebay_plugins.openai_errors import error_of

__all__ = ["HttpClient", "HttpServer", "drain"]

#: Bytes of an error's body that are read.
_ERROR_BYTES = 64 << 10
#: Seconds after an answer's end in which its body should end; else the connection is dropped.
_TRAILER = 0.25
#: Bytes of it that are kept.
_TRAILER_BYTES = 128 << 10


class HttpClient:
    """Questions to one server."""

    #: Headers that must not reach this kind of server.
    withheld: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, settings: HttpBackendSettings, context: AdapterContext) -> None:
        self.settings = settings
        self._context = context

    @cached_property
    def _upstream(self) -> Upstream:
        return self._context.connect(self.settings.url)

    @cached_property
    def _headers(self) -> Mapping[str, str]:
        headers = {name.lower(): value for name, value in self.settings.headers.items()}
        if self.settings.api_key:
            headers["authorization"] = f"Bearer {self.settings.api_key}"
        return {name: value for name, value in headers.items() if name not in self.withheld}

    def error(self, status: int, headers: Mapping[str, str], body: bytes) -> BackendError:
        """What an answer that is no 200 means."""
        return error_of(status, headers, body)

    async def _check(self, response: UpstreamResponse, content_type: str) -> None:
        """Raise unless it is a 200 of this type."""
        if response.status != 200:
            try:
                body = await response.read(_ERROR_BYTES)
            except BackendGarbage:
                body = b""
            raise self.error(response.status, response.headers, body)
        found = response.headers.get("content-type", "")
        if not found.startswith(content_type):
            raise BackendGarbage(
                f"the backend sent {found[:80]!r} where {content_type} was expected"
            )

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

    async def post(
        self, path: str, body: bytes, attempt: Attempt, headers: Mapping[str, str] = {}
    ) -> UpstreamResponse:
        """The response whose head has arrived; to be closed by the caller."""
        passed = {k: v for k, v in attempt.headers.items() if k not in self.withheld}
        return await self._upstream.send(
            "POST",
            path,
            body=body,
            headers={**passed, **headers, **self._headers},
            connect_timeout=attempt.timeouts.connect,
        )

    async def post_json(
        self, path: str, content: Mapping[str, object], shape: type[Any], attempt: Attempt
    ) -> Any:
        """The JSON object that answers this one, as a struct; for work that is no generation.

        :raises BackendError: as for :meth:`stream`.
        """
        response = await self.post(path, msgspec.json.encode(content), attempt)
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


class HttpServer(HttpClient, Adapter):
    """An adapter of one server; how it streams is the subclass's affair."""


def _shaped(body: bytes, shape: type[Any], asked: str) -> Any:
    try:
        return msgspec.json.decode(body, type=shape)
    except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
        raise BackendGarbage(f"{asked} of the backend: {wrong}") from None


async def drain(chunks: AsyncIterator[bytes]) -> bytes:
    """Read to the body's end, without which the connection could not be used again.

    Returns what was there, if it is not too long.
    """
    rest = b""
    # If it does not end, the answer is complete all the same; closing it drops the connection.
    with suppress(TimeoutError, StreamTruncated):
        async with asyncio.timeout(_TRAILER):
            async for chunk in chunks:
                if len(rest) + len(chunk) <= _TRAILER_BYTES:
                    rest += chunk
    return rest
