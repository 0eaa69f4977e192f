"""From a file, or from nothing, to a valid configuration and the plugins it wants."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click

from forebay.cli.group import Failed
from forebay.cli.model import DEMO, pulled
from forebay.config import Config
from forebay.config_file import build, load, read_tree, wanted_plugins
from forebay.loader import Registry, load_plugins

__all__ = ["Configured", "demo", "from_file"]


class Configured(NamedTuple):
    config: Config
    registry: Registry


def from_file(
    path: Path, *, overrides: Mapping[str, object] = {}, insecure: bool = False
) -> Configured:
    """Load the plugins that the file wants, then the file.

    :raises ConfigError: with all that is wrong.
    """
    registry = load_plugins(wanted_plugins(read_tree(path)))
    config = load(path, registry, environ=os.environ, overrides=overrides, insecure=insecure)
    return Configured(config, registry)


def demo(
    model: str | None, *, overrides: Mapping[str, object] = {}, insecure: bool = False
) -> Configured:
    """One model on the native engine: a folder, a name that can be pulled, or the demo model.

    :raises Failed: the native engine is not installed, or the model cannot be had.
    """
    registry = load_plugins(None)
    if "native" not in registry.adapters:
        raise Failed(
            "the native engine's plugin is not there; see `forebay plugins` for the reason, "
            "or serve other backends with --config FILE"
        )
    folder = _model_folder(model or DEMO)
    tree: dict[str, Any] = {
        "backends": {"native": {"adapter": "native", "path": str(folder)}},
        "models": {folder.name: {"backends": ["native"]}},
        "logging": {"format": "console"},
    }
    config = build(
        tree, registry, environ={}, base=Path.cwd(), overrides=overrides, insecure=insecure
    )
    return Configured(config, registry)


def _model_folder(model: str) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if os.sep in model or model.startswith(("~", ".")):
        raise click.BadParameter(
            f"{model}: no such folder; give one with config.json and safetensors",
            param_hint="--model",
        )
    return pulled(model, Config().data_dir)
