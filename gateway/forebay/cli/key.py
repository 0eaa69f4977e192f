"""`forebay key`: API keys."""

from __future__ import annotations

import click
import msgspec

from forebay.access import hash_of, new_key


@click.group()
def key() -> None:
    """Make API keys."""


@key.command()
@click.option("--name", default="my-key", show_default=True, help="Name of the key in the logs.")
@click.option("--tenant", default="default", show_default=True, help="Whom its requests belong to.")
def new(name: str, tenant: str) -> None:
    """Make a key and show it, this once, with the lines for the configuration."""
    fresh = new_key()
    click.echo(fresh)
    click.echo(
        "\nThis is the key. It is kept nowhere: give it to its user now. "
        "The configuration knows it by its hash:\n",
        err=True,
    )
    click.echo(f"keys:\n  {_quoted(name)}:\n    hash: {_quoted(hash_of(fresh))}")
    click.echo(f"    tenant: {_quoted(tenant)}")


def _quoted(text: str) -> str:
    """A JSON string, which is a YAML string whatever is in it."""
    return msgspec.json.encode(text).decode()
