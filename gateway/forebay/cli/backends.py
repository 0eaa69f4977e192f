"""`forebay backends`: the fleet of a running gateway."""

from __future__ import annotations

from collections.abc import Iterator

import click
from msgspec import Struct
from rich.text import Text

from forebay.api import Capabilities
from forebay.cached_blocks import CacheStatus
from forebay.cli.admin import admin_option, fetch, json_option
from forebay.cli.output import console, facts, figure, print_json, seconds, table
from forebay.examination import Examination, Question

_COLOURS = {"healthy": "green", "starting": "yellow", "draining": "yellow"}


class BackendStatus(Struct, kw_only=True):
    """One backend as ``GET /backends`` shows it."""

    name: str
    adapter: str
    state: str
    reason: str | None = None
    in_flight: int = 0
    max_in_flight: int = 0
    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None
    load_age: float | None = None
    ttft: float | None = None
    models: list[str] = []
    capabilities: Capabilities | None = None
    requests: int = 0
    failures: int = 0
    cache: CacheStatus | None = None
    examination: Examination | None = None


class Fleet(Struct):
    backends: list[BackendStatus]


@click.command()
@admin_option
@json_option
def backends(admin_url: str, as_json: bool) -> None:
    """Show health, load, latency and abilities of the backends of a running gateway."""
    fleet = fetch(admin_url, "/backends", Fleet)
    if as_json:
        print_json(fleet)
        return
    out = console()
    if not fleet.backends:
        out.print("No backends are configured.")
        return
    rows = table(
        *("backend", "state", "in flight", "running", "waiting", "kv", "ttft", "served", "failed"),
        numbers=("in flight", "running", "waiting", "kv", "ttft", "served", "failed"),
    )
    for item in fleet.backends:
        rows.add_row(
            f"{item.name} ({item.adapter})",
            Text(item.state, style=_COLOURS.get(item.state, "red")),
            f"{item.in_flight}/{item.max_in_flight}" if item.max_in_flight else str(item.in_flight),
            figure(item.running),
            figure(item.waiting),
            figure(item.kv_usage, "{:.0%}"),
            seconds(item.ttft),
            str(item.requests),
            str(item.failures),
        )
    sentences = facts((item.name, _sentence(item)) for item in fleet.backends)
    out.print(rows, "", sentences, sep="\n")


def _sentence(item: BackendStatus) -> str:
    """What the table has no room for: why it is out, what it serves, and can do as was found."""
    parts = [item.reason] if item.reason else []
    parts.append(f"serves {', '.join(item.models)}" if item.models else "serves no model")
    if item.capabilities is not None:
        parts += _abilities(item.capabilities, item.examination)
    if item.load_age is not None:
        parts.append(f"load read {seconds(item.load_age)} ago")
    if item.cache is not None:
        parts.append(_cache(item.cache))
    lines = ["; ".join(parts), *(_examined(item.examination) if item.examination else ())]
    return "\n".join(lines)


def _cache(cache: CacheStatus) -> str:
    if cache.age is None:
        return "no cache events yet"
    found = f"{cache.blocks:,} blocks known cached ({cache.tokens:,} tokens)"
    gaps = f", events lost {cache.gaps} times" if cache.gaps else ""
    return f"{found}, told {seconds(cache.age)} ago{gaps}"


def _examined(found: Examination) -> Iterator[str]:
    """A line for each verdict; why, where it is not the one that was hoped for."""
    words = {"holds": "proven", "fails": "refuted", "unknown": "not known"}
    for verdict, word in words.items():
        told = [
            f"{_name(question)} ({finding.reason})" if finding.reason else _name(question)
            for question, finding in found.findings.items()
            if finding.verdict == verdict
        ]
        if told:
            yield f"{word}: {', '.join(told)}"
    if found.pending:
        yield f"being examined: {', '.join(map(_name, found.pending))}"


def _name(question: Question) -> str:
    return "schema in completions" if question == "completions_schema" else question


def _abilities(found: Capabilities, examination: Examination | None) -> list[str]:
    findings = examination.findings if examination else {}
    refuted = {name for name, finding in findings.items() if finding.verdict == "fails"}
    names: tuple[Question, ...] = ("tools", "schema", "logprobs")
    able: list[str] = sorted(found.endpoints)
    able += [name for name in names if getattr(found, name) and name not in refuted]
    able += ["multimodal"] if found.multimodal else []
    parts = [", ".join(able)]
    if found.max_context:
        parts.append(f"context {found.max_context:,}")
    if found.slots:
        parts.append(f"slots {found.slots}")
    if found.version:
        parts.append(f"version {found.version}")
    return parts
