"""The Triton kernels compile, which takes no GPU: their interpreter accepts more."""

from __future__ import annotations

from typing import Any

MODULE = "forebay_kernels.gpu.decode_attention"
TYPES = {
    **dict.fromkeys(("query", "keys", "values", "out"), "*bf16"),
    **dict.fromkeys(("lengths", "block_tables"), "*i32"),
    **dict.fromkeys(("partial", "highest", "total"), "*fp32"),
    **dict.fromkeys(("scale", "softcap"), "fp32"),
}


def test_decode_attention_compiles_for_hopper(compile_for_hopper: Any) -> None:
    split = {
        "kernel": f"{MODULE}:_split_kernel",
        "types": TYPES,
        "constants": {
            "HEADS": 6, "GROUP": 3, "DIM": 80, "BLOCK_SIZE": 24, "SPLITS": 5, "WINDOW": 512,
            "SOFTCAP": True, "GROUP_PADDED": 16, "DIM_PADDED": 128, "TILE": 64,
            "PRECISION": "tf32", "LOG2_E": 1.4427,
        },
    }  # fmt: skip
    join = {
        "kernel": f"{MODULE}:_join_kernel",
        "types": TYPES,
        "constants": {
            "HEADS": 6, "DIM": 80, "SPLITS": 5, "DIM_PADDED": 128, "SPLITS_PADDED": 8,
        },
    }  # fmt: skip
    found = compile_for_hopper(split, join)
    assert "mma" in found[0].ptx
    assert all(one.registers > 0 for one in found)
