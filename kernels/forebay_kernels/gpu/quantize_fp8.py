"""Rounding to FP8 (e4m3) in Triton, fused into what comes before it: one pass over each token.

For each group of columns (the whole token, or 128 of them)

    scale = max |y| / 448,   values = y / scale

where ``y`` is the input, its RMSNorm, the RMSNorm of a sum, or ``act(gate) * up``; all of it stays
in float32 until it is rounded to e4m3. The specification is ``reference.fp8``.

A program has one token, as a tile of ``[groups, columns of a group]``: what it has loaded stays in
registers, so that neither the sum of squares nor the largest value costs a second read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from forebay_kernels.gpu.activations import gated
from forebay_kernels.gpu.tuning import choose
from forebay_kernels.reference.fp8 import BOUNDS, LARGEST

_LARGEST = tl.constexpr(LARGEST)
_LEAST, _MOST = tl.constexpr(BOUNDS[0]), tl.constexpr(BOUNDS[1])


@triton.jit
def _norm(
    y: tl.tensor,  # [GROUPS_PADDED, GROUP_PADDED] float32, 0 outside
    weight: tl.tensor,  # the same
    eps: tl.tensor,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    mean_square = tl.sum(tl.sum(y * y, 1), 0) / WIDTH
    return y * tl.rsqrt(mean_square + eps) * weight


@triton.jit
def _quantize(
    y: tl.tensor,  # [GROUPS_PADDED, GROUP_PADDED] float32, 0 outside
    values: tl.tensor,  # [tokens, width] e4m3
    scale: tl.tensor,  # [tokens, groups] float32
    token: tl.tensor,
    column: tl.tensor,  # [GROUPS_PADDED, GROUP_PADDED]
    inside: tl.tensor,  # [GROUPS_PADDED, GROUP_PADDED]
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
) -> None:
    largest = tl.minimum(tl.maximum(tl.max(tl.abs(y), 1), _LEAST), _MOST)  # [GROUPS_PADDED]
    unit = largest / _LARGEST
    scaled = y * (1.0 / unit)[:, None]
    scaled = tl.maximum(tl.minimum(scaled, _LARGEST), -_LARGEST)
    tl.store(values + token * WIDTH + column, scaled.to(tl.float8e4nv), mask=inside)
    each = tl.arange(0, GROUPS_PADDED)
    tl.store(scale + token * GROUPS + each, unit, mask=each < GROUPS)


@triton.jit
def _quantize_kernel(
    x: tl.tensor,  # [tokens, width]; gate and up side by side: [tokens, 2 width]
    values: tl.tensor,  # [tokens, width] e4m3
    scale: tl.tensor,  # [tokens, groups] float32
    x_row: tl.tensor,
    GATED: tl.constexpr,
    GELU: tl.constexpr,  # of those that are gated
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    each, lane = tl.arange(0, GROUPS_PADDED), tl.arange(0, GROUP_PADDED)
    column = each[:, None] * GROUP + lane[None, :]
    inside = (lane < GROUP)[None, :] & (column < WIDTH)
    y = tl.load(x + token * x_row + column, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(x + token * x_row + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        y = gated(y, up, GELU)
    _quantize(y, values, scale, token, column, inside, WIDTH, GROUPS, GROUPS_PADDED)


@triton.jit
def _norm_quantize_kernel(
    x: tl.tensor,  # [tokens, width]; with ADDED it becomes the sum
    added: tl.tensor,  # [tokens, width]
    inner: tl.tensor,  # [width] float32
    outer: tl.tensor,  # [width] float32
    values: tl.tensor,  # [tokens, width] e4m3
    scale: tl.tensor,  # [tokens, groups] float32
    eps: tl.tensor,
    x_row: tl.tensor,
    added_row: tl.tensor,
    ADDED: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    each, lane = tl.arange(0, GROUPS_PADDED), tl.arange(0, GROUP_PADDED)
    column = each[:, None] * GROUP + lane[None, :]
    inside = (lane < GROUP)[None, :] & (column < WIDTH)
    y = tl.load(x + token * x_row + column, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        more = tl.load(added + token * added_row + column, mask=inside, other=0.0).to(tl.float32)
        if INNER:
            more = _norm(more, tl.load(inner + column, mask=inside, other=0.0), eps, WIDTH)
        # The residual stream as the next layer reads it, so rounded before its norm is taken.
        total = (y + more).to(x.dtype.element_ty)
        tl.store(x + token * x_row + column, total, mask=inside)
        y = total.to(tl.float32)
    y = _norm(y, tl.load(outer + column, mask=inside, other=0.0), eps, WIDTH)
    _quantize(y, values, scale, token, column, inside, WIDTH, GROUPS, GROUPS_PADDED)


def quantize_fp8(x: Tensor, group: int | None = None) -> tuple[Tensor, Tensor]:
    """See ``reference.quantize_fp8``."""
    return _launch_quantize(x, x.shape[1], group)


def silu_mul_fp8(x: Tensor, group: int | None = None) -> tuple[Tensor, Tensor]:
    """See ``reference.silu_mul_fp8``."""
    return _launch_quantize(x, x.shape[1] // 2, group, gated=True)


def gelu_tanh_mul_fp8(x: Tensor, group: int | None = None) -> tuple[Tensor, Tensor]:
    """See ``reference.gelu_tanh_mul_fp8``."""
    return _launch_quantize(x, x.shape[1] // 2, group, gated=True, gelu=True)


def rms_norm_fp8(
    x: Tensor, weight: Tensor, eps: float, group: int | None = None
) -> tuple[Tensor, Tensor]:
    """See ``reference.rms_norm_fp8``; ``weight`` is float32."""
    return _launch_norm(x, None, None, weight, eps, group)


def add_rms_norm_fp8(
    x: Tensor,
    added: Tensor,
    inner: Tensor | None,
    outer: Tensor,
    eps: float,
    group: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``reference.add_rms_norm_fp8``; the weights are float32."""
    return _launch_norm(x, added, inner, outer, eps, group)


