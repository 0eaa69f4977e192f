"""`forebay check`: what a configuration means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec
from rich.table import Table
from rich.text import Text

from forebay.api import BackendSettings, ForebayError, Timeouts
from forebay.cli.admin import json_option
from forebay.cli.configured import from_file
from forebay.cli.output import console, print_json, table
from forebay.config import Config, Model
from forebay.config_file import InvalidConfig, masked, warnings


@click.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="FILE")
@click.option("--insecure", is_flag=True, help="Check as `forebay serve --insecure` would.")
@json_option
def check(path: Path, insecure: bool, as_json: bool) -> None:
    """Show what the configuration FILE means, or all that is wrong with it (exit code 2)."""
    try:
        config = from_file(path, insecure=insecure).config
    except ForebayError as error:
        if not as_json:
            raise
        found = list(error.problems) if isinstance(error, InvalidConfig) else [error.message]
        print_json({"valid": False, "problems": found})
        raise click.exceptions.Exit(2) from error
    if as_json:
        shown = masked(msgspec.to_builtins(config))
        print_json({"valid": True, "warnings": warnings(config), "config": shown})
        return
    _show(path, config)


def _show(path: Path, config: Config) -> None:
    out = console()
    out.print(Text.assemble((f"{path}", "bold"), " is valid."))
    for line in warnings(config):
        out.print(Text(f"warning: {line}", style="yellow"))
    for section, rows in (
        (config.models, _models),
        (config.backends, _backends),
        (config.listen, _listeners),
        (config.keys, _keys),
    ):
        if section:
            out.print("", rows(config), sep="\n")


def _models(config: Config) -> Table:
    rows = table("model", "policy", "backends", "timeouts, seconds")
    for name, model in config.models.items():
        rows.add_row(name, _policy(model.policy), _shares(model), _timeouts(model.timeouts))
    return rows


def _policy(spec: str | dict[str, Any]) -> str:
    if isinstance(spec, str):
        return spec
    options = [f"{key}={value}" for key, value in spec.items() if key != "name"]
    return "\n".join([str(spec.get("name")), *options])


def _shares(model: Model) -> str:
    if isinstance(model.backends, list):
        return "\n".join(model.backends)
    return "\n".join(f"{name} (weight {share.weight:g})" for name, share in model.backends.items())


def _timeouts(timeouts: Timeouts) -> str:
    parts = {
        "connect": timeouts.connect,
        "first token": timeouts.first_token,
        "between tokens": timeouts.inter_token,
        "total": timeouts.total,
    }
    return "\n".join(
        f"{name} {value:g}" if value else f"{name} off" for name, value in parts.items()
    )


def _backends(config: Config) -> Table:
    rows = table("backend", "adapter", "at", "settings")
    for name, settings in config.backends.items():
        shown = masked(msgspec.to_builtins(settings))
        place = shown.pop("url", None) or shown.pop("path", None) or "–"
        rows.add_row(name, settings.adapter, str(place), _given(settings, shown))
    return rows


def _given(settings: BackendSettings, shown: dict[str, Any]) -> str:
    """The settings that are not at their defaults."""
    defaults = {
        field.encode_name: msgspec.to_builtins(field.default)
        for field in msgspec.structs.fields(settings)
        if field.default is not msgspec.NODEFAULT
    }
    lines = [
        f"{key}={value}"
        for key, value in shown.items()
        if key != "adapter" and value not in ({}, []) and defaults.get(key, ...) != value
    ]
    return "\n".join(lines) or "defaults"


def _listeners(config: Config) -> Table:
    rows = table("port", "address", "asks for")
    asked = "an API key" if config.keys else "nothing"
    rows.add_row("data", f"{config.listen.host}:{config.listen.port}", asked)
    rows.add_row("admin", f"{config.admin.host}:{config.admin.port}", "nothing")
    return rows


def _keys(config: Config) -> Table:
    rows = table("key", "tenant")
    for name, key in config.keys.items():
        rows.add_row(name, key.tenant)
    return rows
