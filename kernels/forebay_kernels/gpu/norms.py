"""Norms of hidden states, in Triton: alone, of wanted rows, and with the addition to the stream.

    rms_norm        out = x / sqrt(mean(x^2) + eps) * w
    select_rms_norm the same of rows ``at``; a negative one gives zeros
    add_rms_norm    x = x + added (or its norm), in place; out = rms_norm(x)

Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467. One program holds one row in registers,
so each value is read once and written once; sums are in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from forebay_kernels.gpu.tuning import choose


@triton.jit
def _scaled(
    x: tl.tensor,  # [BLOCK] float32, 0 past WIDTH
    weight: tl.tensor,  # [WIDTH] float32
    lane: tl.tensor,  # [BLOCK]
    eps: tl.tensor,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    w = tl.load(weight + lane, mask=lane < WIDTH, other=0.0)
    return x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps) * w


@triton.jit
def _norm_kernel(
    x: tl.tensor,  # [.., WIDTH]
    at: tl.tensor,  # [rows] int64, if SELECT
    weight: tl.tensor,  # [WIDTH] float32
    out: tl.tensor,  # [rows, WIDTH]
    eps: tl.tensor,
    x_row: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SELECT: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)  # with it there may be over 2^31 values
    lane = tl.arange(0, BLOCK)
    inside = lane < WIDTH
    source = row
    width = WIDTH
    if SELECT:
        source = tl.load(at + row)
        width = tl.where(source >= 0, WIDTH, 0)  # zeros instead, whose norm is zeros
    value = tl.load(x + source * x_row + lane, mask=lane < width, other=0.0).to(tl.float32)
    normed = _scaled(value, weight, lane, eps, WIDTH)
    tl.store(out + row * WIDTH + lane, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm_kernel(
    x: tl.tensor,  # [rows, WIDTH], written
    added: tl.tensor,  # [rows, WIDTH]
    inner: tl.tensor,  # [WIDTH] float32, if INNER
    outer: tl.tensor,  # [WIDTH] float32
    out: tl.tensor,  # [rows, WIDTH]
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
) -> None:
    lane = tl.arange(0, BLOCK)
    inside = lane < WIDTH
    place = tl.program_id(0).to(tl.int64) * WIDTH + lane
    stream = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
    if INNER:
        value = _scaled(value, inner, lane, eps, WIDTH)
    # The norm is of the stream as the next layer will read it: rounded.
    total = (stream + value).to(x.dtype.element_ty)
    tl.store(x + place, total, mask=inside)
    normed = _scaled(total.to(tl.float32), outer, lane, eps, WIDTH)
    tl.store(out + place, normed.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm over the last axis; ``weight`` is ``[width]`` float32."""
    rows = x.reshape(-1, x.shape[-1])
    return _normed(rows, None, weight, eps, len(rows)).view(x.shape)


def select_rms_norm(
    hidden: Tensor,  # [tokens, width]
    at: Tensor,  # [rows] int64
    weight: Tensor,  # [width] float32
    eps: float,
) -> Tensor:
    """Norm of rows ``at``, ``[rows, width]``; zeros where ``at`` is negative."""
    if at.dtype != torch.int64 or not at.is_contiguous():
        raise ValueError("at: must be int64 and contiguous")
    return _normed(hidden, at, weight, eps, len(at))


def add_rms_norm(
    x: Tensor,  # [rows, width], written
    added: Tensor,  # [rows, width]
    inner: Tensor | None,  # [width] float32
    outer: Tensor,  # [width] float32
    eps: float,
) -> Tensor:
    """``x += added``, or its ``inner`` norm, in place; the ``outer`` norm of ``x`` comes back."""
    for name, tensor in (("x", x), ("added", added)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: must be contiguous")
    width = x.shape[-1]
    for name, weight in (("inner", inner), ("outer", outer)):
        if weight is not None:
            _check_weight(name, weight, width)
    out = torch.empty_like(x)
    rows = x.numel() // width
    if rows:
        _add_norm_kernel[(rows,)](
            x,
            added,
            inner,
            outer,
            out,
            eps,
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            INNER=inner is not None,
            num_warps=choose("rms_norm", x.device, width=width)["warps"],
        )
    return out


def _normed(x: Tensor, at: Tensor | None, weight: Tensor, eps: float, rows: int) -> Tensor:
    width = x.shape[-1]
    _check_weight("weight", weight, width)
    if x.stride(-1) != 1:
        raise ValueError("x: its last axis must be contiguous")
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if rows:
        _norm_kernel[(rows,)](
            x,
            at,
            weight,
            out,
            eps,
            x.stride(0),
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            SELECT=at is not None,
            num_warps=choose("rms_norm", x.device, width=width)["warps"],
        )
    return out


def _check_weight(name: str, weight: Tensor, width: int) -> None:
    if weight.shape != (width,) or weight.dtype != torch.float32 or weight.stride(0) != 1:
        raise ValueError(f"{name}: must be [{width}] float32 and contiguous")