def _launch_quantize(
    x: Tensor, width: int, group: int | None, *, gated: bool = False, gelu: bool = False
) -> tuple[Tensor, Tensor]:
    _check("x", x)
    values, scale, tile, launch = _outputs(x, width, group)
    if len(x):
        flags = {"GATED": gated, "GELU": gelu}
        _quantize_kernel[(len(x),)](x, values, scale, x.stride(0), **flags, **tile, **launch)
    return values, scale


def _launch_norm(
    x: Tensor,
    added: Tensor | None,
    inner: Tensor | None,
    outer: Tensor,
    eps: float,
    group: int | None,
) -> tuple[Tensor, Tensor]:
    _check("x", x)
    if added is not None:
        _check("added", added)
    values, scale, tile, launch = _outputs(x, x.shape[1], group)
    if len(x):
        _norm_quantize_kernel[(len(x),)](
            x,
            x if added is None else added,
            outer if inner is None else inner,
            outer,
            values,
            scale,
            eps,
            x.stride(0),
            0 if added is None else added.stride(0),
            ADDED=added is not None,
            INNER=inner is not None,
            **tile,
            **launch,
        )
    return values, scale


def _outputs(
    x: Tensor, width: int, group: int | None
) -> tuple[Tensor, Tensor, dict[str, int], dict[str, int]]:
    """Values and scales to be written, and the kernel's constants and options."""
    group = group or width
    groups = triton.cdiv(width, group)
    values = torch.empty((len(x), width), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((len(x), groups), dtype=torch.float32, device=x.device)
    tile = {
        "WIDTH": width,
        "GROUP": group,
        "GROUPS": groups,
        "GROUP_PADDED": triton.next_power_of_2(group),
        "GROUPS_PADDED": triton.next_power_of_2(groups),
    }
    return (
        values,
        scale,
        tile,
        {"num_warps": choose("quantize_fp8", x.device, width=width)["warps"]},
    )


def _check(name: str, x: Tensor) -> None:
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(f"{name}: [tokens, width] with contiguous rows is wanted, give a copy")
