"""The adapters of text-generation-inference and SGLang keep the contract, over real sockets."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from forebay.testing import AdapterContract, Bench, Scenario


class BeforeFake(AdapterContract):
    """In front of a fake of tests/fakes (test modules cannot import each other)."""

    server: str

    @pytest.fixture(autouse=True)
    def _load(self) -> None:
        path = Path(__file__).parents[1] / "fakes" / f"{self.server}.py"
        spec = spec_from_file_location(self.server, path)
        assert spec is not None
        assert spec.loader is not None
        self.fake: ModuleType = module_from_spec(spec)
        spec.loader.exec_module(self.fake)

    def bench(self, scenario: Scenario) -> AbstractAsyncContextManager[Bench]:
        made: AbstractAsyncContextManager[Bench] = self.fake.bench(scenario)
        return made


class TestTgi(BeforeFake):
    server = "tgi_server"


class TestSglang(BeforeFake):
    server = "sglang_server"
