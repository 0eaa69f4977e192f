"""Every kernel and the whole engine on one GPU: checked, timed, and put into one table.

    python benchmarks/gpu/run.py [--only PART ...] [--minutes 9.5] [--out FOLDER] [--scratch FOLDER]
    python benchmarks/gpu/run.py --small   # on a processor: proves this program, not the speed

Each part runs in a process of its own, since an illegal access on a GPU takes its process along;
what fails, or is not reached in the time, is a line of the table too. Ceilings (a device copy,
matrix products of torch) are measured in the same run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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
_ENGINE = "engine: "
#: Compared with on the model of the first setup.
_PEERS = ("transformers", "vllm")


def main() -> None:
    """Run all parts, or with ``--part`` one of them, and print its rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", metavar="PART", help="of: " + ", ".join(parts(False)))
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--out", type=Path, help="folder for table.md and rows.json")
    parser.add_argument("--scratch", type=Path, help="folder with 20 GB for random models")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--best", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part:
        print(json.dumps(_part(asked)))
        return
    wanted = asked.only or parts(asked.small)
    unknown = set(wanted) - set(parts(asked.small))
    if unknown:
        parser.error(f"--only: no such part: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(dir=asked.scratch, prefix="forebay-gpu-") as scratch:
        asked.scratch = Path(scratch)
        _all(asked, wanted)


def parts(small: bool) -> list[str]:
    """Names of what can be run by itself, the ceilings excepted."""
    from whole import SETUPS, SMALL

    setups = SMALL if small else SETUPS
    return [*KERNELS, *(_ENGINE + setup.name for setup in setups), *_PEERS]


def _all(asked: argparse.Namespace, wanted: list[str]) -> None:
    from rows import HEAD, Row, decoded, encoded

    end = time.monotonic() + 60 * asked.minutes
    first = _run(asked, "ceilings", end)
    if isinstance(first, str):
        raise SystemExit(f"the ceilings could not be measured: {first}")
    asked.best = json.dumps(first["best"])
    rows: list[Row] = []
    print(first["about"], HEAD, sep="\n\n", flush=True)
    for part in wanted:
        found = _run(asked, part, end)
        new = (
            [Row(part, None, "", note=f"**{found}**")] if isinstance(found, str) else decoded(found)
        )
        for row in new:
            print(row.line(), flush=True)
        rows += new
    for row in _ratios(rows):
        print(row.line(), flush=True)
        rows.append(row)
    if asked.out is not None:
        asked.out.mkdir(parents=True, exist_ok=True)
        lines = [first["about"], "", HEAD, *(row.line() for row in rows)]
        (asked.out / "table.md").write_text("\n".join(lines) + "\n")
        (asked.out / "rows.json").write_text(json.dumps(encoded(rows), indent=1))


def _ratios(rows: list[Any]) -> list[Any]:
    """How much faster than in bf16 the same is with weights of four bits."""
    from rows import Row

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


def _run(asked: argparse.Namespace, part: str, end: float) -> Any:
    """A part's rows, or why there are none."""
    left = end - time.monotonic()
    if left < 5:
        return "not run: the time is over"
    command = [sys.executable, __file__, "--part", part, "--scratch", str(asked.scratch)]
    command += ["--small"] if asked.small else []
    command += ["--best", asked.best] if asked.best else []
    packages = ("gateway", "plugins", "engine_native", "kernels", "router_policies")
    path = [str(HERE.parents[1] / name) for name in packages]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*path, *sys.path[1:]])}
    if asked.small:
        environment["TRITON_INTERPRET"] = "1"
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=left, check=False
        )
    except subprocess.TimeoutExpired:
        return "not done: the time is over"
    if done.returncode:
        sys.stderr.write(done.stderr)
        last = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return f"failed: {last[-1][:200]}"
    return json.loads(done.stdout.splitlines()[-1])


