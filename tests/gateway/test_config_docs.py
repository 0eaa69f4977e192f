from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
import yaml
from msgspec import Struct

from forebay.api import HttpBackendSettings
from forebay.config import Config, Model
from forebay.config_file import load, parse, warnings
from forebay.loader import Registry, load_plugins

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "configuration.md"


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_plugins()


def _generator() -> ModuleType:
    path = ROOT / "scripts" / "generate_config_docs.py"
    spec = importlib.util.spec_from_file_location("generate_config_docs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_types_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == _generator().generate(), "run `make docs`"


def test_every_duration_has_its_unit_on_the_page() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*?\|.*?\| (\w*) \|", PAGE.read_text(), re.MULTILINE)
    durations = [row for row in rows if re.search("timeout$|interval$|ejection|_token$", row[0])]
    assert len(durations) >= 9
    assert {unit for _, unit in durations} == {"seconds"}


def test_every_example_on_the_page_is_valid(registry: Registry) -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        assert parse(block, registry, {}, ROOT).models


def test_the_full_example_has_every_key_with_its_default() -> None:
    tree = yaml.safe_load((ROOT / "examples" / "full.yaml").read_text())
    _assert_complete(tree, Config, {"models", "backends", "keys"})
    (model,) = tree["models"].values()
    _assert_complete(model, Model, {"backends", "policy"})
    backends = tree["backends"].values()
    given = {key for backend in backends for key in backend}
    assert given >= {field.name for field in msgspec.structs.fields(HttpBackendSettings)}


def _assert_complete(tree: dict[str, Any], cls: type[Struct], own: set[str]) -> None:
    """All keys are there, and all but ``own`` are at their defaults."""
    fields = {field.name: field for field in msgspec.structs.fields(cls)}
    assert tree.keys() == fields.keys()
    for name in tree.keys() - own:
        default = fields[name].default
        if isinstance(default, Struct):
            assert tree[name] == msgspec.to_builtins(default), name
        else:
            assert tree[name] == default, name


def test_the_example_is_one_model_over_three_kinds_of_backend(registry: Registry) -> None:
    config = load(ROOT / "examples" / "forebay.yaml", registry, environ={})
    assert config.models["gemma-3-270m"].backends == ["native", "llama", "vllm-1"]
    adapters = [settings.adapter for settings in config.backends.values()]
    assert adapters == ["native", "llamacpp", "vllm"]
    assert warnings(config) == []
