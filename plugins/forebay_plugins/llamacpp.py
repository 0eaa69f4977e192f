"""Adapter ``llamacpp``: llama.cpp's `llama-server` with one model (read at tag b11434).

It queues without bound and answers no status when full: ``slots`` is what it can really do at once.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import Any, ClassVar

import msgspec
from msgspec import Struct

from forebay.api import (
    AdapterKind,
    Attempt,
    BackendRefused,
    Capabilities,
    Endpoint,
    Event,
    GenerateRequest,
    HttpBackendSettings,
    Load,
    Operation,
    Result,
    Timings,
    hookimpl,
)
from forebay_plugins.llamacpp_fields import refuse_unknown
from forebay_plugins.llamacpp_operations import perform, served
from forebay_plugins.openai_events import typed_events
from forebay_plugins.openai_shape import seconds
from forebay_plugins.openai_wire import OPENAI_NEUTRAL, OpenAIServer
from forebay_plugins.prometheus_text import samples

__all__ = ["LlamaCppAdapter", "LlamaCppSettings"]

#: ``max_tokens`` of /v1/completions where none is given, by OpenAI's documentation.
COMPLETION_TOKENS = 16


class LlamaCppSettings(HttpBackendSettings, kw_only=True, frozen=True):
    """Settings of `adapter: llamacpp`."""

    max_tokens: int = 0
    """Limit of chat answers whose client sets none; 0: the size of a slot's context."""
    fields: frozenset[str] = frozenset()
    """Further request fields that this version takes; those it does not know are refused."""


class Generation(Struct):
    n_ctx: int


class Props(Struct):
    """What is read of `GET /props`."""

    total_slots: int
    default_generation_settings: Generation
    model_alias: str = ""
    build_info: str = ""
    endpoint_metrics: bool = True
    modalities: dict[str, bool] = {}
    chat_template_caps: dict[str, bool] = {}


class AnyObject(Struct, tag_field="type", tag="json_object"):
    """OpenAI's ``response_format``, one form."""


class BySchema(Struct, tag_field="type", tag="json_schema"):
    """The other."""

    json_schema: NamedSchema


class NamedSchema(Struct):
    schema: dict[str, Any]


