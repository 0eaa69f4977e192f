"""Compiles Triton kernels for Hopper, which takes no GPU. Run as a program: jobs in, results out.

Each is a line of JSON. A process of its own, as the tests run with Triton's interpreter, which
replaces the compiler; one for many jobs, as it takes seconds to start.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

TARGET = ("cuda", 90, 32)


def compiled(job: dict[str, Any]) -> dict[str, Any]:
    """What ``conftest.Compiled`` holds."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = job["kernel"].split(":")
    kernel = getattr(importlib.import_module(module), name)
    types, constants = job["types"], job["constants"]
    kinds = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    # As a launch would tell it: pointers and strides that are multiples of 16 load as vectors.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(kernel.arg_names)
        if kinds[n].startswith("*") or n in job.get("aligned", ())
    }
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)
    options = {"num_warps": job.get("warps", 4), "num_stages": job.get("stages", 2)}
    return _described(triton.compile(source, target=GPUTarget(*TARGET), options=options))


def launched(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The kernels that a function launches, with what Triton makes of the very arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Hopper:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget(*TARGET)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    found = []
    run = JITFunction.run

    def warm_up(self: Any, *args: Any, warmup: bool, **options: Any) -> None:
        found.append(_described(run(self, *args, warmup=True, **options)))

    driver.set_active(Hopper())
    path, name = job["launch"].split(":")
    spec = importlib.util.spec_from_file_location("launches", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    JITFunction.run = warm_up
    try:
        getattr(module, name)(**job["arguments"])
    finally:
        JITFunction.run = run
    return found


def _described(kernel: Any) -> dict[str, Any]:
    registers, stack = _resources(kernel.asm["cubin"])
    return {
        "ptx": kernel.asm["ptx"],
        "shared_bytes": kernel.metadata.shared,
        "registers": registers,
        "spilled_bytes": stack,
    }


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of each thread: what does not fit into registers lies there."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump: {text}")
    return int(found[1]), int(found[2])


def answered(job: dict[str, Any]) -> dict[str, Any]:
    """What came of a job: ``found``, or how it ``failed``."""
    try:
        return {"found": launched(job) if "launch" in job else [compiled(job)]}
    except Exception:  # noqa: BLE001 - a test says it, and the next one wants its job done
        return {"failed": traceback.format_exc()}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")  # what else prints does not come between them
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(answered(json.loads(line))), file=answers, flush=True)
