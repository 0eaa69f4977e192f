"""`forebay model`: models for the native engine.

The engine's own program does the work in its own process: the gateway never imports the engine.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from forebay.cli.group import Failed
from forebay.config import Config

__all__ = ["DEMO", "model", "models_folder", "pulled"]

#: The model that is served when nothing is configured.
DEMO = "gemma-3-270m"


def models_folder(data_dir: str) -> Path:
    """Where pulled models lie, each in a folder of its name."""
    return Path(data_dir).expanduser() / "models"


def pulled(name: str, data_dir: str) -> Path:
    """The folder of a model, which is fetched if it is not there yet.

    :raises Failed: the engine is not installed, or it could not fetch the model and has said why.
    """
    folder = models_folder(data_dir) / name
    if not folder.is_dir():
        _run_engine_pull(name, str(folder))
    return folder


def _run_engine_pull(*arguments: str) -> None:
    if importlib.util.find_spec("forebay_engine") is None:
        raise Failed("the native engine is not installed; run `pip install 'forebay[demo]'`")
    command = [sys.executable, "-m", "forebay_engine.pull", *arguments]
    if subprocess.run(command, check=False).returncode:  # noqa: S603 - our own module
        raise Failed("the model is not there; the reason stands above")


def data_dir_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--data-dir",
        default=Config().data_dir,
        show_default=True,
        help="Where models are kept; `data_dir` in the configuration.",
    )(function)


@click.group()
def model() -> None:
    """Fetch models for the native engine."""


@model.command("pull")
@click.argument("name")
@data_dir_option
def pull(name: str, data_dir: str) -> None:
    """Fetch the model NAME, unless it is there already, and print its folder."""
    folder = models_folder(data_dir) / name
    _run_engine_pull(name, str(folder))
    click.echo(folder)


@model.command("list")
@data_dir_option
def list_(data_dir: str) -> None:
    """Show the models that are there and those that can be fetched."""
    folder = models_folder(data_dir)
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    click.echo(f"In {folder}:")
    for name in there or ["(none)"]:
        click.echo(f"  {name}")
    click.echo("\nCan be fetched with `forebay model pull NAME`:")
    _run_engine_pull("--list")
