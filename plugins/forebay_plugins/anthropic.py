"""Adapter ``anthropic``: a server with Anthropic's Messages API, version 2023-06-01."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import suppress
from functools import cached_property

import msgspec
from msgspec import Struct

from forebay.api import (
    AdapterKind,
    Attempt,
    BackendError,
    BackendGarbage,
    Capabilities,
    Event,
    GenerateRequest,
    HttpBackendSettings,
    StreamTruncated,
    hookimpl,
)
from forebay_plugins.anthropic_events import MessageReader
from forebay_plugins.anthropic_request import body_of
from forebay_plugins.http_server import HttpServer, drain
from forebay_plugins.openai_errors import error_of

__all__ = ["AnthropicAdapter", "AnthropicSettings"]

#: Bytes of the longest event.
MAX_EVENT = 1 << 20


class AnthropicSettings(HttpBackendSettings, kw_only=True, frozen=True):
    """Settings of `adapter: anthropic`."""

    max_tokens: int = 4096
    """Limit of answers whose client sets none; this API wants one in every request."""
    max_context: int = 0
    """Tokens of prompt and answer together, which the API does not tell; 0: not known."""
    slots: int = 0
    """Requests it works on at once; 0: not known."""


class Card(Struct):
    id: str


class ModelList(Struct):
    data: list[Card]


class AnthropicAdapter(HttpServer):
    """One account at one server."""

    settings: AnthropicSettings

    @cached_property
    def _headers(self) -> Mapping[str, str]:
        headers = {"anthropic-version": "2023-06-01"}
        headers |= {name.lower(): value for name, value in self.settings.headers.items()}
        if self.settings.api_key:
            headers["x-api-key"] = self.settings.api_key
        return headers

    async def probe(self) -> Capabilities:
        cards: list[Card] = (await self.get_json("/v1/models", ModelList)).data
        names = tuple(card.id for card in cards)
        return Capabilities(
            endpoints=frozenset({"chat"}),
            tools=True,
            multimodal=True,
            extra_fields=False,
            max_choices=1,
            max_context=self.settings.max_context,
            slots=self.settings.slots,
            models=names,
        )

    def error(self, status: int, headers: Mapping[str, str], body: bytes) -> BackendError:
        """529 says that it is overloaded as a whole, and does not speak against the request."""
        return error_of(503 if status == 529 else status, headers, body)

    async def stream(
        self, request: GenerateRequest, attempt: Attempt
    ) -> AsyncGenerator[Event, None]:
        """Always streamed from the server: so a client's leaving reaches it at once."""
        model = self.settings.model or request.model
        body = msgspec.json.encode(body_of(request, model, self.settings.max_tokens))
        response = await self.post("/v1/messages", body, attempt)
        try:
            await self._check(response, "text/event-stream")
            reader, rest, chunks = MessageReader(), b"", response.chunks()
            with suppress(StreamTruncated):  # a cut shows in that no event ends the message
                async for chunk in chunks:
                    # A chunk may end within a CRLF: only whole events are looked at.
                    *events, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
                    if len(rest) > MAX_EVENT:
                        raise BackendGarbage(f"an event is longer than {MAX_EVENT} bytes")
                    for event in events:
                        said = list(reader.events(event))
                        if reader.done:
                            await drain(chunks)
                        for piece in said:
                            yield piece
                    if reader.done:
                        return
            raise StreamTruncated("the backend's stream ended before its message did")
        finally:
            await response.aclose()


@hookimpl
def adapters() -> Iterable[AdapterKind]:
    return [
        AdapterKind(
            name="anthropic",
            settings=AnthropicSettings,
            build=AnthropicAdapter,
            summary="Anthropic's Messages API.",
            provider="anthropic",
        )
    ]
