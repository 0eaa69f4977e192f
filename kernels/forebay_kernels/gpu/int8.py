"""Products with int8 weights of one scale for each output: W8A16 for few tokens, W8A8 for many.

Few tokens take the time that the weights' bytes take, whatever is computed, so they are not rounded
and nothing is launched for them. Many are rounded to int8, each by its own scale, and multiplied in
integers by ``torch._int_mm``, at twice the rate of bfloat16 (``matrix.linear_w8a8``):

    out[m, o] = x_scale[m] * scale[o] * sum_i q[m, i] * weight[o, i] + bias[o]

Both read the same weights, ``PackedMatrix.as_bytes``: tokens are rounded into the order in which
those lie.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from forebay_kernels.gpu.packed import PackedMatrix
from forebay_kernels.gpu.tuning import choose
from forebay_kernels.gpu.w4a16 import PackedLinear


@triton.jit
def _rounded(x: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """``x / scale`` as the nearest integer, ties to even, in the low 8 bits."""
    # Past 2^23 a float32 has no fraction: adding 1.5 * 2^23 rounds, as the hardware does.
    shifted = tl.div_rn(x, scale) + 12582912.0
    return (shifted - 12582912.0).to(tl.int32) & 255


@triton.jit
def _round_kernel(
    x: tl.tensor,  # [tokens, inputs]
    words: tl.tensor,  # [tokens, count] int16: two values each, as PackedMatrix has them
    scales: tl.tensor,  # [tokens] float32
    inputs: tl.tensor,
    count: tl.tensor,
    x_row: tl.tensor,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least count
) -> None:
    token = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, BLOCK)
    i = word // LANES * (2 * LANES) + word % LANES
    x_at = x + token * x_row + i
    low = tl.load(x_at, mask=i < inputs, other=0.0).to(tl.float32)
    high = tl.load(x_at + LANES, mask=i + LANES < inputs, other=0.0).to(tl.float32)
    scale = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 0) / 127.0
    divisor = tl.where(scale > 0.0, scale, 1.0)
    both = _rounded(low, divisor) | (_rounded(high, divisor) << 8)
    tl.store(words + token * count + word, both.to(tl.int16), mask=word < count)
    tl.store(scales + token, scale)


@triton.jit
def _scale_kernel(
    total: tl.tensor,  # [tokens, padded] int32
    x_scale: tl.tensor,  # [tokens] float32
    scale: tl.tensor,  # [padded] float16
    bias: tl.tensor,  # [outputs], or None
    out: tl.tensor,  # [tokens, outputs]
    factor: tl.tensor,
    outputs: tl.tensor,
    padded: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_output = n < outputs
    value = tl.load(total + token * padded + n, mask=is_output, other=0).to(tl.float32)
    value *= tl.load(x_scale + token)
    value *= tl.load(scale + n, mask=is_output, other=0.0).to(tl.float32) * factor
    if bias is not None:
        value += tl.load(bias + n, mask=is_output, other=0.0).to(tl.float32)
    tl.store(out + token * outputs + n, value.to(out.dtype.element_ty), mask=is_output)


class Int8Linear:
    """``x @ w.T + bias`` of ``[tokens, in]`` in the type that ``w`` was packed for."""

    def __init__(self, matrix: PackedMatrix, bias: Tensor | None, dtype: torch.dtype) -> None:
        if matrix.bits != 8 or matrix.group:
            raise ValueError(f"{matrix.bits} bits in groups of {matrix.group}: needs 8, and none")
        self._exactly = PackedLinear(matrix, bias, dtype)
        self._matrix, self._bias = matrix, bias

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a call reads."""
        return self._matrix.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """``[tokens, in] -> [tokens, out]``."""
        if self.rounds(x):
            return self.rounded(x)
        return self._exactly(x)

    def rounds(self, x: Tensor) -> bool:
        """Whether so many tokens are rounded."""
        return bool(choose("int8_path", x.device, tokens=len(x))["rounds"])

    def rounded(self, x: Tensor) -> Tensor:
        """The product of more than 16 tokens, which ``torch._int_mm`` asks for, in integers."""
        self._exactly.check(x)
        weight = self._matrix.as_bytes()
        padded, into = weight.shape
        values = torch.empty((len(x), into // 2), dtype=torch.int16, device=x.device)
        scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
        x = x if x.stride(1) == 1 else x.contiguous()
        _round_kernel[(len(x),)](
            x,
            values,
            scales,
            x.shape[1],
            into // 2,
            x.stride(0),
            LANES=self._matrix.lanes,
            BLOCK=triton.next_power_of_2(into // 2),
            num_warps=8,
        )
        total = torch._int_mm(values.view(torch.int8), weight.t())  # [tokens, padded] int32
        out = torch.empty((len(x), self._matrix.shape[0]), dtype=x.dtype, device=x.device)
        block = choose("int8_scale", x.device)["block"]
        _scale_kernel[(len(x), triton.cdiv(out.shape[1], block))](
            total,
            scales,
            self._matrix.scale,
            self._bias,
            out,
            self._matrix.factor,
            out.shape[1],
            padded,
            BLOCK=block,
            num_warps=4,
        )
        return out
