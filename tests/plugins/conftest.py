"""Servers to test adapters against, from tests/fakes (test modules cannot import each other)."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def fakes() -> ModuleType:
    path = Path(__file__).parents[1] / "fakes" / "openai_servers.py"
    spec = spec_from_file_location("openai_servers", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
