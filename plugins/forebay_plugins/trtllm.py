"""Adapter ``trtllm``: TensorRT-LLM's own server, `trtllm-serve` (read at its state of 2026).

It speaks OpenAI's API but answers 400 to any field it does not know, so only what it knows is sent
and the rest is refused here by name. Its mid-stream failure is a connection that breaks off. It has
no authentication and no answer when full: requests queue in the engine.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta, Struct, structs

from forebay.api import (
    AdapterKind,
    Attempt,
    BackendFailed,
    BackendLacks,
    CacheBatch,
    Capabilities,
    EmbedRequest,
    Endpoint,
    Event,
    GenerateRequest,
    HttpBackendSettings,
    Load,
    Operation,
    Result,
    Timings,
    Unanswered,
    UpstreamResponse,
    hookimpl,
)
from forebay_plugins.openai_operations import embed
from forebay_plugins.openai_wire import ENGINE_NEUTRAL, OpenAIServer, priority_of
from forebay_plugins.prometheus_text import samples
from forebay_plugins.trtllm_events import CacheEventItem, EventReader

__all__ = ["TrtLlmAdapter", "TrtLlmSettings"]

#: ``max_tokens`` of /v1/completions where none is given, by OpenAI's documentation.
COMPLETION_TOKENS = 16
_BOTH = frozenset(
    {
        "add_special_tokens",
        "best_of",
        "conversation_params",
        "disaggregated_params",
        "early_stopping",
        "echo",
        "frequency_penalty",
        "ignore_eos",
        "include_stop_str_in_output",
        "length_penalty",
        "logit_bias",
        "logprobs",
        "lora_request",
        "max_tokens",
        "min_p",
        "min_tokens",
        "model",
        "n",
        "presence_penalty",
        "priority",
        "prompt_ignore_length",
        "repetition_penalty",
        "response_format",
        "seed",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "stop",
        "stop_token_ids",
        "stream",
        "stream_options",
        "temperature",
        "thinking_token_budget",
        "top_k",
        "top_p",
        "top_p_min",
        "truncate_prompt_tokens",
        "use_beam_search",
        "user",
    }
)
#: What the server's request types have. Source: TensorRT-LLM `serve/openai_protocol.py`.
KNOWN: Mapping[Endpoint, frozenset[str]] = {
    "completions": _BOTH | {"detokenize", "prompt", "return_context_logits"},
    "chat": _BOTH
    | {
        "add_generation_prompt",
        "agent_hierarchy",
        "cache_salt",
        "chat_template",
        "chat_template_kwargs",
        "documents",
        "max_completion_tokens",
        "messages",
        "mm_processor_kwargs",
        "prompt_token_ids",
        "reasoning_effort",
        "tool_choice",
        "tools",
        "top_logprobs",
    },
}
#: OpenAI's fields that change nothing in the answer: left out where the server has no such field.
_HARMLESS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "store",
    }
)
#: Seconds that the server may take to hand out its cache's events: it waits up to 5 for some.
_EVENTS_TIMEOUT = 30.0
_NOTHING = frozenset({b"null", b"{}", b"[]"})
#: Before the headers of timings, which a stream carries as an event behind `[DONE]`.
_METRICS = b"event: trtllm.perf_metrics\ndata: "
_DURATION = re.compile(r"server_(queue|ttft|e2e);dur=(\d+(?:\.\d+)?)")


class TrtLlmSettings(HttpBackendSettings, kw_only=True, frozen=True):
    """Settings of `adapter: trtllm`."""

    endpoints: frozenset[Endpoint] = frozenset({"chat", "completions"})
    """`[embeddings]` for a server that was started in that role; the server does not tell."""
    tools: bool = False
    """It was started with `--tool_parser`; the server does not tell."""
    schema: bool = True
    """It has a guided decoding backend; the server does not tell."""
    multimodal: bool = False
    """Its model takes images or sound; the server does not tell."""
    max_context: int = 0
    """Its `--max_seq_len`, tokens of prompt and answer together; 0: not known."""
    slots: int = 0
    """Its `--max_batch_size`, beyond which requests wait; 0: not known."""
    load_source: Literal["prometheus", "iterations", "none"] = "prometheus"
    """Where its load is read. `prometheus`: `/prometheus/metrics`, there with
    `return_perf_metrics`, fresh whenever a request ends. `iterations`: `/metrics`, there with
    `enable_iter_perf_stats`, always fresh; reading takes the figures away, so nothing else, and no
    second gateway, may read that path."""
    kv_events_interval: Annotated[float, Meta(ge=0)] = 0.0
    """Seconds between two readings of `/kv_cache_events`, there with `event_buffer_max_size` of its
    `kv_cache_config`; 0: not read. Reading takes the events away, as with `iterations`."""


class Version(Struct):
    version: str = ""


class Card(Struct):
    id: str


class ModelList(Struct):
    data: list[Card]


class CacheStats(Struct, rename="camel"):
    used_num_blocks: int = 0
    max_num_blocks: int = 0


class Iteration(Struct, rename="camel"):
    """What is read of an item of `/metrics`."""

    num_active_requests: int = 0
    num_queued_requests: int = 0
    kv_cache_stats: CacheStats | None = None


class TrtLlmAdapter(OpenAIServer):
    """One `trtllm-serve`."""

    settings: TrtLlmSettings
    neutral: ClassVar[Mapping[str, object]] = {**ENGINE_NEUTRAL, "top_k": 0}
    # A fault in its executor ends it at once, for all requests, and may be one request's doing.
    dies_of_requests = True
    # Of a connection that was used before, it could not be told whether it took the request.
    stream_headers: ClassVar[Mapping[str, str]] = {"connection": "close"}
    _version: str | None = None
    _kv_usage: float | None = None
    _iterates = False
    _counts_up = False

    @cached_property
    def _headers(self) -> Mapping[str, str]:
        # Heeded if the server was started with `return_perf_metrics`, by those of 2026.
        return {**super()._headers, "x-trtllm-return-metrics": "1"}

    def whole_headers(self) -> Mapping[str, str]:
        return self.stream_headers

    def stream(self, request: GenerateRequest, attempt: Attempt) -> AsyncGenerator[Event, None]:
        """A call of a tool that the client has named comes without an id: not to be relayed."""
        named = bytes(request.fields.get("tool_choice", b"")).startswith(b"{")
        typed = structs.replace(request, typed=request.typed or named)
        return super().stream(typed, attempt)

    async def post(
        self, path: str, body: bytes, attempt: Attempt, headers: Mapping[str, str] = {}
    ) -> UpstreamResponse:
        try:
            return await super().post(path, body, attempt, headers)
        except Unanswered as cut:
            cut.retryable = False
            raise

    async def probe(self) -> Capabilities:
        await self.get("/health")
        cards: list[Card] = (await self.get_json("/v1/models", ModelList)).data
        if self._version is None:
            self._version = (await self.get_json("/version", Version)).version
        if self.settings.load_source == "prometheus":
            self._counts_up = await self.status("GET", "/prometheus/metrics") == 200
        return Capabilities(
            endpoints=self.settings.endpoints,
            tools=self.settings.tools,
            schema=self.settings.schema,
            logprobs=True,
            multimodal=self.settings.multimodal,
            max_context=self.settings.max_context,
            slots=self.settings.slots,
            version=self._version,
            models=tuple(card.id for card in cards),
        )

    async def changes(self, request: GenerateRequest) -> dict[str, object]:
        """Only what the server knows, in its own words."""
        changes: dict[str, object] = {}
        for field, value in request.fields.items():
            known = field in KNOWN[request.endpoint]
            if bytes(value) == b"null" or (not known and bytes(value) in _NOTHING):
                changes[field] = None  # says nothing, but the server would take offence
            elif field in _HARMLESS:
                changes[field] = None
            elif not known:
                raise _refusal(field, "does not know this field")
        if "max_completion_tokens" in request.fields:  # to the server a second name of max_tokens
            changes |= {"max_completion_tokens": None, "max_tokens": request.sampling.max_tokens}
        if request.endpoint == "completions" and request.sampling.max_tokens is None:
            changes["max_tokens"] = COMPLETION_TOKENS  # to the server: as many as there is room for
        if request.sampling.top_k is not None and request.sampling.top_k < 0:
            changes["top_k"] = 0  # its way of saying: off
        if request.endpoint == "completions" and request.sampling.logprobs == 0:
            changes["logprobs"] = 1  # to the server 0 means none at all
        if request.stream and "stream_options" in request.fields:
            changes["stream_options"] = _stream_options(request)
        if bytes(request.fields.get("priority", b"null")) != b"null":
            changes["priority"] = _priority(request)
        if request.needs_tools:
            changes["tool_choice"] = _tool_choice(request)
        return changes

    def trailer(self, rest: bytes) -> Mapping[str, str]:
        _, _, event = rest.rpartition(_METRICS)
        with suppress(msgspec.DecodeError, UnicodeDecodeError):
            fields = msgspec.json.decode(event.partition(b"\n")[0], type=dict[str, str])
            return {name.lower(): value for name, value in fields.items()}
        return {}

    def timings(self, closing: Mapping[str, Any], headers: Mapping[str, str]) -> Timings | None:
        """From `Server-Timing`: milliseconds since the engine got the request."""
        found = dict(_DURATION.findall(headers.get("server-timing", "")))
        if found.keys() != {"queue", "ttft", "e2e"}:
            return None
        queue, ttft, e2e = (float(found[name]) / 1000 for name in ("queue", "ttft", "e2e"))
        return Timings(queue, ttft - queue, e2e - ttft, "trtllm.server_timing")

    async def perform(self, request: Operation, attempt: Attempt) -> Result:
        if not isinstance(request, EmbedRequest):
            return await super().perform(request, attempt)
        for field in request.extra:
            if field != "add_special_tokens":
                raise _refusal(field, "does not know this field")
        return await embed(self, request, attempt)

    async def load(self) -> Load | None:
        """None as long as the server has no figures: not asked to count, or nothing served yet."""
        if self._counts_up:
            return self._gauges(await self.get("/prometheus/metrics"))
        if self.settings.load_source == "iterations":
            return self._last(await self.get_json("/metrics", list[Iteration]))
        return None

    def cache_events(self) -> AsyncGenerator[CacheBatch, None] | None:
        return self._cache_events() if self.settings.kv_events_interval else None

    async def _cache_events(self) -> AsyncGenerator[CacheBatch, None]:
        reader = EventReader()
        while True:
            try:
                async with asyncio.timeout(_EVENTS_TIMEOUT):
                    items: list[CacheEventItem] = await self.post_json(
                        "/kv_cache_events", {}, list[CacheEventItem], Attempt()
                    )
            except TimeoutError:
                raise BackendFailed("the backend does not hand out its cache's events") from None
            batch = reader.batch(items)
            if batch is not None:
                yield batch
            await asyncio.sleep(self.settings.kv_events_interval)

    def _gauges(self, page: bytes) -> Load | None:
        running = samples(page, "trtllm_num_requests_running")
        waiting = samples(page, "trtllm_num_requests_waiting")
        kv = samples(page, "trtllm_kv_cache_utilization")
        if not running and not waiting and not kv:
            return None
        return Load(
            running=int(sum(running)) if running else None,
            waiting=int(sum(waiting)) if waiting else None,
            kv_usage=sum(kv) / len(kv) if kv else None,
        )

    def _last(self, iterations: list[Iteration]) -> Load | None:
        """The newest iteration; none since the last reading: the engine stands still."""
        if not iterations:
            return Load(running=0, waiting=0, kv_usage=self._kv_usage) if self._iterates else None
        self._iterates = True
        newest = iterations[-1]
        cache = newest.kv_cache_stats
        if cache is not None and cache.max_num_blocks:
            self._kv_usage = cache.used_num_blocks / cache.max_num_blocks
        return Load(
            running=newest.num_active_requests,
            waiting=newest.num_queued_requests,
            kv_usage=self._kv_usage,
        )


def _refusal(field: str, why: str) -> BackendLacks:
    return BackendLacks(f"trtllm-serve {why}", param=field)


def _stream_options(request: GenerateRequest) -> dict[str, object]:
    """Usage always: the gateway needs the counts, and the client gets them only if it asked."""
    said: Any = msgspec.json.decode(request.fields["stream_options"]) or {}
    known = {"include_usage", "continuous_usage_stats", "include_obfuscation"}
    for option in sorted(said.keys() - known):
        raise _refusal(f"stream_options.{option}", "does not know this field")
    said.pop("include_obfuscation", None)  # padding for OpenAI's own streams: says nothing
    return {**said, "include_usage": True}


def _priority(request: GenerateRequest) -> float:
    """From 0 to 1 there, the highest first, and 0.5 where nothing is said."""
    return 0.5 - math.atan(priority_of(request)) / math.pi


def _tool_choice(request: GenerateRequest) -> object:
    """The server's default is `none` where OpenAI's is `auto`."""
    choice = msgspec.json.decode(request.fields.get("tool_choice", b"null"))
    if choice == "required":
        raise _refusal("tool_choice", "cannot require a tool call; name the tool, or say `auto`")
    return choice or "auto"


@hookimpl
def adapters() -> Iterable[AdapterKind]:
    return [
        AdapterKind(
            name="trtllm",
            settings=TrtLlmSettings,
            build=TrtLlmAdapter,
            summary="TensorRT-LLM's trtllm-serve: only the fields it knows, load.",
            provider="tensorrt_llm",
        )
    ]
