"""A click group that imports a command when it runs: `forebay --help` must come at once."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import click


class Command(NamedTuple):
    #: ``module:attribute``
    target: str
    #: The line in `forebay --help`, known without the import.
    summary: str


class Failed(click.ClickException):
    """Ends the program with a message and exit code 1."""


class Misconfigured(click.ClickException):
    """What the user wrote is wrong: exit code 2, as for wrong arguments."""

    exit_code = 2


class LazyGroup(click.Group):
    def __init__(
        self, *args: Any, commands_by_name: dict[str, Command] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._by_name = commands_by_name or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._by_name)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._by_name:
            return None
        module, _, attribute = self._by_name[cmd_name].target.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, item.summary) for name, item in self._by_name.items()])

    def invoke(self, ctx: click.Context) -> Any:
        # Imported here: it takes 70 ms, which `--help` and shell completion need not pay.
        from forebay.api import ConfigError, ForebayError

        try:
            return super().invoke(ctx)
        except ForebayError as error:
            kind = Misconfigured if isinstance(error, ConfigError) else Failed
            raise kind(error.message) from error
