"""What computes a linear layer on a GPU, on CPU tensors under the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from forebay_engine.linear import Linear
from forebay_kernels.gpu.linear import pack
from forebay_kernels.gpu.w4a16 import PackedLinear
from forebay_kernels.matrix import Dense, Fp8, GroupedInt8, Int4, Int8, Matrix, Reordered

OUT, IN, GROUP = 20, 64, 32


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(1))


def made(kind: str) -> Matrix:
    scale = random(OUT, IN // GROUP, seed=2).abs()
    match kind:
        case "dense":
            return Dense(random(OUT, IN, seed=3))
        case "int4":
            return Int4(integers(0, 256, OUT, IN // 2).to(torch.uint8), scale, 9 * scale, GROUP)
        case "int8":
            return Int8(integers(-128, 128, OUT, IN).to(torch.int8), scale[:, 0].contiguous())
        case "grouped":
            weight = integers(-128, 128, OUT, IN).to(torch.int8)
            return GroupedInt8(weight, scale, None, GROUP)
        case "fp8":
            return Fp8(random(OUT, IN, seed=3).to(torch.float8_e4m3fn), scale[:, :1], IN)
        case _:
            return Reordered(made("int4"), torch.randperm(IN))


@pytest.mark.parametrize("kind", ["dense", "int4", "int8", "grouped", "fp8", "reordered"])
def test_every_layout_is_packed(kind: str) -> None:
    matrix, bias = made(kind), random(OUT, seed=4).half()
    layer, x = pack(matrix, bias, torch.float16), random(5, IN, seed=5).half()
    assert layer is not None
    want = x.double() @ matrix.dequantize().double().T + bias.double()
    got = layer(x)
    assert got.dtype == torch.float16
    assert (got.double() - want).norm() <= 3e-3 * want.norm()


def test_what_no_kernel_takes_is_left() -> None:
    narrow = Int4(integers(0, 256, OUT, IN // 2).to(torch.uint8), random(OUT, 8), random(OUT, 8), 8)
    assert pack(narrow, None, torch.float16) is None
    assert pack(Reordered(narrow, torch.randperm(IN)), None, torch.float16) is None


@pytest.mark.parametrize(
    ("dtype", "kernel"), [(torch.float16, PackedLinear), (torch.float32, type(lambda: 0))]
)
def test_the_engine_packs_where_the_weights_are(
    dtype: torch.dtype, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU by its kernels, except in float32, which dequantises."""
    monkeypatch.setattr(Matrix, "device", torch.device("cuda"))
    matrix, x = made("int4"), random(3, IN, seed=5).to(dtype)
    layer = Linear(matrix)
    want = x.double() @ matrix.dequantize().double().T
    assert (layer(x).double() - want).norm() <= 3e-3 * want.norm()
    assert isinstance(layer._product, kernel)
    assert layer._weights is None
