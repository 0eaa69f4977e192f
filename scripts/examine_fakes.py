"""Puts the fakes of tests/fakes/fake_servers before the conformance kit, and writes what it found.

Run as `make conformance`: docs/conformance/NAME-fake.json are the reports that docs/backends.md
shows, tests/contract/conformance_verdicts.json what tests expect to be found again.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from pathlib import Path

import msgspec

from forebay.config import Logging
from forebay.conformance import Report
from forebay.telemetry import logs

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "docs" / "conformance"
VERDICTS = ROOT / "tests" / "contract" / "conformance_verdicts.json"


def main(names: list[str]) -> None:
    """All fakes, or those of these names."""
    sys.path.insert(0, str(ROOT / "tests" / "fakes"))
    subjects = importlib.import_module("fake_servers.subjects")

    logs.configure(Logging(level="error", format="console"))
    verdicts = json.loads(VERDICTS.read_text()) if VERDICTS.exists() else {}
    for name in names or subjects.PLAYED:
        report: Report = asyncio.run(subjects.examined(name))
        print(name, f"{report.duration} s", dict(report.counts))
        for result in report.broken:
            print("  broken:", result.id, result.reason)
        verdicts[name] = {
            verdict: [result.id for result in report.results if result.verdict == verdict]
            for verdict in ("lacking", "repaired")
        }
        if subjects.PLAYED[name].shown:
            REPORTS.mkdir(exist_ok=True)
            page = msgspec.json.format(msgspec.json.encode(report), indent=1)
            (REPORTS / f"{name}-fake.json").write_bytes(page + b"\n")
    VERDICTS.write_text(json.dumps(verdicts, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
