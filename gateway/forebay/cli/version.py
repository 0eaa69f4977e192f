"""`forebay version`."""

from __future__ import annotations

import platform
from importlib.metadata import version as version_of

import click

from forebay.api import API_VERSION


@click.command()
def version() -> None:
    """Show the version of Forebay, of its plugin API and of Python."""
    click.echo(
        f"forebay {version_of('forebay')} "
        f"(plugin API {API_VERSION}, Python {platform.python_version()})"
    )
