"""The adapters of Triton and of trtllm-serve keep the contract, over real sockets."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

from forebay.testing import AdapterContract, Bench, Scenario


@pytest.fixture(scope="session")
def triton_fakes() -> ModuleType:
    path = Path(__file__).parents[1] / "fakes" / "triton_servers.py"
    spec = spec_from_file_location("triton_servers", path)
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
