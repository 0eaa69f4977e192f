"""One part of ``run.py`` in a process of its own: says what it measures, a line of JSON each.

    {"kind": "begin", "value": [number, name]}   a measurement is next
    {"kind": "row", "value": {...}}              a line of the table
    {"kind": "about", "value": "..."}            of the machine
    {"kind": "best", "value": {name: rate}}      a ceiling
    {"kind": "done", "value": null}              that is all

A measurement that fails is a row that says so, and the next is taken; where the device, or the
engine, may be the worse for it the process ends, and ``run.py`` begins another behind it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import Case, Make
from clock import Ceilings, ceilings, seconds
from random_model import write
from rows import Row, failed
from run import ENGINE, PEERS
from torch import Tensor
from whole import SETUPS, SMALL, Setup

#: A name, and what gives the rows.
Measure = tuple[str, Callable[[], Iterable[Row]]]


def main() -> None:
    """Measure from ``--first`` on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--best", type=json.loads, required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--ahead", nargs="*", metavar="PART", help="only compile, for these too")
    asked = parser.parse_args()
    part, *others = (
        Part(name, asked.scratch, asked.best, asked.small)
        for name in (asked.part, *(asked.ahead or ()))
    )
    if asked.ahead is not None:
        for one in (part, *others):
            one.prepare()
        return
    for number, (name, measure) in enumerate(part.measures()):
        if number >= asked.first:
            _say("begin", [number, name])
            part.report(name, measure)
    _say("done", None)


class Part:
    """What is measured under one name."""

    def __init__(self, name: str, scratch: Path, best: dict[str, float], small: bool) -> None:
        self._name, self._scratch, self._small = name, scratch, small
        self._device = torch.device("cpu" if small else "cuda")
        flops = {unit: rate for unit, rate in best.items() if unit != "copy"}
        self._best = Ceilings(best.get("copy", 0.0), flops)

    def measures(self) -> Iterator[Measure]:
        """All there is, in an order that is always the same."""
        if self._name == "ceilings":
            _say("about", _about())
            for unit, rate in ceilings(self._device, self._small):
                yield f"ceiling: {unit}", partial(_ceiling, unit, rate)
        elif self._name.startswith(ENGINE):
            from bench import Bench

            setup = self._setup(self._name.removeprefix(ENGINE))
            bench = Bench(setup, self._folder(setup), self._best)
            yield f"{setup.name}: ready", lambda: [_ready(setup, bench.started)]
            for number, measure in enumerate(setup.measures):
                yield f"{setup.name}, measurement {number}", partial(measure, bench)
        elif self._name in PEERS:
            yield self._name, self._peer
        else:
            for number, make in enumerate(self._cases()):
                yield f"{self._name}, case {number}", partial(self._kernel, number, make)

    def report(self, name: str, measure: Callable[[], Iterable[Row]]) -> None:
        """Say the rows; one that says why there is none if it fails."""
        try:
            for row in measure():
                _say("row", asdict(row))
        except Exception as failure:
            _say("row", asdict(failed(name, _why(failure))))
            if self._name.startswith(ENGINE):
                raise  # requests of it may be running still
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # which fails where the device can't go on

    def prepare(self) -> None:
        """Run once what is to be measured, so that compiled kernels are found on the disk."""
        if not self._name.startswith(ENGINE):
            for make in self._cases():
                with suppress(Exception):  # which is said when it is measured
                    make().run()
            return
        from bench import load

        setup = self._setup(self._name.removeprefix(ENGINE))
        # Not the memory that is left, which others want at the same time.
        load(self._folder(setup), setup.settings | {"kv_cache_bytes": 2 << 30})

    def _cases(self) -> Iterator[Make]:
        found: Iterator[Make] = importlib.import_module(self._name).cases(self._device, self._small)
        return found

    def _kernel(self, number: int, make: Make) -> Iterator[Row]:
        case = make()
        _say("begin", [number, case.name])
        try:
            error = _error(case)
            took = seconds(case.run, self._device)
        except Exception as failure:  # noqa: BLE001 - as in report, under the case's own name
            yield failed(case.name, _why(failure))
            return
        # Triton's interpreter cuts FP8 off instead of rounding it.
        wrong = not error <= case.tolerance * (3.0 if self._small else 1.0)
        yield _kernel_row(case, took, self._best, error, wrong)

    def _peer(self) -> Iterator[Row]:
        import peers

        setup = self._setup()
        folder = self._folder(setup)
        length = 20 if self._small else 1024
        if self._name == "vllm":
            return peers.vllm(folder, setup.name, length)
        return peers.transformers(folder, setup.name, self._device, length)

    def _setup(self, name: str | None = None) -> Setup:
        """The setup of this name, or the first."""
        setups = SMALL if self._small else SETUPS
        return next(one for one in setups if name in (None, one.name))

    def _folder(self, setup: Setup) -> Path:
        """The setup's model."""
        folder = self._scratch / setup.folder
        return folder if folder.exists() else write(folder, setup.config, self._device)


def _why(failure: Exception) -> str:
    return "failed: " + (str(failure) or repr(failure)).splitlines()[0]


def _say(kind: str, value: Any) -> None:
    print(json.dumps({"kind": kind, "value": value}), flush=True)


def _about() -> str:
    """The day, the card and the versions."""
    import triton

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    day = time.strftime("%Y-%m-%d")
    return f"{day}, {card or 'a processor'}, torch {torch.__version__}, Triton {triton.__version__}"


def _ceiling(name: str, measure: Callable[[], float]) -> Iterator[Row]:
    rate = measure()
    _say("best", {name: rate})
    value, unit = (rate / 1e9, "GB/s") if name == "copy" else (rate / 1e12, "TFLOP/s")
    yield Row(f"ceiling: {name}", value, unit)


def _ready(setup: Setup, took: float) -> Row:
    return Row(f"{setup.name}: loaded and warmed up", took, "s", least=True)


def _kernel_row(case: Case, took: float, best: Ceilings, error: float, wrong: bool) -> Row:
    least = best.least(case.bytes, case.flops, case.unit)
    by_memory = case.bytes / best.copy >= least
    amount, unit = (case.bytes / 1e9, "GB/s") if by_memory else (case.flops / 1e12, "TFLOP/s")
    note = f"{1e6 * took:,.1f} us, off by {error:.1e}" + (" **WRONG**" if wrong else "")
    bound = amount / least
    goal = None if case.goal is None else case.goal * bound
    return Row(case.name, amount / took, unit, bound, goal, note=note)


def _error(case: Case) -> float:
    """The norm of the difference to the reference's result over the norm of that."""
    got, right = case.run(), case.reference()
    pairs = zip(_several(got), _several(right), strict=True)
    off = norm = 0.0
    for ours, theirs in pairs:
        difference = ours.double() - theirs.double()
        off += float(torch.linalg.vector_norm(difference)) ** 2
        norm += float(torch.linalg.vector_norm(theirs.double())) ** 2
    return float((off / norm) ** 0.5) if norm else off


def _several(values: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return values if isinstance(values, tuple) else (values,)


if __name__ == "__main__":
    main()
