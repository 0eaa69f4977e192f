"""Adapter ``openai``: any server with OpenAI's API. What it claims to be able to is configured."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from forebay.api import AdapterKind, Capabilities, Endpoint, HttpBackendSettings, hookimpl
from forebay_plugins.openai_wire import OpenAIServer

__all__ = ["OpenAIAdapter", "OpenAISettings"]


class OpenAISettings(HttpBackendSettings, kw_only=True, frozen=True):
    """Settings of `adapter: openai`."""

    probe_path: str = "/v1/models"
    """Path that answers 200 when the server is ready; of `/v1/models` the list is read too."""
    endpoints: frozenset[Endpoint] = frozenset({"chat", "completions"})
    """Which of `chat` and `completions` it serves."""
    tools: bool = True
    """It can call tools."""
    schema: bool = True
    """It can answer by a JSON schema."""
    logprobs: bool = True
    """It can return log probabilities."""
    multimodal: bool = False
    """It takes messages with images or sound."""
    slots: int = 0
    """Requests it works on at once; 0: not known."""


class Card(Struct):
    id: str
    max_model_len: int | None = None


class ModelList(Struct):
    data: list[Card] | None = None


class OpenAIAdapter(OpenAIServer):
    """One server, of which no more is known than that it speaks OpenAI's API."""

    settings: OpenAISettings

    async def probe(self) -> Capabilities:
        cards: list[Card] = []
        if self.settings.probe_path == "/v1/models":
            cards = (await self.get_json("/v1/models", ModelList)).data or []
        else:
            await self.get(self.settings.probe_path)
        return Capabilities(
            endpoints=self.settings.endpoints,
            tools=self.settings.tools,
            schema=self.settings.schema,
            logprobs=self.settings.logprobs,
            multimodal=self.settings.multimodal,
            slots=self.settings.slots,
            models=tuple(card.id for card in cards),
        )


@hookimpl
def adapters() -> Iterable[AdapterKind]:
    return [
        AdapterKind(
            name="openai",
            settings=OpenAISettings,
            build=OpenAIAdapter,
            summary="Any server with OpenAI's API, relayed as bytes.",
            provider="openai",
        )
    ]