def _part(asked: argparse.Namespace) -> Any:
    import torch
    from clock import Ceilings, ceilings
    from rows import encoded

    device = torch.device("cpu" if asked.small else "cuda")
    if asked.part == "ceilings":
        best = ceilings(device, asked.small)
        return {"best": {"copy": best.copy, "flops": best.flops}, "about": _about(best)}
    best = Ceilings(**json.loads(asked.best))
    if asked.part.startswith(_ENGINE):
        return encoded(_engine(asked, best, device))
    if asked.part in _PEERS:
        return encoded(_peer(asked, device))
    return encoded(_kernel(asked.part, best, device, asked.small))


def _about(best: Any) -> str:
    """The day, the card, the versions and the ceilings."""
    import torch
    import triton

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    rates = ", ".join(f"{unit} {rate / 1e12:,.1f} TFLOP/s" for unit, rate in best.flops.items())
    return (
        f"{time.strftime('%Y-%m-%d')}, {card or 'a processor'}, torch {torch.__version__}, Triton "
        f"{triton.__version__}. Ceilings: copy {best.copy / 1e9:,.0f} GB/s, {rates}."
    )


def _kernel(topic: str, best: Any, device: Any, small: bool) -> list[Any]:
    from clock import seconds
    from rows import Row

    found = []
    for case in importlib.import_module(topic).cases(device, small):
        try:
            error = _error(case)
            took = seconds(case.run, device)
        except Exception as failure:  # noqa: BLE001 - the others are to be measured all the same
            said = (str(failure) or repr(failure)).splitlines()[0]
            found.append(Row(case.name, None, "", note=f"**failed: {said[:200]}**"))
            continue
        least = best.least(case.bytes, case.flops, case.unit)
        by_memory = case.bytes / best.copy >= least
        # Triton's interpreter cuts FP8 off instead of rounding it.
        wrong = not error <= case.tolerance * (3.0 if small else 1.0)
        found.append(_kernel_row(case, took, by_memory, least, error, wrong))
    return found


def _kernel_row(
    case: Any, took: float, by_memory: bool, least: float, error: float, wrong: bool
) -> Any:
    from rows import Row

    amount, unit = (case.bytes / 1e9, "GB/s") if by_memory else (case.flops / 1e12, "TFLOP/s")
    note = f"{1e6 * took:,.1f} us, off by {error:.1e}" + (" **WRONG**" if wrong else "")
    bound = amount / least
    goal = None if case.goal is None else case.goal * bound
    return Row(case.name, amount / took, unit, bound, goal, note=note)


def _error(case: Any) -> float:
    """The norm of the difference to the reference's result over the norm of that."""
    import torch

    got, right = case.run(), case.reference()
    pairs = zip(_several(got), _several(right), strict=True)
    off = norm = 0.0
    for ours, theirs in pairs:
        difference = ours.double() - theirs.double()
        off += float(torch.linalg.vector_norm(difference)) ** 2
        norm += float(torch.linalg.vector_norm(theirs.double())) ** 2
    return float((off / norm) ** 0.5) if norm else off


def _several(values: Any) -> tuple[Any, ...]:
    return values if isinstance(values, tuple) else (values,)


def _engine(asked: argparse.Namespace, best: Any, device: Any) -> list[Any]:
    from whole import Bench

    setup = _setup(asked.small, asked.part.removeprefix(_ENGINE))
    bench = Bench(setup, _folder(asked.scratch, setup, device), best)
    return [row for measure in setup.measures for row in measure(bench)]


def _peer(asked: argparse.Namespace, device: Any) -> list[Any]:
    import peers

    setup = _setup(asked.small)
    folder = _folder(asked.scratch, setup, device)
    length = 20 if asked.small else 1024
    if asked.part == "vllm":
        return list(peers.vllm(folder, setup.name, length))
    return list(peers.transformers(folder, setup.name, device, length))


def _setup(small: bool, name: str | None = None) -> Any:
    """The setup of this name, or the first."""
    from whole import SETUPS, SMALL

    return next(one for one in (SMALL if small else SETUPS) if name in (None, one.name))


def _folder(scratch: Path, setup: Any, device: Any) -> Path:
    """The setup's model, which several share."""
    import random_model

    folder = scratch / f"{setup.config['model_type']}-{setup.config['hidden_size']}"
    return folder if folder.exists() else random_model.write(folder, setup.config, device)


if __name__ == "__main__":
    main()
