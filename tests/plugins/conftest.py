"""Servers to test adapters against, from tests/fakes (test modules cannot import each other)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def fakes() -> ModuleType:
    return load("openai_servers")


@pytest.fixture(scope="session")
def load_fake() -> Callable[[str], ModuleType]:
    return load


@pytest.fixture(scope="session")
def load_module() -> Callable[[Path], ModuleType]:
    return load_path


def load(name: str) -> ModuleType:
    return load_path(Path(__file__).parents[1] / "fakes" / f"{name}.py")


def load_path(path: Path) -> ModuleType:
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[path.stem] = module  # where msgspec looks up what annotations name
    spec.loader.exec_module(module)
    return module
