"""Adapter ``triton_openai``: Triton's own OpenAI frontend (read at its state of August 2026).

It answers 422 to any field it does not know, and takes some that it then leaves aside, so only what
it heeds is sent and the rest is refused here by name. Its failure in a stream, the first response's
included, is a connection that breaks off. It never says `length`: that is told here by the count of
tokens. An inference whose client has left goes on to its end: it cancels none.
Source: triton-inference-server/server, `python/openai` (e1db8a6).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

import msgspec
from msgspec import Raw, Struct, structs

from forebay.api import (
    Attempt,
    BackendBusy,
    BackendError,
    BackendFailed,
    BackendRefused,
    Capabilities,
    Embeddings,
    EmbedRequest,
    Endpoint,
    Event,
    Finished,
    GenerateRequest,
    HttpBackendSettings,
    Operation,
    Relayed,
    Result,
    StreamTruncated,
)
from forebay_plugins.openai_operations import embed
from forebay_plugins.openai_wire import OpenAIServer

__all__ = ["TritonOpenAIAdapter", "TritonOpenAISettings"]

#: ``max_tokens`` of /v1/completions where none is given, by OpenAI's documentation.
COMPLETION_TOKENS = 16
_BOTH = frozenset(
    {
        "frequency_penalty",
        "logprobs",
        "max_tokens",
        "model",
        "presence_penalty",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "temperature",
        "top_p",
        "user",
    }
)
#: What is heeded; `n` and `response_format` are known there, but do nothing.
HEEDED: Mapping[Endpoint, frozenset[str]] = {
    "completions": _BOTH | {"echo", "prompt"},
    "chat": _BOTH | {"max_completion_tokens", "messages", "tool_choice", "tools", "top_logprobs"},
}
#: Heeded of vLLM's models alone: the tensors of TensorRT-LLM's are not given them.
_VLLM = frozenset({"ignore_eos", "min_tokens"})
#: Change nothing in the answer: left out.
_HARMLESS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "response_format",  # of type text: others are refused before
        "safety_identifier",
        "service_tier",
        "store",
    }
)
_NOTHING = frozenset({b"null", b"{}", b"[]"})
#: One choice is what it gives.
_ONE = frozenset({"best_of", "n"})
_STOPPED, _CUT = b'"finish_reason":"stop"', b'"finish_reason":"length"'


class TritonOpenAISettings(HttpBackendSettings, kw_only=True, frozen=True):
    """Settings of `adapter: triton_openai`."""

    endpoints: frozenset[Endpoint] = frozenset({"chat", "completions"})
    """`[embeddings]` for a vLLM model that embeds; the server does not tell."""
    tools: bool = False
    """It was started with `--tool-call-parser`; the server does not tell."""
    vllm: bool = False
    """Its model runs in vLLM's backend, of which alone logprobs can be had, `ignore_eos` and
    `min_tokens` are heeded, and a stream's end by its limit is told; the server does not tell."""
    max_tokens: int = 1024
    """Limit of chat answers whose client sets none; the server's own is 16."""
    max_context: int = 0
    """Tokens of prompt and answer together; 0: not known."""
    slots: int = 0
    """Requests it works on at once; 0: not known."""


class Card(Struct):
    id: str


class ModelList(Struct):
    data: list[Card]


