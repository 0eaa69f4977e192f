"""The adapters of Triton and of trtllm-serve keep the contract, over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

from forebay.api import Attempt, Delta, Event, GenerateRequest
from forebay.testing import AdapterContract, Bench, Scenario


@pytest.fixture(scope="session")
def triton_fakes() -> ModuleType:
    return fakes_from("triton_servers")


@pytest.fixture(scope="session")
def triton_grpc() -> ModuleType:
    return fakes_from("triton_grpc_server")


@pytest.fixture(scope="session")
def trtllm_fakes() -> ModuleType:
    return fakes_from("trtllm_server")


def fakes_from(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "fakes" / f"{name}.py"
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class OverTriton(AdapterContract):
    model: str

    @pytest.fixture(autouse=True)
    def _load(self, triton_fakes: ModuleType) -> None:
        self.fakes = triton_fakes

    def bench(self, scenario: Scenario) -> AbstractAsyncContextManager[Bench]:
        made: AbstractAsyncContextManager[Bench] = self.fakes.bench(self.model, scenario)
        return made


class TestTritonBeforeTensorRtLlm(OverTriton):
    model = "ensemble"
    #: The ensemble never says why an answer ends: that the body is complete must do.
    impossible: ClassVar[frozenset[Scenario]] = frozenset({Scenario.UNFINISHED})


class TestTritonBeforeVllm(OverTriton):
    model = "vllm_model"


class OverTritonsGrpc(OverTriton):
    @pytest.fixture(autouse=True)
    def _load_grpc(self, triton_grpc: ModuleType) -> None:
        self.grpc = triton_grpc

    @asynccontextmanager
    async def bench(self, scenario: Scenario) -> AsyncIterator[Bench]:
        server = self.grpc.GrpcServer(
            self.fakes.MODELS, True, self.grpc.model_in(scenario, lambda: server)
        )
        server.ready = scenario is not Scenario.BROKEN
        async with server.serving() as found:
            url = "http://127.0.0.1:9" if scenario is Scenario.DEAD else found
            adapter = self.fakes.adapter_for(url, self.model, protocol="grpc")
            await adapter.start()
            stream = adapter.stream

            async def read(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
                async with aclosing(stream(request, attempt)) as events:
                    async for event in events:
                        yield event
                        if isinstance(event, Delta):
                            server.read.set()

            adapter.stream = read
            try:
                yield Bench(adapter, lambda: server.running)
            finally:
                await adapter.aclose()


class TestTritonsGrpcBeforeTensorRtLlm(OverTritonsGrpc):
    model = "ensemble"


class TestTritonsGrpcBeforeVllm(OverTritonsGrpc):
    model = "vllm_model"


class TestTritonsOpenAIFrontend(AdapterContract):
    #: It has no answer when it is full, and says nothing when it fails in mid-stream.
    impossible: ClassVar[frozenset[Scenario]] = frozenset({Scenario.BUSY, Scenario.FAILING})

    def bench(self, scenario: Scenario) -> AbstractAsyncContextManager[Bench]:
        made: AbstractAsyncContextManager[Bench] = fakes_from("triton_openai_server").bench(
            scenario
        )
        return made


class TestTrtLlm(AdapterContract):
    #: It says nothing when it fails in mid-stream: the connection breaks off.
    impossible: ClassVar[frozenset[Scenario]] = frozenset({Scenario.FAILING})

    @pytest.fixture(autouse=True)
    def _load(self, trtllm_fakes: ModuleType) -> None:
        self.fakes = trtllm_fakes

    def bench(self, scenario: Scenario) -> AbstractAsyncContextManager[Bench]:
        made: AbstractAsyncContextManager[Bench] = self.fakes.bench(scenario)
        return made
