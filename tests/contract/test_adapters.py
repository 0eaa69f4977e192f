"""Every built-in adapter keeps the contract, over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import ModuleType
from typing import ClassVar

import pytest

from forebay.testing import AdapterContract, Bench, Scenario, adapter_context
from forebay_plugins import llamacpp, openai, vllm
from forebay_plugins.simulated import Failures, SimulatedAdapter, SimulatedSettings


class OverHttp(AdapterContract):
    """Adapters of OpenAI-shaped servers."""

    plugin: ModuleType
    server: str

    @pytest.fixture(autouse=True)
    def _load(self, fakes: ModuleType) -> None:
        self.fakes = fakes

    def bench(self, scenario: Scenario) -> AbstractAsyncContextManager[Bench]:
        made: AbstractAsyncContextManager[Bench] = self.fakes.bench(
            getattr(self.fakes, self.server), self.plugin, scenario
        )
        return made


class TestVllm(OverHttp):
    plugin = vllm
    server = "Vllm"


class TestLlamaCpp(OverHttp):
    plugin = llamacpp
    server = "LlamaCpp"


class TestOpenAIBeforeVllm(OverHttp):
    """The adapter that knows nothing of its server, before two that it may meet."""

    plugin = openai
    server = "Vllm"


class TestOpenAIBeforeLlamaCpp(OverHttp):
    plugin = openai
    server = "LlamaCpp"


class TestSimulated(AdapterContract):
    impossible = frozenset(
        {Scenario.REFUSING, Scenario.GARBAGE, Scenario.FAILING, Scenario.UNFINISHED}
    )
    failures: ClassVar[dict[Scenario, Failures]] = {
        Scenario.ENDLESS: Failures(stall=1, after=4),
        Scenario.SILENT: Failures(silent=1),
        Scenario.BUSY: Failures(busy=1),
        Scenario.BROKEN: Failures(error=1, probe=True),
        Scenario.CUT: Failures(cut=1, after=2),
        Scenario.DEAD: Failures(connect=1, probe=True),
    }

    @asynccontextmanager
    async def bench(self, scenario: Scenario) -> AsyncIterator[Bench]:
        settings = SimulatedSettings(
            adapter="simulated",
            prefill_rate=0,
            decode_rate=0,
            failures=self.failures.get(scenario, Failures()),
        )
        adapter = SimulatedAdapter(settings, adapter_context())
        yield Bench(adapter, lambda: adapter.running + adapter.waiting)
