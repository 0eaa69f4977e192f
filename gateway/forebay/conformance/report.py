"""What an examination found, and how it is written down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal, get_args

from msgspec import Struct

__all__ = ["HOLDS", "Report", "Result", "Verdict", "markdown", "remarks"]

Verdict = Literal["passed", "repaired", "lacking", "broken"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

#: In :attr:`Result.direct`: the promise holds without Forebay, too.
HOLDS = "holds"


class Result(Struct, frozen=True, kw_only=True):
    """Of one check."""

    id: str
    area: str
    promise: str
    verdict: Verdict
    #: Why it is not plainly passed.
    reason: str = ""
    #: What the backend itself does when asked the same: ``holds``, or why not; None: not compared.
    direct: str | None = None
    #: It took, on both ways.
    seconds: float = 0.0


class Report(Struct, frozen=True, kw_only=True):
    """Of one backend. Holds no address, so that it can be shown around."""

    adapter: str
    #: The model's name at the backend.
    model: str
    #: As the backend tells it; may be empty.
    backend_version: str
    forebay_version: str
    #: Of the end, UTC, ISO 8601.
    date: str
    #: Whether the real server was examined, or one that plays it.
    target: Literal["live", "fake"]
    #: Endpoints and capabilities that the gateway claimed for it, sorted.
    claims: tuple[str, ...]
    #: Seconds.
    duration: float
    results: tuple[Result, ...]

    @property
    def counts(self) -> Counter[str]:
        return Counter(result.verdict for result in self.results)

    @property
    def broken(self) -> list[Result]:
        return [result for result in self.results if result.verdict == "broken"]

    def areas(self) -> dict[str, list[Result]]:
        found: dict[str, list[Result]] = {}
        for result in self.results:
            found.setdefault(result.area, []).append(result)
        return found


def remarks(results: list[Result]) -> Iterator[tuple[Verdict, str, list[Result]]]:
    """Verdict, sentence and results of all that is not plainly passed; equal ones together."""
    found: dict[tuple[Verdict, str], list[Result]] = {}
    for result in results:
        if result.verdict != "passed":
            found.setdefault((result.verdict, sentence(result)), []).append(result)
    for (verdict, text), of in sorted(found.items(), key=lambda item: VERDICTS.index(item[0][0])):
        yield verdict, text, of


def sentence(result: Result) -> str:
    """What is to be said of a verdict."""
    if result.verdict == "repaired":
        return f"without Forebay: {result.direct}"
    if result.direct == HOLDS:
        return f"{result.reason} (without Forebay it holds)"
    return result.reason


def markdown(report: Report) -> str:
    """The report for people."""
    counts = report.counts
    server = "the real server" if report.target == "live" else "a stand-in, **not the real server**"
    version = f" {report.backend_version}" if report.backend_version else ""
    parts = [
        f"# Conformance of `{report.adapter}`\n",
        f"Examined: {server}{version}, model `{report.model}`, by Forebay "
        f"{report.forebay_version} on {report.date[:10]}, in {report.duration:.0f} s.\n",
        f"Claimed: {', '.join(report.claims)}.\n",
        f"**{len(report.results)} checks: "
        + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
        + ".**\n",
        "| area | " + " | ".join(VERDICTS) + " |",
        "|---|" + "---:|" * len(VERDICTS),
    ]
    for area, results in report.areas().items():
        of = Counter(result.verdict for result in results)
        parts.append(f"| {area} | " + " | ".join(str(of[verdict]) for verdict in VERDICTS) + " |")
    for area, results in report.areas().items():
        parts += [f"\n## {area}\n", "| check | promise | verdict | remark |", "|---|---|---|---|"]
        for result in results:
            name = result.id.partition(".")[2]
            remark = sentence(result) if result.verdict != "passed" else _plain(result)
            cells = (name, result.promise, result.verdict, remark)
            parts.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(parts) + "\n"


def _plain(result: Result) -> str:
    return "" if result.direct is not None else "not compared"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