class TritonOpenAIAdapter(OpenAIServer):
    """One frontend."""

    settings: TritonOpenAISettings

    async def probe(self) -> Capabilities:
        if await self.status("GET", "/health/ready") != 200:
            raise BackendBusy("the backend is not ready")
        cards: list[Card] = (await self.get_json("/v1/models", ModelList)).data
        return Capabilities(
            endpoints=self.settings.endpoints,
            tools=self.settings.tools,
            schema=False,
            logprobs=self.settings.vllm,
            extra_fields=False,
            max_context=self.settings.max_context,
            slots=self.settings.slots,
            models=tuple(card.id for card in cards),
            max_choices=1,
        )

    def error(self, status: int, headers: Mapping[str, str], body: bytes) -> BackendError:
        found = super().error(status, headers, body)
        if status == 400 and "Unknown model" in found.message:
            return BackendFailed(f"check `model`: {found.message}")
        if status == 500 and "maximum queue size" in found.message:
            return BackendBusy(found.message)
        return found

    def stream(self, request: GenerateRequest, attempt: Attempt) -> AsyncGenerator[Event, None]:
        """A call that is forced comes without an id, its name in each chunk: not to be relayed."""
        choice = bytes(request.fields.get("tool_choice", b""))
        forced = choice.startswith(b"{") or choice == b'"required"'
        return super().stream(structs.replace(request, typed=request.typed or forced), attempt)

    async def _relay(
        self, request: GenerateRequest, attempt: Attempt
    ) -> AsyncGenerator[Event, None]:
        """The end is held back until the count of tokens tells whether it was the limit's.

        Of streams of TensorRT-LLM's models it may not: the server adds up what each response says,
        and nobody has seen here whether that is the count of its own tokens or of all so far.
        """
        counted = self.settings.vllm or not request.stream
        held: list[Relayed] = []
        async with aclosing(self._explained(request, attempt)) as events:
            async for event in events:
                if isinstance(event, Relayed) and (held or _STOPPED in event.data):
                    held.append(event)
                    continue
                if isinstance(event, Finished):
                    used = event.usage.completion_tokens if event.usage else 0
                    cut = counted and used >= self._limit(request)
                    for relayed in held:
                        data = relayed.data.replace(_STOPPED, _CUT) if cut else relayed.data
                        yield Relayed(data, relayed.events)
                    if cut and event.finish_reasons == ("stop",):
                        event = structs.replace(event, finish_reasons=("length",))
                yield event

    async def _explained(
        self, request: GenerateRequest, attempt: Attempt
    ) -> AsyncGenerator[Event, None]:
        """A stream that breaks off before it says anything may have been refused: that is asked.

        :raises BackendRefused: it was.
        """
        opening: Event | None = None  # in chat the role, which says nothing yet
        said = not request.stream
        try:
            async with aclosing(super()._relay(request, attempt)) as events:
                async for event in events:
                    if not said and opening is None and request.endpoint == "chat":
                        opening = event
                        continue
                    if opening is not None:
                        yield opening
                        opening = None
                    said = True
                    yield event
        except StreamTruncated as cut:
            if said:
                raise
            try:
                await self._ask_why(request, attempt)
            except BackendRefused:
                raise
            except BackendError:
                raise cut from None
            raise

    async def _ask_why(self, request: GenerateRequest, attempt: Attempt) -> None:
        """The same in one piece, of one token: such answers have a status."""
        left = {"stream", "stream_options", "max_completion_tokens", "min_tokens"}
        fields = {name: value for name, value in request.fields.items() if name not in left}
        once = structs.replace(
            request,
            stream=False,
            fields={**fields, "max_tokens": Raw(b"1")},
            sampling=structs.replace(request.sampling, max_tokens=1),
        )
        response = await self._send(once, attempt, streams=False)
        try:
            await self._check(response, "application/json")
        finally:
            await response.aclose()

    def _limit(self, request: GenerateRequest) -> int:
        rest = COMPLETION_TOKENS if request.endpoint == "completions" else self.settings.max_tokens
        return request.sampling.max_tokens or rest

    async def changes(self, request: GenerateRequest) -> dict[str, object]:
        """Only what the server heeds."""
        changes: dict[str, object] = {}
        heeded = HEEDED[request.endpoint] | (_VLLM if self.settings.vllm else frozenset())
        for field, value in request.fields.items():
            nothing = bytes(value) in _NOTHING or (field in _ONE and bytes(value) == b"1")
            if field in heeded:
                if bytes(value) == b"null":
                    changes[field] = None
            elif nothing or field in _HARMLESS:
                changes[field] = None
            else:
                raise _refusal(field, "does not heed this field")
        if request.needs_schema:
            raise _refusal("response_format", "takes a structured answer for any text")
        if request.n > 1:
            raise _refusal("n", "gives one choice")
        if len(request.prompts) > 1 or any(not isinstance(one, str) for one in request.prompts):
            raise _refusal("prompt", "takes one text")
        sampling = request.sampling
        if request.endpoint == "completions":
            changes["max_tokens"] = self._limit(request)
            if sampling.logprobs == 0:
                changes["logprobs"] = 1  # to the server 0 means none at all
            return changes
        if sampling.max_tokens is None:
            changes["max_completion_tokens"] = self._limit(request)
        if bytes(request.fields.get("logprobs", b"")) == b"true":
            # Of several it names the likeliest as the chosen one, and without this asks for one.
            changes["top_logprobs"] = request.fields.get("top_logprobs", 0)
        return changes | _spelt_out(request)

    async def perform(self, request: Operation, attempt: Attempt) -> Result:
        """Embeddings; the server takes one input at a time."""
        if not isinstance(request, EmbedRequest):
            return await super().perform(request, attempt)
        if request.extra:
            raise _refusal(request.extra[0], "does not heed this field")
        found = [
            await embed(self, structs.replace(request, inputs=(one,)), attempt)
            for one in request.inputs
        ]
        vectors = tuple(one.vectors[0] for one in found)
        counts = [one.usage for one in found if one.usage]
        usage = None
        if len(counts) == len(found):
            tokens = sum(one.prompt_tokens for one in counts)
            usage = structs.replace(counts[0], prompt_tokens=tokens)
        return Embeddings(vectors, usage, found[0].model)


def _spelt_out(request: GenerateRequest) -> dict[str, object]:
    """What the server knows by another word, or fails at if it is left out."""
    changes: dict[str, object] = {}
    messages = request.fields.get("messages", Raw(b"[]"))
    if b'"developer"' in bytes(messages):
        turns: list[dict[str, object]] = msgspec.json.decode(messages)
        changes["messages"] = [
            {**turn, "role": "system"} if turn.get("role") == "developer" else turn
            for turn in turns
        ]
    if request.needs_tools:
        tools = msgspec.json.decode(request.fields["tools"])
        for tool in tools:
            tool["function"].setdefault("parameters", {"type": "object", "properties": {}})
        changes["tools"] = tools
    return changes


def _refusal(field: str, why: str) -> BackendRefused:
    return BackendRefused(f"Triton's OpenAI frontend {why}", param=field)
