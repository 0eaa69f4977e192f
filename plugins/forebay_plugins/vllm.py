"""Adapter ``vllm``: vLLM's OpenAI server (read at 0.32; V0's metrics are understood too).

LoRA adapters are models there: ``model`` may be any name that ``/v1/models`` lists.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import Any

from msgspec import Struct, structs

from forebay.api import (
    AdapterContext,
    AdapterKind,
    Attempt,
    BackendFailed,
    CacheBatch,
    Capabilities,
    Endpoint,
    GenerateRequest,
    Load,
    Operation,
    Result,
    Timings,
    hookimpl,
)
from forebay_plugins.kv_events import KvEvents, KvEventSettings
from forebay_plugins.openai_shape import seconds
from forebay_plugins.openai_wire import ENGINE_NEUTRAL, OpenAIServer
from forebay_plugins.orca import ASK, load_in
from forebay_plugins.prometheus_text import samples
from forebay_plugins.vllm_fields import Known, known_fields, refuse_unknown
from forebay_plugins.vllm_operations import perform, served
from forebay_plugins.vllm_structured import Generation, asked, constraints, generation_of

__all__ = ["VllmAdapter", "VllmSettings"]

#: Readings in a row that answers' headers may save. They don't say how many requests run, so that
#: figure is as old as the last page of metrics.
_SAVED = 2


class VllmSettings(KvEventSettings, kw_only=True, frozen=True):
    """Settings of `adapter: vllm`."""

    tools: bool = True
    """It calls tools, if started with `--enable-auto-tool-choice` and a parser: which is tested."""
    multimodal: bool = False
    """Its model takes images or sound; the server does not tell."""
    slots: int = 0
    """Its `--max-num-seqs`, beyond which requests wait; 0: not known."""


class Version(Struct):
    version: str = ""


class Card(Struct):
    id: str
    max_model_len: int | None = None


class ModelList(Struct):
    data: list[Card]


class VllmAdapter(OpenAIServer):
    """One vLLM server."""

    settings: VllmSettings
    neutral = ENGINE_NEUTRAL
    _version = ""
    #: What was found by asking; asked again when the server's version or models change.
    _endpoints: frozenset[Endpoint] | None = None
    _generation: Generation | None = None
    _fields: Known | None = None
    _known: tuple[str, tuple[str, ...]] | None = None
    #: The load that an answer's header told last, and when.
    _told: Load | None = None
    _told_at = 0.0
    _running: int | None = None
    _saved = _SAVED

    def __init__(self, settings: VllmSettings, context: AdapterContext) -> None:
        super().__init__(settings, context)
        self._events = KvEvents(settings) if settings.kv_events else None

    async def probe(self) -> Capabilities:
        await self.get("/health")
        cards: list[Card] = (await self.get_json("/v1/models", ModelList)).data
        names = tuple(card.id for card in cards)
        wanted = self.settings.model
        if wanted and wanted not in names:
            raise BackendFailed(f"the backend does not serve `model: {wanted}`, but {names}")
        self._version = (await self.get_json("/version", Version)).version
        endpoints = await self._find_out(names)
        return Capabilities(
            endpoints=endpoints,
            tools=self.settings.tools,
            schema=True,
            logprobs=True,
            scoring=True,
            multimodal=self.settings.multimodal,
            max_context=max((card.max_model_len or 0 for card in cards), default=0),
            slots=self.settings.slots,
            version=self._version,
            models=names,
        )

    async def _find_out(self, names: tuple[str, ...]) -> frozenset[Endpoint]:
        known = (self._version, names)
        if self._endpoints is None or known != self._known:
            self._generation = None
            self._fields = await known_fields(self)
            self._endpoints = await served(self, self.settings.model or next(iter(names), ""))
            self._known = known
        return self._endpoints

    async def changes(self, request: GenerateRequest) -> dict[str, object]:
        names = asked(request)
        refuse_unknown(request, self._fields or {}, names)
        if not names:
            return {}
        if self._generation is None:
            model = self.settings.model or request.model
            self._generation = await generation_of(self, model, self._version)
        return constraints(request, names, self._generation)

    async def perform(self, request: Operation, attempt: Attempt) -> Result:
        return await perform(self, request, attempt)

    def whole_headers(self) -> Mapping[str, str]:
        """Ask for its load, but no more often than it is read: telling costs the server some ms."""
        interval = self.settings.load_interval
        fresh = self._told is not None and time.monotonic() - self._told_at < interval / 2
        return ASK if interval and not fresh else {}

    def heard(self, headers: Mapping[str, str]) -> None:
        told = load_in(headers)
        if told is not None:
            self._told, self._told_at = told, time.monotonic()

    async def load(self) -> Load | None:
        """As an answer told since the last reading, else from its page of metrics."""
        age = time.monotonic() - self._told_at
        if self._told is None or age >= self.settings.load_interval or self._saved >= _SAVED:
            self._saved = 0
            return await self._scrape()
        self._saved += 1
        return structs.replace(self._told, running=self._running, age=age)

    async def _scrape(self) -> Load:
        """Of all data-parallel engines: requests summed, the share of KV in use averaged."""
        page = await self.get("/metrics")
        running = samples(page, "vllm:num_requests_running")
        waiting = samples(page, "vllm:num_requests_waiting")
        kv = samples(page, "vllm:kv_cache_usage_perc") or samples(page, "vllm:gpu_cache_usage_perc")
        self._running = int(sum(running)) if running else None
        return Load(
            running=self._running,
            waiting=int(sum(waiting)) if waiting else None,
            kv_usage=sum(kv) / len(kv) if kv else None,
        )

    def cache_events(self) -> AsyncGenerator[CacheBatch, None] | None:
        return None if self._events is None else self._events.batches()

    def timings(self, closing: Mapping[str, Any], headers: Mapping[str, str]) -> Timings | None:
        """Only there with `--enable-per-request-metrics`, and for a single choice."""
        metrics = closing.get("metrics")
        if not isinstance(metrics, dict):
            return None
        # vLLM counts its time to first token from the moment the request was scheduled.
        return Timings(
            queue=seconds(metrics.get("queue_time_ms")),
            prefill=seconds(metrics.get("time_to_first_token_ms")),
            decode=seconds(metrics.get("generation_time_ms")),
            source="vllm.metrics",
        )


@hookimpl
def adapters() -> Iterable[AdapterKind]:
    return [
        AdapterKind(
            name="vllm",
            settings=VllmSettings,
            build=VllmAdapter,
            summary="vLLM's OpenAI server: load, KV use, timings.",
            provider="vllm",
        )
    ]
