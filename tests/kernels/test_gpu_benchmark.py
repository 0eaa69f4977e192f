"""benchmarks/gpu/run.py without a GPU: what it prints, and that nothing takes it along."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "gpu"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARK / "run.py"), "--small", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_checks_and_times_kernels_and_the_engine(tmp_path: Path) -> None:
    done = run("--only", "decode_attention", "engine: tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 7
    assert all(row["value"] >= 0.0 for row in rows)
    assert "WRONG" not in done.stdout
    assert (tmp_path / "table.md").read_text().count("reached") == 5
    assert "off by" in rows[0]["note"]


def test_what_takes_too_long_is_a_line_of_the_table(tmp_path: Path) -> None:
    done = run("--only", "engine: tiny", "--minutes", "0.1")
    assert done.returncode == 0, done.stderr
    assert "| engine: tiny | – |" in done.stdout
    assert "the time is over" in done.stdout


def test_an_unknown_part_is_refused() -> None:
    done = run("--only", "warp_drive")
    assert done.returncode == 2
    assert "no such part: warp_drive" in done.stderr
