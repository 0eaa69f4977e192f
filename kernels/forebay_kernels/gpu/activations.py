"""The gate of an MLP, in Triton: ``act(gate) * up`` of gate and up side by side.

Both gates are ``g / (1 + exp(-y))``: SiLU with ``y = g``, GELU's tanh form with
``y = 2 sqrt(2/pi) (g + 0.044715 g^3)``, since ``(1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u))``
(https://arxiv.org/abs/2002.05202, https://arxiv.org/abs/1606.08415). Below 0 both sides of the
fraction are multiplied by ``exp(y)``, so that no exponential overflows.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from forebay_kernels.gpu.tuning import choose

_SLOPE = tl.constexpr(2.0 * math.sqrt(2.0 / math.pi))


@triton.jit
def gated(gate: tl.tensor, up: tl.tensor, GELU: tl.constexpr) -> tl.tensor:
    """``act(gate) * up`` of tiles in float32."""
    y = gate
    if GELU:
        y = _SLOPE * (gate + 0.044715 * gate * gate * gate)
    decay = tl.exp(-tl.abs(y))
    return gate * tl.where(y < 0.0, decay, 1.0) / (1.0 + decay) * up


@triton.jit
def _gate_kernel(
    x: tl.tensor,  # [rows, 2 * WIDTH]: gate, up
    out: tl.tensor,  # [rows, WIDTH]
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)  # with it there may be over 2^31 values
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < WIDTH
    place = x + row * (2 * WIDTH) + lane
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + WIDTH, mask=inside, other=0.0).to(tl.float32)
    found = gated(gate, up, GELU)
    tl.store(out + row * WIDTH + lane, found.to(out.dtype.element_ty), mask=inside)


def silu_mul(x: Tensor) -> Tensor:
    """``silu(gate) * up``: ``[..., 2 n] -> [..., n]``."""
    return _gated(x, gelu=False)


def gelu_tanh_mul(x: Tensor) -> Tensor:
    """``gelu(gate) * up`` with GELU's tanh form: ``[..., 2 n] -> [..., n]``."""
    return _gated(x, gelu=True)


def _gated(x: Tensor, *, gelu: bool) -> Tensor:
    if not x.is_contiguous() or x.shape[-1] % 2:
        raise ValueError("x: must be contiguous, gate and up of the same width")
    *outer, both = x.shape
    width = both // 2
    out = torch.empty((*outer, width), dtype=x.dtype, device=x.device)
    rows = x.numel() // both
    chosen = choose("gate", x.device, rows=rows, width=width)
    if rows:
        _gate_kernel[(rows, triton.cdiv(width, chosen["block"]))](
            x,
            out,
            WIDTH=width,
            BLOCK=chosen["block"],
            GELU=gelu,
            num_warps=chosen["warps"],
        )
    return out
