"""Writes docs/backends.md, the matrix of promises and backends, from docs/conformance/*.json.

Run as `make docs`. The reports are made by `forebay conformance --json`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import msgspec

from forebay.conformance import CHECKS, Report, Result, Verdict

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "docs" / "conformance"
TARGET = ROOT / "docs" / "backends.md"
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
SIGNS = {"passed": "yes", "repaired": "repaired", "lacking": "–", "broken": "**broken**"}

HEAD = """\
# Backends

<!-- Written by scripts/generate_backends_doc.py (`make docs`) from docs/conformance/*.json. -->

What each backend, with Forebay before it, keeps of what clients are promised. Every figure comes
from a run of `forebay conformance` ([how it judges](conformance.md)); the reports lie in
[`conformance/`](conformance/).

| | |
|---|---|
| yes | it holds, through Forebay and without it, or there was nothing to compare it with |
| repaired | it holds through Forebay, and not without: the adapter made it so |
| – | refused clearly with a 400, or not to be seen |
| **broken** | neither kept nor refused |
| blank | the check is younger than the report |
"""

LIVE = """\
Real servers, with a base model of 270 million parameters. Triton's models are ours: `ensemble` has
the tensors of TensorRT-LLM's and repeats its prompt, `embedder` makes vectors up
(`scripts/backends/triton`). What they lack says nothing of the engines that they stand for.
"""

NOT_LIVE = """\
**Nobody has driven these adapters against the real thing yet: {names}.** {played}

The stand-ins are small servers in `tests/fakes/`, written from the servers' published interfaces
and sources, down to the bytes of streams and errors. They show that the adapter and its fake agree,
and no more.
"""


def main() -> None:
    TARGET.write_text(generate(), encoding="utf-8")
    print(f"{TARGET} written")


def generate() -> str:
    """The whole page.

    :raises SystemExit: a report cannot be read.
    """
    reports = dict(read_reports())
    live = {name: report for name, report in reports.items() if report.target == "live"}
    faked = {name: report for name, report in reports.items() if report.target == "fake"}
    parts = [HEAD, "## Driven live\n", LIVE, examined(live), "\n## Driven against stand-ins\n"]
    parts.append(not_live(live, faked))
    if faked:
        parts.append(examined(faked))
    parts += ["\n## By area\n", "Kept (yes or repaired) of all the checks of the area.\n"]
    parts += ["Live:\n", summary(live)]
    if faked:
        parts += ["\nStand-ins:\n", summary(faked)]
    for area in dict.fromkeys(check.area for check in CHECKS):
        parts += [f"\n## {area}\n", matrix(area, live, faked)]
    return "\n".join(parts) + "\n"


def read_reports() -> Iterator[tuple[str, Report]]:
    """Name and content of each; the name is that of the adapter, with the model's after a colon
    where one adapter has several reports of a kind."""
    found = []
    for path in sorted(REPORTS.glob("*.json")):
        try:
            found.append(msgspec.json.decode(path.read_bytes(), type=Report))
        except msgspec.DecodeError as error:
            sys.exit(f"{path} is no report: {error}")
    times = Counter((report.adapter, report.target) for report in found)
    for report in found:
        several = times[report.adapter, report.target] > 1
        yield f"{report.adapter}: {report.model}" if several else report.adapter, report


def not_live(live: dict[str, Report], faked: dict[str, Report]) -> str:
    driven = {report.adapter for report in live.values()}
    names = sorted(own_adapters() - driven - {"simulated"})
    without = sorted(set(names) - {report.adapter for report in faked.values()})
    played = f"Of {', '.join(f'`{n}`' for n in without)} there is no report at all."
    listed = ", ".join(f"`{name}`" for name in names)
    return NOT_LIVE.format(names=listed, played=played if without else "")


def own_adapters() -> set[str]:
    """Those of this repository."""
    listed = (ROOT / "plugins" / "README.md").read_text(encoding="utf-8").splitlines()
    named = {line.split("`")[1] for line in listed if line.startswith("| `")}
    return {name for name in named if not name.endswith(":")}  # the head of the table does


def examined(reports: dict[str, Report]) -> str:
    rows = [
        f"| backend | version | model | Forebay | on | {' | '.join(VERDICTS)} |",
        "|---|---|---|---|---|" + "---:|" * len(VERDICTS),
    ]
    for name, report in reports.items():
        counts = " | ".join(str(report.counts[verdict]) for verdict in VERDICTS)
        rows.append(
            f"| `{name}` | {report.backend_version or '?'} | `{report.model}` "
            f"| {report.forebay_version} | {report.date[:10]} | {counts} |"
        )
    return "\n".join(rows)


def summary(reports: dict[str, Report]) -> str:
    rows = [head("area", [f"`{name}`" for name in reports])]
    for area in dict.fromkeys(check.area for check in CHECKS):
        cells = [kept(report.areas().get(area, [])) for report in reports.values()]
        rows.append(f"| [{area}](#{area}) | {' | '.join(cells)} |")
    return "\n".join(rows)


def kept(results: Sequence[Result]) -> str:
    count = sum(result.verdict in ("passed", "repaired") for result in results)
    broken = sum(result.verdict == "broken" for result in results)
    return f"{count}/{len(results)}" + (f", **{broken} broken**" if broken else "")


def matrix(area: str, live: dict[str, Report], faked: dict[str, Report]) -> str:
    names = [f"`{name}` live" for name in live] + [f"`{name}` *fake*" for name in faked]
    verdicts = [
        {result.id: SIGNS[result.verdict] for result in report.results}
        for report in (*live.values(), *faked.values())
    ]
    rows = [head("promise", names)]
    for check in CHECKS:
        if check.area == area:
            cells = " | ".join(of.get(check.id, "") for of in verdicts)
            promise = check.promise.replace("|", "\\|")
            rows.append(f"| {promise} | {cells} |")
    return "\n".join(rows)


def head(first: str, names: list[str]) -> str:
    return f"| {first} | {' | '.join(names)} |\n|---|" + ":---:|" * len(names)


if __name__ == "__main__":
    main()
