"""`forebay conformance`: does a backend behind Forebay keep what clients are promised?"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from forebay.api import ConfigError
from forebay.cli.output import console, facts, table
from forebay.config import Logging
from forebay.config_file import read_settings
from forebay.conformance import (
    CHECKS,
    Check,
    Report,
    Result,
    Subject,
    Verdict,
    examine,
    markdown,
    remarks,
)
from forebay.loader import load_plugins
from forebay.registry import nearest
from forebay.telemetry import logs

_COLOURS = {"passed": "green", "repaired": "cyan", "lacking": "yellow", "broken": "red"}
_VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


def _writable(_: click.Context, __: click.Parameter, value: str | None) -> Path | None:
    """The file that is to be written, checked before a long run and not after it."""
    if value is None:
        return None
    path = Path(value)
    if path.is_dir() or not path.parent.is_dir():
        raise click.BadParameter(f"cannot write {value}: give a file in a folder that is there")
    return path


@click.command()
@click.argument("target", required=False, default="")
@click.option(
    "--adapter", metavar="NAME", help="The kind of backend; `forebay plugins` lists them."
)
@click.option("--model", default="", help="Its name at the backend.  [default: the first it tells]")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="A further setting of the adapter, as in the configuration; may be repeated.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="AREA|CHECK",
    help="Run only these; may be repeated.",
)
@click.option("--list", "list_only", is_flag=True, help="List the checks, and run none.")
@click.option("--json", "json_file", callback=_writable, metavar="FILE", help="Write the report.")
@click.option(
    "--markdown", "markdown_file", callback=_writable, metavar="FILE", help="Write it for people."
)
@click.option("--fake", is_flag=True, help="Mark the report: the target only plays the server.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=120.0,
    show_default=True,
    help="Seconds for one check on one way, and for the backend to become ready.",
)
def conformance(
    target: str,
    adapter: str | None,
    model: str,
    settings: tuple[str, ...],
    only: tuple[str, ...],
    list_only: bool,
    json_file: Path | None,
    markdown_file: Path | None,
    fake: bool,
    timeout: float,
) -> None:
    """Check what a backend behind Forebay keeps of what clients are promised.

    TARGET is its URL; for adapters that take a `path`, that. Each check is made through a gateway
    that is started for it and, where that can be, of the backend itself. Exit code 1 if a promise
    is broken.
    """
    checks = chosen(only)
    if list_only:
        _list(checks)
        return
    if not adapter:
        raise click.UsageError("give the kind of backend with --adapter NAME")
    subject = Subject(
        adapter=adapter,
        target=target,
        model=model,
        settings=_settings(settings),
        fake=fake,
        timeout=timeout,
    )
    logs.configure(Logging(level="error", format="console"))
    report = _examine(subject, checks)
    if json_file is not None:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    if markdown_file is not None:
        markdown_file.write_text(markdown(report), encoding="utf-8")
    _show(report)
    if report.broken:
        raise click.exceptions.Exit(1)


def chosen(only: Sequence[str]) -> list[Check]:
    """The checks of these areas and ids; all without any.

    :raises click.BadParameter: there is no such area or check.
    """
    known = {check.id for check in CHECKS} | {check.area for check in CHECKS}
    for name in only:
        if name not in known:
            raise click.BadParameter(
                f"there is no area or check {name!r}; {nearest(name, known)}", param_hint="--only"
            )
    return [check for check in CHECKS if not only or {check.id, check.area} & set(only)]


def _settings(given: Sequence[str]) -> dict[str, Any]:
    """Each value as YAML, as in the file."""
    settings: dict[str, Any] = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise click.BadParameter(f"write KEY=VALUE, not {item!r}", param_hint="--set")
        try:
            settings |= read_settings(f"{key.strip()}: {value}")
        except ConfigError as error:
            raise click.BadParameter(error.message, param_hint="--set") from error
    return settings


def _examine(subject: Subject, checks: Sequence[Check]) -> Report:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    err = Console(stderr=True)
    with Progress(*columns, console=err, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("examining", total=len(checks))

        def told(result: Result) -> None:
            bar.update(task, advance=1, description=result.area)

        return asyncio.run(examine(subject, load_plugins(), checks, told))


def _list(checks: Sequence[Check]) -> None:
    console().print(facts((check.id, check.promise) for check in checks))


def _show(report: Report) -> None:
    out = console()
    rows = table("area", *_VERDICTS, numbers=_VERDICTS)
    for area, results in report.areas().items():
        rows.add_row(area, *_figures(Counter(result.verdict for result in results)))
    rows.add_section()
    rows.add_row("all", *_figures(report.counts))
    who = f"{report.adapter} {report.backend_version}".strip()
    stands_for = "a stand-in for " if report.target == "fake" else ""
    out.print(
        f"{stands_for}{who}, model {report.model}, {report.duration:.0f} s", "", rows, sep="\n"
    )
    for verdict in reversed(_VERDICTS[1:]):
        lines = [
            (", ".join(result.id for result in of), text)
            for results in report.areas().values()
            for found, text, of in remarks(results)
            if found == verdict
        ]
        if lines:
            out.print("", Text(verdict, style=f"bold {_COLOURS[verdict]}"), sep="\n")
        for ids, text in lines:
            out.print(Text.assemble((f"  {ids}\n", "bold"), f"    {text}"))


def _figures(counts: Counter[str]) -> list[Text]:
    return [
        Text(str(counts[verdict] or "–"), style=_COLOURS[verdict] if counts[verdict] else "")
        for verdict in _VERDICTS
    ]
