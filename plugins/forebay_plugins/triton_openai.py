"""Adapter ``triton_openai``: Triton's own OpenAI frontend (read at its state of August 2026).

It answers 422 to any field it does not know, and takes some that it then leaves aside, so only what
it heeds is sent and the rest is refused here by name. Its mid-stream failure is a connection that
breaks off. It never says `length`: an answer that was cut at its limit ends with `stop`.
Source: triton-inference-server/server, `python/openai`.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct, structs

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
    GenerateRequest,
    HttpBackendSettings,
    Operation,
    Result,
)
from forebay_plugins.openai_operations import embed
from forebay_plugins.openai_wire import OpenAIServer

__all__ = ["TritonOpenAIAdapter", "TritonOpenAISettings"]

#: ``max_tokens`` of /v1/completions where none is given, by OpenAI's documentation.
COMPLETION_TOKENS = 16
_BOTH = frozenset(
    {
        "frequency_penalty",
        "ignore_eos",
        "logprobs",
        "max_tokens",
        "min_tokens",
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
#: What is heeded; `n`, `logit_bias` and `response_format` are known there, but do nothing.
HEEDED: Mapping[Endpoint, frozenset[str]] = {
    "completions": _BOTH | {"echo", "prompt"},
    "chat": _BOTH | {"max_completion_tokens", "messages", "tool_choice", "tools", "top_logprobs"},
}
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


class TritonOpenAISettings(HttpBackendSettings, kw_only=True, frozen=True):
    """Settings of `adapter: triton_openai`."""

    endpoints: frozenset[Endpoint] = frozenset({"chat", "completions"})
    """`[embeddings]` for a vLLM model that embeds; the server does not tell."""
    tools: bool = False
    """It was started with `--tool-call-parser`; the server does not tell."""
    logprobs: bool = False
    """Its model runs in vLLM's backend, which alone gives them; the server does not tell."""
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
            logprobs=self.settings.logprobs,
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

    async def changes(self, request: GenerateRequest) -> dict[str, object]:
        """Only what the server heeds."""
        changes: dict[str, object] = {}
        for field, value in request.fields.items():
            nothing = bytes(value) in _NOTHING or (field in _ONE and bytes(value) == b"1")
            if field in HEEDED[request.endpoint]:
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
            changes["max_tokens"] = sampling.max_tokens or COMPLETION_TOKENS
            if sampling.logprobs == 0:
                changes["logprobs"] = 1  # to the server 0 means none at all
        elif sampling.max_tokens is None:
            changes["max_completion_tokens"] = self.settings.max_tokens
        return changes

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


def _refusal(field: str, why: str) -> BackendRefused:
    return BackendRefused(f"Triton's OpenAI frontend {why}", param=field)