class LlamaCppAdapter(OpenAIServer):
    """One `llama-server`."""

    settings: LlamaCppSettings
    neutral: ClassVar[Mapping[str, object]] = {
        **OPENAI_NEUTRAL,
        "top_k": 0,
        "min_p": 0.0,
        "repeat_penalty": 1.0,
    }
    # With it the server goes on generating after the client has left.
    withheld = frozenset({"x-conversation-id"})
    # It closes the connection after each stream, but says so only if it is asked to.
    stream_headers: ClassVar[Mapping[str, str]] = {"connection": "close"}
    # Of an answer that does not stream it notices only after a second without any event in the
    # whole server that its client has left: never, while others are served. With streams at once.
    always_streams = True
    usage_by_choice = True
    _context_size = 0
    _metrics = True
    #: What was found by asking, and of which model in which build.
    _endpoints: frozenset[Endpoint] | None = None
    _known: tuple[str, str] | None = None

    async def probe(self) -> Capabilities:
        await self.get("/health")  # 503 while the model is being loaded
        props = await self._props()
        known = (props.build_info, props.model_alias)
        if self._endpoints is None or known != self._known:
            self._endpoints = await served(self)
            self._known = known
        return Capabilities(
            endpoints=self._endpoints,
            tools=props.chat_template_caps.get("supports_tools", False),
            schema=True,
            logprobs=True,
            multimodal=any(props.modalities.values()),
            max_context=self._context_size,
            slots=props.total_slots,
            max_choices=props.total_slots,
            version=props.build_info,
            models=(props.model_alias,) if props.model_alias else (),
        )

    async def _props(self) -> Props:
        props: Props = await self.get_json("/props", Props)
        self._context_size = props.default_generation_settings.n_ctx
        self._metrics = props.endpoint_metrics
        return props

    async def perform(self, request: Operation, attempt: Attempt) -> Result:
        return await perform(self, request, attempt, self._context_size)

    async def load(self) -> Load | None:
        """None if the server was started without `--metrics`."""
        if not self._metrics:
            return None
        page = await self.get("/metrics")
        running = samples(page, "llamacpp:requests_processing")
        waiting = samples(page, "llamacpp:requests_deferred")
        return Load(
            running=int(sum(running)) if running else None,
            waiting=int(sum(waiting)) if waiting else None,
        )

    async def changes(self, request: GenerateRequest) -> dict[str, object]:
        refuse_unknown(request, self.settings.fields)
        schema = _schema(request) if request.endpoint == "completions" else {}
        return {
            **schema,
            **_logprobs(request),
            **await self._limit(request),
            **await self._penalties(request),
        }

    def stream(self, request: GenerateRequest, attempt: Attempt) -> AsyncGenerator[Event, None]:
        # Those of completions come in the form of chats: so the gateway is to write them.
        if request.endpoint == "completions" and request.sampling.logprobs is not None:
            return typed_events(request, self._relay(request, attempt))
        return super().stream(request, attempt)

    async def _limit(self, request: GenerateRequest) -> dict[str, object]:
        """Give every answer an end: by itself the server would go on as long as the model does."""
        if request.sampling.max_tokens is not None or "n_predict" in request.fields:
            return {}
        if request.endpoint == "completions":
            return {"max_tokens": COMPLETION_TOKENS}
        return {"max_tokens": self.settings.max_tokens or await self._slot_size()}

    async def _penalties(self, request: GenerateRequest) -> dict[str, object]:
        """Its own name for one of them, and all over the whole context: by itself, 64 tokens."""
        sampling, changes = request.sampling, dict[str, object]()
        if "repetition_penalty" in request.fields:
            changes["repetition_penalty"] = None
            if sampling.repetition_penalty is not None and "repeat_penalty" not in request.fields:
                changes["repeat_penalty"] = sampling.repetition_penalty
        penalised = (
            sampling.repetition_penalty not in (None, 1)
            or sampling.frequency_penalty
            or sampling.presence_penalty
        )
        if penalised and "repeat_last_n" not in request.fields:
            changes["repeat_last_n"] = await self._slot_size()
        return changes

    async def _slot_size(self) -> int:
        """Tokens of a slot."""
        if not self._context_size:
            await self._props()
        return self._context_size

    def timings(self, closing: Mapping[str, Any], headers: Mapping[str, str]) -> Timings | None:
        timings = closing.get("timings")
        if not isinstance(timings, dict):
            return None
        return Timings(
            prefill=seconds(timings.get("prompt_ms")),
            decode=seconds(timings.get("predicted_ms")),
            source="llamacpp.timings",
        )


def _logprobs(request: GenerateRequest) -> dict[str, object]:
    """To it none of the likeliest tokens means no logprobs at all: one is the fewest."""
    asked = request.endpoint == "chat" and request.sampling.logprobs == 0
    return {"top_logprobs": 1} if asked else {}


def _schema(request: GenerateRequest) -> dict[str, object]:
    """``response_format`` in the server's own words: in /v1/completions it ignores OpenAI's.

    :raises BackendRefused: the format is not one of OpenAI's.
    """
    if not request.needs_schema:
        return {}
    try:
        wanted = msgspec.json.decode(request.fields["response_format"], type=AnyObject | BySchema)
    except msgspec.ValidationError as error:
        raise BackendRefused(f"is not in OpenAI's form: {error}", param="response_format") from None
    schema = wanted.json_schema.schema if isinstance(wanted, BySchema) else {"type": "object"}
    return {"response_format": None, "json_schema": schema}


@hookimpl
def adapters() -> Iterable[AdapterKind]:
    return [
        AdapterKind(
            name="llamacpp",
            settings=LlamaCppSettings,
            build=LlamaCppAdapter,
            summary="llama.cpp's llama-server: slots, load, timings.",
            provider="llama_cpp",
        )
    ]
