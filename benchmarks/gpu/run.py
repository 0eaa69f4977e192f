"""Every kernel and the whole engine on one GPU: checked, timed, and put into one table.

    python benchmarks/gpu/run.py [--only PART ...] [--minutes 9.5] [--out FOLDER] [--scratch FOLDER]
    python benchmarks/gpu/run.py --small   # on a processor: proves this program, not the speed

Each part runs in a process of its own, since an illegal access on a GPU takes its process along; it
is begun again behind what did so. What fails, or is not reached in the time, is a line of the table
too, and the table is written with each line. First all parts compile their kernels side by side,
which one after the other would take most of the time. Ceilings (a device copy, matrix products of
torch) are measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rows import HEAD, Row, failed

HERE = Path(__file__).parent
#: Modules with ``cases``.
KERNELS = (
    "decode_attention",
    "prefill_attention",
    "fused",
    "sampling",
    "w4a16",
    "fp8",
    "moe",
    "step_inputs",
)
ENGINE = "engine: "
#: Compared with on the model of the first setup.
PEERS = ("transformers", "vllm")
#: Seconds that a part has at most, so that one that hangs leaves time for the others; and that all
#: have together to compile ahead: what is not compiled by then is when it is run.
_MOST, _AHEAD = 150.0, 120.0


def main() -> None:
    """Run all parts and write their table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", metavar="PART", help="of: " + ", ".join(parts(False)))
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--out", type=Path, help="folder for table.md and rows.json")
    parser.add_argument("--scratch", type=Path, help="folder with 20 GB for random models")
    parser.add_argument("--small", action="store_true")
    asked = parser.parse_args()
    wanted = asked.only or parts(asked.small)
    unknown = set(wanted) - set(parts(asked.small))
    if unknown:
        parser.error(f"--only: no such part: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(dir=asked.scratch, prefix="forebay-gpu-") as scratch:
        Run(asked.small, Path(scratch), asked.out, 60 * asked.minutes).all(wanted)


def parts(small: bool) -> list[str]:
    """Names of what can be run by itself, the ceilings excepted."""
    from whole import SETUPS, SMALL

    setups = SMALL if small else SETUPS
    return [*KERNELS, *(ENGINE + setup.name for setup in setups), *PEERS]


class Run:
    """One run of the parts; ``out`` has the table, up to the line that came last."""

    def __init__(self, small: bool, scratch: Path, out: Path | None, seconds: float) -> None:
        self._small, self._scratch, self._out = small, scratch, out
        self._end = time.monotonic() + seconds
        self._rows: list[Row] = []
        self._about = ""
        #: Of what is measured, by name.
        self._best: dict[str, float] = {}
        packages = ("gateway", "plugins", "engine_native", "kernels", "router_policies")
        path = [str(HERE.parents[1] / name) for name in packages]
        self._environment = os.environ | {"PYTHONPATH": os.pathsep.join([*path, *sys.path[1:]])}
        if small:
            self._environment["TRITON_INTERPRET"] = "1"

    def all(self, wanted: list[str]) -> None:
        self._part("ceilings")
        if "copy" not in self._best:
            raise SystemExit("the ceilings could not be measured")
        if not self._small:
            self._compile_ahead(wanted)
        for part in wanted:
            self._part(part)
        for row in ratios(self._rows):
            self._add(row)

    def _begin(self, about: str) -> None:
        if not self._about:
            print(about, "", HEAD, sep="\n", flush=True)
        self._about = about

    def _add(self, row: Row) -> None:
        print(row.line(), flush=True)
        self._rows.append(row)
        if self._out is not None:
            self._out.mkdir(parents=True, exist_ok=True)
            lines = [self._about, "", HEAD, *(row.line() for row in self._rows)]
            (self._out / "table.md").write_text("\n".join(lines) + "\n")
            rows = json.dumps([asdict(row) for row in self._rows], indent=1)
            (self._out / "rows.json").write_text(rows)

    def _part(self, part: str) -> None:
        """Add a part's rows: from the first measurement on, and behind each that ends it."""
        end = min(self._end, time.monotonic() + _MOST)
        first = 0
        while True:
            left = end - time.monotonic()
            if left < 5:
                self._add(failed(part, "not run: the time is over"))
                return
            number, name, open_, why = self._process(part, first, left)
            if not why:
                return
            if open_:
                self._add(failed(name, why))
            if number is None or time.monotonic() >= end:
                return
            first = number + 1

    def _process(self, part: str, first: int, left: float) -> tuple[int | None, str, bool, str]:
        """Add rows of one process of a part.

        What it measured last: its number, None if it came to none, its name, whether it came to no
        end, and why the process ended before it was done; empty: it was done.
        """
        number, name, open_, done = None, part, True, False
        begun = time.monotonic()
        with tempfile.TemporaryFile("w+") as said:
            with subprocess.Popen(
                self._command(part, "--first", str(first)),
                env=self._environment,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                start_new_session=True,
            ) as process:
                # With those that it started itself, which hold its output open.
                watch = threading.Timer(left, os.killpg, (process.pid, signal.SIGKILL))
                watch.daemon = True
                watch.start()
                for kind, value in _told(process.stdout or ()):
                    if kind == "begin":
                        (number, name), open_ = value, True
                    elif kind == "about":
                        self._begin(value)
                    elif kind == "best":
                        self._best |= value
                    elif kind == "row":
                        self._add(Row(**value))
                        open_ = False
                    else:
                        done = True
            watch.cancel()
            if done:
                return number, name, open_, ""
            if time.monotonic() - begun >= left:
                return number, name, open_, "not done: the time is over"
            said.seek(0)
            text = said.read()
        sys.stderr.write(text)
        last = text.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
        return number, name, open_, f"failed: {last[0]}"

    def _command(self, part: str, *more: str) -> list[str]:
        command = [sys.executable, str(HERE / "part.py"), part, "--scratch", str(self._scratch)]
        command += ["--best", json.dumps(self._best), *more]
        return [*command, "--small"] if self._small else command

    def _compile_ahead(self, wanted: list[str]) -> None:
        """Let parts run each kernel once, all at the same time, and write the models."""
        end = min(self._end, time.monotonic() + _AHEAD)
        processes = [
            subprocess.Popen(
                self._command(first, "--ahead", *others),
                env=self._environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for first, *others in _together(wanted, self._small)
        ]
        for process in processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _together(wanted: list[str], small: bool) -> list[list[str]]:
    """The parts that compile anything, those of one model together, which is written once."""
    from whole import SETUPS, SMALL

    folders = {ENGINE + setup.name: setup.folder for setup in (SMALL if small else SETUPS)}
    found: dict[str, list[str]] = {}
    for part in wanted:
        if part not in PEERS:
            found.setdefault(folders.get(part, part), []).append(part)
    return list(found.values())


def _told(lines: Any) -> Iterator[tuple[str, Any]]:
    """What a part says, among what libraries print."""
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and found.keys() == {"kind", "value"}:
            yield found["kind"], found["value"]


def ratios(rows: list[Row]) -> list[Row]:
    """How much faster than in bf16 the same is with weights of four bits."""
    rates = {row.name: row.value for row in rows}
    found = []
    for count, goal in ((1, 2.3), (16, 2.0)):
        plain, packed = (
            rates.get(f"Llama 3.1 8B{kind}: {count} x 1024 tokens, decoding")
            for kind in ("", ", int4")
        )
        if plain and packed:
            name = f"Llama 3.1 8B: int4 over bf16, {count} x 1024 tokens"
            found.append(Row(name, packed / plain, "times", None, goal))
    return found


if __name__ == "__main__":
    main()
