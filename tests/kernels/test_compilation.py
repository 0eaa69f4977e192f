"""The Triton kernels compile, which takes no GPU: their interpreter accepts more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from forebay_kernels import paged_decode

POINTERS = {
    "query": "*bf16", "keys": "*bf16", "values": "*bf16", "out": "*bf16", "lengths": "*i32",
    "block_tables": "*i32", "partial": "*fp32", "highest": "*fp32", "total": "*fp32",
    "scale": "fp32", "softcap": "fp32",
}

def compiled(kernel, **constants):
    kinds = {n: "constexpr" if n in constants else POINTERS.get(n, "i64") for n in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm

split = compiled(
    paged_decode._split_kernel, HEADS=6, GROUP=3, DIM=80, BLOCK_SIZE=24, SPLITS=5, WINDOW=512,
    SOFTCAP=True, GROUP_PADDED=16, DIM_PADDED=128, TILE=64, PRECISION="tf32", LOG2_E=1.4427,
)
join = compiled(
    paged_decode._join_kernel, HEADS=6, DIM=80, SPLITS=5, DIM_PADDED=128, SPLITS_PADDED=8
)
print("mma" in split["ptx"], "cubin" in split, "cubin" in join)
"""


def test_decode_attention_compiles_for_hopper(tmp_path: Path) -> None:
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMPILE], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True", "True"]
