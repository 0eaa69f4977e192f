"""`forebay watermark`: marks in answers.

The engine's own program does the work in its own process: the gateway never imports the engine.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import click

from forebay.cli.group import Failed

__all__ = ["watermark"]


@click.group()
def watermark() -> None:
    """Look for the marks that the native engine leaves in its answers."""


@watermark.command(
    "detect",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    short_help="Say how likely it is that a text was marked with a key.",
)
@click.pass_context
def detect(context: click.Context) -> None:
    """Say how likely it is that a text was marked with a key."""
    if importlib.util.find_spec("forebay_engine") is None:
        raise Failed("the native engine is not installed; run `pip install 'forebay[native]'`")
    command = [sys.executable, "-m", "forebay_engine.detect", *context.args]
    context.exit(subprocess.run(command, check=False).returncode)  # noqa: S603 - our own module
