"""`forebay plugins`: what is installed, and what failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.text import Text

from forebay.cli.admin import json_option
from forebay.cli.output import console, print_json, table
from forebay.config_file import read_tree, wanted_plugins
from forebay.loader import Failed, Loaded, Registry, load_plugins


@click.command()
@click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Load only what this configuration permits (`plugins.only`).",
)
@json_option
def plugins(path: Path | None, as_json: bool) -> None:
    """Show which plugins load here, what each brings, and which fail and why (exit code 1)."""
    registry = load_plugins(None if path is None else wanted_plugins(read_tree(path)))
    if as_json:
        print_json({"plugins": [_described(entry) for entry in registry.report]})
    else:
        _show(registry)
    if any(isinstance(entry, Failed) for entry in registry.report):
        raise click.exceptions.Exit(1)


def _described(entry: Loaded | Failed) -> dict[str, Any]:
    return {
        "name": entry.name,
        "distribution": entry.distribution,
        "version": entry.version,
        "provides": entry.provides if isinstance(entry, Loaded) else (),
        "error": entry.reason if isinstance(entry, Failed) else None,
    }


def _show(registry: Registry) -> None:
    rows = table("plugin", "from", "provides", "")
    failed = [entry for entry in registry.report if isinstance(entry, Failed)]
    for entry in registry.report:
        origin = f"{entry.distribution} {entry.version}"
        if isinstance(entry, Failed):
            rows.add_row(entry.name, origin, Text("failed", style="red"))
            continue
        for index, thing in enumerate(entry.provides or ("nothing",)):
            named = (entry.name, origin) if index == 0 else ("", "")
            rows.add_row(*named, thing, _summary(registry, thing))
    out = console()
    out.print(rows)
    for entry in failed:
        out.print(Text.assemble("\n", (f"{entry.name} failed: ", "red"), entry.reason))


def _summary(registry: Registry, thing: str) -> str:
    """The line that an adapter or a policy says of itself."""
    what, _, name = thing.partition(" ")
    if what == "adapter":
        return registry.adapters[name].summary
    return registry.policies[name].summary if what == "policy" else ""
