"""benchmarks/gpu/run.py without a GPU: what it prints, and that nothing takes it along."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from forebay_kernels import dispatch

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "gpu"
#: How many cases each kernel's module has.
SMALL = {
    "decode_attention": 2,
    "prefill_attention": 2,
    "fused": 14,
    "sampling": 5,
    "w4a16": 12,
    "fp8": 10,
    "moe": 2,
    "step_inputs": 2,
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARK / "run.py"), "--small", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmark."""
    monkeypatch.syspath_prepend(str(BENCHMARK))
    return import_module


@pytest.mark.parametrize("topic", SMALL)
def test_what_is_measured_is_right(
    topic: str, module: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda x: True)
    cases = [make() for make in module(topic).cases(device, small=True)]
    assert len({case.name for case in cases}) == SMALL[topic]
    for case in cases:
        if topic == "fused":
            case.run()  # what is in place stays what it was
        # Triton's interpreter cuts FP8 off instead of rounding it.
        assert module("part")._error(case) <= 3 * case.tolerance, case.name
        assert case.bytes > 0


def test_what_attention_reads_and_computes(module: Any, device: torch.device) -> None:
    case = next(module("prefill_attention").cases(device, small=True))()
    # 40 * 41 / 2 + 9 slots of 62..70 seen by 4 heads of 64; the held ones read once by 2 KV heads.
    assert case.flops == 4 * (820 + sum(range(62, 71))) * 4 * 64
    assert case.bytes == 2 * 2 * (110 * 2 * 64 + 49 * 4 * 64)


def test_it_checks_and_times_kernels_and_the_engine(tmp_path: Path) -> None:
    done = run("--only", "step_inputs", "engine: tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 10
    assert all(row["value"] >= 0.0 for row in rows)
    assert "WRONG" not in done.stdout
    assert (tmp_path / "table.md").read_text().count("reached") == 5
    assert "off by" in rows[2]["note"]


BROKEN = """
import os
from functools import partial
import torch
from cases import Case

def cases(device, small):
    for kind in ("unmade", "raises", "dies", "wrong", "right"):
        yield partial(make, kind)

def make(kind):
    if kind == "unmade":
        raise ValueError("too large")
    here = torch.ones(3)
    def run():
        if kind == "raises":
            raise RuntimeError("illegal")
        if kind == "dies":
            os._exit(9)
        return here + 1 if kind == "wrong" else here
    return Case(name=kind, run=run, reference=lambda: here, tolerance=0.0, bytes=24)
"""


def test_what_fails_leaves_the_others_alone(
    tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that can't be made, one that raises, and one that takes its process along."""
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.path.append(sys.path.pop(0))  # a part has no directory of its parent's script
    one = module("run").Run(True, tmp_path, tmp_path / "out", 600.0)
    one._best = {"copy": 1e9, "bf16": 1e9}
    one._part("broken")
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())
    notes = {row["name"]: (row["value"] is None, row["note"]) for row in rows}
    assert notes.pop("broken, case 0") == (True, "**failed: too large**")
    assert notes.pop("raises") == (True, "**failed: illegal**")
    assert notes.pop("dies") == (True, "**failed: exit status 9**")
    none, note = notes.pop("wrong")
    assert not none
    assert "WRONG" in note
    none, note = notes.pop("right")
    assert not none
    assert "WRONG" not in note
    assert not notes


def test_what_takes_too_long_is_a_line_of_the_table(
    tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.path.append(sys.path.pop(0))
    one = module("run").Run(True, tmp_path, tmp_path / "out", 600.0)
    monkeypatch.setattr(module("run"), "_MOST", 5.2)
    one._part("slow")
    one._end = 0.0
    one._part("moe")
    rows = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert [(row["name"], row["value"], row["note"]) for row in rows] == [
        ("slow", None, "**not done: the time is over**"),
        ("moe", None, "**not run: the time is over**"),
    ]


def test_parts_that_need_a_package_that_is_not_there_are_lines_too(
    tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of all parts, and most kernels, need none but torch and triton."""
    for name in ("msgspec", "llguidance", "gguf"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name}')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.path.append(sys.path.pop(0))
    one = module("run").Run(True, tmp_path, None, 600.0)
    one._environment["PYTHONPATH"] = f"{tmp_path}:{one._environment['PYTHONPATH']}"
    one._best = {"copy": 1e9, "bf16": 1e9}
    one._part("step_inputs")
    one._part("engine: tiny")
    assert [row.value is None for row in one._rows] == [False, False, True]
    assert one._rows[2].note == "**failed: ImportError: no msgspec**"


def test_parts_compile_side_by_side_those_of_a_model_together(module: Any) -> None:
    parts = module("run").parts(False)
    together = module("run")._together(parts, False)
    assert len(together) == 8 + 2
    assert [len(group) for group in together[-2:]] == [1, 3]


def test_compiling_ahead_runs_each_case_once(
    tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    counted = BROKEN.replace(
        "    def run():\n",
        f"    def run():\n        with open({str(ran)!r}, 'a') as f: f.write(kind + ' ')\n",
    )
    (tmp_path / "counted.py").write_text(counted.replace("os._exit(9)", "pass"))
    monkeypatch.syspath_prepend(str(tmp_path))
    part = module("part").Part("counted", tmp_path, {}, small=True)
    part.prepare()
    assert ran.read_text() == "raises dies wrong right "


def test_an_engine_is_warmed_up_ahead(tmp_path: Path, module: Any) -> None:
    module("part").Part("engine: tiny", tmp_path, {}, small=True).prepare()
    assert (tmp_path / "qwen3-64" / "config.json").exists()


def test_an_unknown_part_is_refused() -> None:
    done = run("--only", "warp_drive")
    assert done.returncode == 2
    assert "no such part: warp_drive" in done.stderr
