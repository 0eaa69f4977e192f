"""How tables, figures and JSON look in the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

import click
import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["console", "facts", "figure", "print_json", "seconds", "table"]

#: Into a pipe or a file; wide enough that no cell of ours is cut.
_PIPE_WIDTH = 160


def console() -> Console:
    """Standard output. Texts are shown as they are: a model may be called `[bold]`."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(markup=False, emoji=False, highlight=False, width=None if known else _PIPE_WIDTH)


def table(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
    """An empty table; the columns in ``numbers`` are aligned to the right."""
    result = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False)
    for name in columns:
        # `fold`: a long name is broken over lines, never cut.
        result.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    return result


def facts(pairs: Iterable[tuple[str, str]]) -> Table:
    """Names with a sentence each; long sentences stay in their column."""
    result = Table.grid(padding=(0, 2))
    result.add_column(style="bold", no_wrap=True)
    result.add_column(overflow="fold")
    for name, text in pairs:
        result.add_row(name, text)
    return result


def figure(value: float | None, form: str = "{:g}") -> str:
    """A number, or a dash for one that is not known."""
    return "–" if value is None else form.format(value)


def seconds(value: float | None) -> str:
    """A duration with its unit, three digits of it."""
    if value is None:
        return "–"
    if value < 1.0:
        return f"{value * 1e3:.3g} ms"
    return f"{value:.3g} s" if value < 1000 else f"{value:.0f} s"


def print_json(value: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
