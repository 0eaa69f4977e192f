"""The adapters' contract before real servers, as far as these can be brought into its scenarios.

What a sound server cannot be made to do (garbage, a cut, a failure on cue) is left to the fakes.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from forebay.api import Adapter, AdapterContext, BackendBusy, Endpoint, GenerateRequest
from forebay.config import Config
from forebay.loader import load_plugins
from forebay.testing import AdapterContract, Bench, Scenario, chat_request
from forebay.transport import connect

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]

MODEL = "gemma-3-270m"
ON_CUE = frozenset(
    {
        Scenario.BROKEN,
        Scenario.BUSY,
        Scenario.CUT,
        Scenario.FAILING,
        Scenario.GARBAGE,
        Scenario.SILENT,
        Scenario.UNFINISHED,
    }
)


class Real(AdapterContract):
    kind: ClassVar[str]
    settings: ClassVar[dict[str, Any]] = {"model": MODEL}
    impossible = ON_CUE
    #: A server's own figures are read, and it takes a step until they show that somebody left.
    cancel_within = 10.0
    patience = 200.0
    scenario = Scenario.HEALTHY
    url = ""

    def requests(self) -> list[GenerateRequest]:
        wrong = {"temperature": "hot"} if self.scenario is Scenario.REFUSING else {}
        return [
            chat_request("one two three four five", endpoint=endpoint, stream=streams, **wrong)
            for endpoint in self.endpoints
            for streams in (True, False)
        ]

    def endless(self, endpoint: Endpoint) -> GenerateRequest:
        return chat_request(endpoint=endpoint, max_tokens=2000, ignore_eos=True)

    def place(self, scenario: Scenario) -> dict[str, Any]:
        return {"url": "http://127.0.0.1:9" if scenario is Scenario.DEAD else self.url}

    def busy(self) -> int:
        """Requests that the server says it works on."""
        return 0

    @asynccontextmanager
    async def bench(self, scenario: Scenario) -> AsyncIterator[Bench]:
        self.scenario = scenario
        kind = load_plugins(None).adapter(self.kind)
        settings = kind.settings(adapter=self.kind, **self.settings, **self.place(scenario))
        context = AdapterContext(
            name="real", connect=connect, data_dir=Path(Config().data_dir).expanduser()
        )
        adapter = kind.build(settings, context)
        await adapter.start()
        try:
            if scenario is not Scenario.DEAD:
                await self._ready(adapter)
            yield Bench(adapter, self.busy)
        finally:
            await adapter.aclose()

    async def _ready(self, adapter: Adapter) -> None:
        while True:
            try:
                await adapter.probe()
            except BackendBusy:
                await asyncio.sleep(0.2)
            else:
                return


def figure(url: str, name: str) -> int:
    found = re.search(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", httpx.get(url).text, re.MULTILINE)
    assert found is not None, f"{url} has no {name}"
    return round(float(found[1]))


class TestLlamaCpp(Real):
    kind = "llamacpp"

    @pytest.fixture(autouse=True)
    def _server(self, real: dict[str, Any]) -> None:
        self.url = real["llama"].url

    def busy(self) -> int:
        return figure(f"{self.url}/metrics", "llamacpp:requests_processing")


class TestVllm(Real):
    kind = "vllm"

    @pytest.fixture(autouse=True)
    def _server(self, real: dict[str, Any]) -> None:
        self.url = real["vllm"].url

    def busy(self) -> int:
        return figure(f"{self.url}/metrics", "vllm:num_requests_running")


class TestNative(Real):
    """Started anew for each test; its process and its death are in test_death.py."""

    kind = "native"
    settings: ClassVar[dict[str, Any]] = {"threads": 1, "max_model_len": 1024}
    impossible = ON_CUE | {Scenario.DEAD, Scenario.ENDLESS, Scenario.REFUSING}

    def place(self, scenario: Scenario) -> dict[str, Any]:
        return {"path": MODEL}


class Triton(Real):
    """Its models are stand-ins that repeat the prompt, so no answer is long enough to be left."""

    kind = "triton"
    impossible = ON_CUE | {Scenario.ENDLESS, Scenario.REFUSING}

    @pytest.fixture(autouse=True)
    def _server(self, triton_server: Any) -> None:
        self.url = triton_server.url


class TestTritonEnsemble(Triton):
    settings: ClassVar[dict[str, Any]] = {"model": "ensemble", "chat_template": "plain"}


class TestTritonVllmModel(Triton):
    settings: ClassVar[dict[str, Any]] = {"model": "vllm_model", "chat_template": "plain"}


class TestTritonByGrpc(Triton):
    settings: ClassVar[dict[str, Any]] = {
        "model": "ensemble",
        "chat_template": "plain",
        "protocol": "grpc",
    }
    impossible = Triton.impossible | {Scenario.DEAD}

    def place(self, scenario: Scenario) -> dict[str, Any]:
        by_http = httpx.URL(self.url)
        assert by_http.port is not None
        return {"url": str(by_http.copy_with(port=by_http.port + 1))}
