"""Every built-in adapter keeps the contract, over real sockets."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from types import ModuleType

import pytest

from forebay.testing import AdapterContract, Bench, Scenario
from forebay_plugins import llamacpp, openai, vllm


class _OverHttp(AdapterContract):
    """Adapters of OpenAI-shaped servers."""

    @pytest.fixture(autouse=True)
    def _load(self, fakes: ModuleType) -> None:
        self.fakes = fakes


class TestVllm(_OverHttp):
    def bench(self, scenario: Scenario) -> AbstractAsyncContextManager[Bench]:
        return self.fakes.bench(self.fakes.Vllm, vllm, scenario)


class TestLlamaCpp(_OverHttp):
    def bench(self, scenario: Scenario) -> AbstractAsyncContextManager[Bench]:
        return self.fakes.bench(self.fakes.LlamaCpp, llamacpp, scenario)


class TestOpenAI(_OverHttp):
    """The adapter that knows nothing of the server, in front of the two that it may meet."""

    def bench(self, scenario: Scenario) -> AbstractAsyncContextManager[Bench]:
        return self.fakes.bench(self.fakes.Vllm, openai, scenario)


class TestOpenAIBeforeLlamaCpp(_OverHttp):
    def bench(self, scenario: Scenario) -> AbstractAsyncContextManager[Bench]:
        return self.fakes.bench(self.fakes.LlamaCpp, openai, scenario)
