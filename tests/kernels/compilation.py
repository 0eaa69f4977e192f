"""Compiles Triton kernels for Hopper, which takes no GPU. Run as a program: jobs in, results out.

A process of its own, as the tests run with Triton's interpreter, which replaces the compiler.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
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
    found = triton.compile(source, target=GPUTarget(*TARGET), options=options)
    registers, stack = _resources(found.asm["cubin"])
    return {
        "ptx": found.asm["ptx"],
        "shared_bytes": found.metadata.shared,
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


if __name__ == "__main__":
    print(json.dumps([compiled(job) for job in json.load(sys.stdin)]))
