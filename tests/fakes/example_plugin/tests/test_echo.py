"""The adapter keeps the contract; what an echo cannot do is named."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from forebay_example.echo import Echo, EchoSettings

from forebay.api import AdapterContext, Upstream
from forebay.testing import AdapterContract, Bench, Scenario

PACES = {Scenario.HEALTHY: 0.0, Scenario.ENDLESS: 0.2, Scenario.SILENT: 3600.0}


def no_network(url: str) -> Upstream:
    raise AssertionError(f"an echo connects to nobody, not to {url}")


class TestEcho(AdapterContract):
    impossible = frozenset(Scenario) - PACES.keys()

    @asynccontextmanager
    async def bench(self, scenario: Scenario) -> AsyncIterator[Bench]:
        settings = EchoSettings(adapter="echo", pace=PACES[scenario])
        adapter = Echo(settings, AdapterContext(name="x", connect=no_network, data_dir=Path()))
        await adapter.start()
        yield Bench(adapter, lambda: adapter.running)
        await adapter.aclose()
