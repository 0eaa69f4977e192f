"""Adapter ``sglang``: SGLang's OpenAI server (read at 0.5.23; 0.5's older routes are tried too).

A request is cancelled by closing its connection and in no other way: its `/abort_request` matches
by prefix, so that ending `req-1` would end `req-10` as well.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import msgspec
from msgspec import Struct

from forebay.api import (
    AdapterContext,
    AdapterKind,
    Attempt,
    BackendError,
    BackendFailed,
    BackendGarbage,
    BackendLacks,
    CacheBatch,
    Capabilities,
    DetokenizeRequest,
    EmbedRequest,
    Endpoint,
    GenerateRequest,
    Load,
    Operation,
    Ranked,
    Ranking,
    RerankRequest,
    Result,
    ScoreRequest,
    Scores,
    Text,
    Timings,
    TokenizeRequest,
    Tokens,
    Unsupported,
    hookimpl,
)
from forebay_plugins.kv_events import KvEvents, KvEventSettings
from forebay_plugins.openai_operations import embed, extras
from forebay_plugins.openai_wire import ENGINE_NEUTRAL, OpenAIServer, priority_of
from forebay_plugins.prometheus_text import samples

__all__ = ["SglangAdapter", "SglangSettings"]

#: A tokenizer without a limit of its own says 1e30.
_LONGEST_CONTEXT = 1 << 31


#: Fields beyond OpenAI's that it heeds: of others it says nothing, and answers without them.
_FIELDS = frozenset(
    {
        "bootstrap_host",
        "bootstrap_port",
        "bootstrap_room",
        "cache_salt",
        "chat_template_kwargs",
        "continue_final_message",
        "custom_logit_processor",
        "custom_params",
        "data_parallel_rank",
        "ebnf",
        "extra_key",
        "input_ids",
        "json_schema",
        "logit_bias",
        "lora_path",
        "no_stop_trim",
        "priority",
        "reasoning_effort",
        "regex",
        "return_cached_tokens_details",
        "return_hidden_states",
        "return_prompt_token_ids",
        "return_routed_experts",
        "return_token_ids",
        "routed_dp_rank",
        "separate_reasoning",
        "session_params",
        "skip_special_tokens",
        "stop_regex",
        "stop_token_ids",
        "stream_reasoning",
        "watermark",
    }
)


class SglangSettings(KvEventSettings, kw_only=True, frozen=True):
    """Settings of `adapter: sglang`."""

    multimodal: bool = False
    """Its model takes images or sound; the server does not tell."""
    rerank: bool = False
    """Its model is a cross-encoder, which ranks; the server does not tell."""
    fields: frozenset[str] = frozenset()
    """Further request fields that this version takes; those it does not know are refused."""


class ServerInfo(Struct):
    """What is read of `GET /server_info`: the arguments that it was started with."""

    version: str = ""
    is_embedding: bool = False
    tool_call_parser: str | None = None
    max_running_requests: int | None = None
    enable_metrics: bool = False
    enable_priority_scheduling: bool = False
    schedule_low_priority_values_first: bool = False


class Card(Struct):
    id: str
    max_model_len: int | None = None


class ModelList(Struct):
    data: list[Card]


class RankLoad(Struct):
    """Of one data-parallel rank."""

    num_running_reqs: int
    num_waiting_reqs: int
    token_usage: float = 0.0


class Loads(Struct):
    loads: list[RankLoad]


class Rank(Struct):
    index: int
    score: float


class MetaInfo(Struct):
    """Times of a chat choice: seconds, and Unix seconds. Counted with `--enable-metrics`."""

    queue_time: float
    forward_entry_time: float
    prefill_finished_time: float
    request_finished_ts: float


class TextOf(Struct):
    text: str


class TokenIds(Struct):
    tokens: tuple[int, ...]
    max_model_len: float = 0


class SglangAdapter(OpenAIServer):
    """One SGLang server."""

    settings: SglangSettings
    neutral = ENGINE_NEUTRAL
    unasked: ClassVar[tuple[str, ...]] = ("meta_info",)
    _info: ServerInfo | None = None
    _served = ""
    _context_length = 0

    def __init__(self, settings: SglangSettings, context: AdapterContext) -> None:
        super().__init__(settings, context)
        self._events = KvEvents(settings) if settings.kv_events else None

    async def probe(self) -> Capabilities:
        try:
            await self.get("/health")
        except BackendError:
            self._info = None  # it may come back with other arguments
            raise
        cards: list[Card] = (await self.get_json("/v1/models", ModelList)).data
        self._served = cards[0].id if cards else ""
        self._context_length = max((card.max_model_len or 0 for card in cards), default=0)
        info = await self._arguments()
        return Capabilities(
            endpoints=self._endpoints(info),
            tools=info.tool_call_parser is not None,
            schema=True,
            logprobs=True,
            multimodal=self.settings.multimodal,
            max_context=self._context_length,
            slots=info.max_running_requests or 0,
            version=info.version,
            models=tuple(card.id for card in cards),
        )

    def _endpoints(self, info: ServerInfo) -> frozenset[Endpoint]:
        served: set[Endpoint] = {"tokenize", "detokenize"}
        if self.settings.rerank:
            served |= {"rerank", "score"}
        if info.is_embedding:
            return frozenset(served | {"embeddings"})
        return frozenset(served | {"chat", "completions"})

    async def _arguments(self) -> ServerInfo:
        """Asked once: the answer comes from the scheduler, which has better things to do."""
        if self._info is None:
            try:
                self._info = await self.get_json("/server_info", ServerInfo)
            except BackendFailed:  # older ones know it by another name
                self._info = await self.get_json("/get_server_info", ServerInfo)
        return self._info

    async def load(self) -> Load | None:
        """Of all data-parallel ranks: requests summed, the share of KV in use averaged."""
        if not (await self._arguments()).enable_metrics:
            ranks: list[RankLoad] = (await self.get_json("/v1/loads?include=core", Loads)).loads
            return Load(
                running=sum(rank.num_running_reqs for rank in ranks),
                waiting=sum(rank.num_waiting_reqs for rank in ranks),
                kv_usage=sum(rank.token_usage for rank in ranks) / len(ranks) if ranks else None,
            )
        page = await self.get("/metrics")
        running = samples(page, "sglang:num_running_reqs")
        waiting = samples(page, "sglang:num_queue_reqs")
        kv = samples(page, "sglang:token_usage")
        return Load(
            running=int(sum(running)) if running else None,
            waiting=int(sum(waiting)) if waiting else None,
            kv_usage=sum(kv) / len(kv) if kv else None,
        )

    def cache_events(self) -> AsyncGenerator[CacheBatch, None] | None:
        return None if self._events is None else self._events.batches()

    async def changes(self, request: GenerateRequest) -> dict[str, object]:
        changes: dict[str, object] = {"model": self._name(request.model)}
        if "rid" in request.extra:
            raise refuse("rid", "cancelling one request would end all whose ids begin like its")
        for field in request.extra:
            if field not in _FIELDS and field not in self.settings.fields:
                raise refuse(field, "it does not know the field")
        if "priority" in request.extra:
            changes["priority"] = await self._priority(request)
        if request.endpoint == "chat" and self._times(request):
            changes["return_meta_info"] = True
        return changes

    def _times(self, request: GenerateRequest) -> bool:
        """Its times can be had: streams do not tell them. With logprobs they come twice."""
        whole = not request.stream and request.n == 1 and request.sampling.logprobs is None
        return whole and self._info is not None and self._info.enable_metrics

    def timings(self, closing: Mapping[str, Any], headers: Mapping[str, str]) -> Timings | None:
        choices = closing.get("choices") or [{}]
        try:
            told = msgspec.convert(choices[0].get("meta_info"), MetaInfo)
        except msgspec.ValidationError:
            return None
        prefilled = told.prefill_finished_time
        prefill = prefilled - told.forward_entry_time
        decode = told.request_finished_ts - prefilled
        return Timings(told.queue_time, prefill, decode, "sglang.meta_info")

    def _name(self, model: str) -> str:
        """The server takes any name, but what follows a colon for that of a LoRA adapter."""
        return self.settings.model or (self._served or "default" if ":" in model else model)

    async def _priority(self, request: GenerateRequest) -> int:
        """As vLLM has it, the lowest value comes first; here that depends on an argument."""
        priority = priority_of(request)
        info = await self._arguments()
        if not info.enable_priority_scheduling:
            raise refuse("priority", "it runs without `--enable-priority-scheduling`")
        return priority if info.schedule_low_priority_values_first else -priority

    async def perform(self, request: Operation, attempt: Attempt) -> Result:
        if isinstance(request, EmbedRequest):
            return await embed(self, request, attempt)
        if isinstance(request, RerankRequest):
            return await self._rerank(request, attempt)
        if isinstance(request, ScoreRequest):
            return await self._score(request, attempt)
        if isinstance(request, TokenizeRequest):
            return await self._tokenize(request, attempt)
        if isinstance(request, DetokenizeRequest):
            body = {**extras(request.fields, request.extra), "tokens": request.tokens}
            text: TextOf = await self.post_json("/detokenize", body, TextOf, attempt)
            return Text(text.text)
        raise Unsupported(f"an sglang backend cannot serve {request.endpoint}")

    async def _rerank(self, request: RerankRequest, attempt: Attempt) -> Ranking:
        more = extras(request.fields, request.extra)
        if request.top_n is not None:
            more["top_n"] = request.top_n
        ranks = await self._ranks(request.query, request.documents, more, attempt)
        best = sorted(ranks, key=lambda rank: -rank.score)[: request.top_n]
        return Ranking(tuple(Ranked(rank.index, rank.score) for rank in best))

    async def _score(self, request: ScoreRequest, attempt: Attempt) -> Scores:
        """By ranking, once for each first text: its own `/v1/score` weighs tokens of its choice."""
        more = extras(request.fields, request.extra)
        places: dict[str, list[int]] = {}
        for place, (first, _) in enumerate(request.pairs):
            places.setdefault(first, []).append(place)
        found: dict[int, float] = {}
        for first, where in places.items():
            texts = [request.pairs[place][1] for place in where]
            for rank in await self._ranks(first, texts, more, attempt):
                found[where[rank.index]] = rank.score
        if len(found) != len(request.pairs):
            raise BackendGarbage(f"the backend gave {len(found)} of {len(request.pairs)} scores")
        return Scores(tuple(found[place] for place in range(len(found))))

    async def _ranks(
        self, query: str, documents: Sequence[str], more: Mapping[str, object], attempt: Attempt
    ) -> list[Rank]:
        """Its answer is a bare list; it reports no usage."""
        body = {**more, "query": query, "documents": documents, "return_documents": False}
        ranks: list[Rank] = await self.post_json("/v1/rerank", body, list[Rank], attempt)
        if not all(0 <= rank.index < len(documents) for rank in ranks):
            raise BackendGarbage("the backend ranked a document that it was not given")
        return ranks

    async def _tokenize(self, request: TokenizeRequest, attempt: Attempt) -> Tokens:
        if request.text is None:
            raise refuse("messages", "it tokenizes texts alone")
        body = {
            **extras(request.fields, request.extra),
            "prompt": request.text,
            "add_special_tokens": request.add_special_tokens,
        }
        found: TokenIds = await self.post_json("/tokenize", body, TokenIds, attempt)
        longest = int(found.max_model_len) if found.max_model_len < _LONGEST_CONTEXT else 0
        return Tokens(ids=found.tokens, max_model_len=self._context_length or max(longest, 0))


def refuse(field: str, why: str) -> BackendLacks:
    return BackendLacks(f"an sglang backend cannot serve `{field}`: {why}", param=field)


@hookimpl
def adapters() -> Iterable[AdapterKind]:
    return [
        AdapterKind(
            name="sglang",
            settings=SglangSettings,
            build=SglangAdapter,
            summary="SGLang's OpenAI server: load, embeddings, rerank, tokens.",
            provider="sglang",
        )
    ]
