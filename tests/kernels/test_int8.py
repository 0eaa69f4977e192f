"""Products with int8 weights on a GPU, of many tokens in integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from forebay_kernels.gpu.int8 import Int8Linear
from forebay_kernels.gpu.packed import packed
from forebay_kernels.matrix import GroupedInt8, Int8, linear_w8a8

#: The interpreter cuts float32 off where it has to round it to bfloat16.
DTYPES = [torch.float16, torch.bfloat16 if torch.cuda.is_available() else torch.float32]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(out: int, into: int) -> Int8:
    weight = torch.randint(-128, 128, (out, into), generator=torch.Generator().manual_seed(1))
    return Int8(weight.to(torch.int8), (random(out, seed=2).abs() / 64).half().float())


def to_linear(
    matrix: Int8, bias: Tensor | None, dtype: torch.dtype, device: torch.device
) -> Int8Linear:
    found = packed(matrix.to(device), dtype)
    assert found is not None
    return Int8Linear(found, None if bias is None else bias.to(device), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "into"), [(130, 300), (256, 128), (8, 64), (33, 1000)])
def test_many_tokens_are_multiplied_as_the_specification_says(
    out: int, into: int, dtype: torch.dtype, device: torch.device
) -> None:
    matrix, x = made(out, into), (random(70, into) * random(70, 1, seed=3).exp()).to(dtype)
    x[5] = 0.0
    rows = torch.full((70, into + 3), float("nan"), dtype=dtype)
    rows[:, 2 : into + 2] = x
    layer = to_linear(matrix, None, dtype, device)
    assert layer.rounds(x)
    got = layer(rows.to(device)[:, 2 : into + 2]).cpu()
    assert torch.equal(got, linear_w8a8(x, matrix))


def test_a_bias_is_added(device: torch.device) -> None:
    matrix, x, bias = made(130, 300), random(65, 300).half(), random(130, seed=4).half()
    got = to_linear(matrix, bias, torch.float16, device)(x.to(device)).cpu()
    want = linear_w8a8(x.double(), matrix) + bias.double()
    assert (got.double() - want).norm() <= 1e-3 * want.norm()


def test_few_tokens_are_not_rounded(device: torch.device) -> None:
    matrix, x = made(130, 300), random(9, 300).half()
    layer = to_linear(matrix, None, torch.float16, device)
    want = x.double() @ matrix.dequantize().double().T
    assert (layer(x.to(device)).cpu().double() - want).norm() <= 1e-3 * want.norm()
    assert (linear_w8a8(x, matrix).double() - want).norm() > 2e-3 * want.norm()
    assert layer.nbytes < 1.1 * 256 * 384


def test_weights_lie_there_once(device: torch.device) -> None:
    """``torch._int_mm`` reads the words that the kernel for few tokens reads."""
    found = packed(made(200, 300).to(device), torch.float16)
    assert found is not None
    assert found.as_bytes().data_ptr() == found.words.data_ptr()
    assert found.as_bytes().shape == (256, 384)


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    layer = to_linear(made(8, 64), None, torch.float16, device)
    with pytest.raises(ValueError, match=r"\[70, 63\], but it takes torch.float16 \[.., 64\]"):
        layer(torch.zeros(70, 63, dtype=torch.float16, device=device))
    matrix = GroupedInt8(torch.zeros(8, 64, dtype=torch.int8), torch.ones(8, 2), None, 32)
    grouped = packed(matrix, torch.float16)
    assert grouped is not None
    with pytest.raises(ValueError, match="8 bits in groups of 32"):
        Int8Linear(grouped, None, torch.float16)


def test_the_kernels_compile_for_hopper(compile_for_hopper: Any) -> None:
    pointers = {"x": "*bf16", "words": "*i16", "scales": "*fp32", "total": "*i32"}
    types = {**pointers, "x_scale": "*fp32", "scale": "*fp16", "out": "*bf16", "factor": "fp32"}
    module = "forebay_kernels.gpu.int8"
    found = compile_for_hopper(
        {
            "kernel": f"{module}:_round_kernel",
            "types": types,
            "constants": {"LANES": 64, "BLOCK": 8192},
            "aligned": ["inputs", "count", "x_row"],
            "warps": 8,
        },
        {
            "kernel": f"{module}:_scale_kernel",
            "types": types,
            "constants": {"bias": None, "BLOCK": 2048},
            "aligned": ["outputs", "padded"],
        },
    )
    for one in found:
        assert one.spilled_bytes == 0
        assert "ld.global.v4" in one.ptx
    assert "st.global.v4" in found[0].ptx
