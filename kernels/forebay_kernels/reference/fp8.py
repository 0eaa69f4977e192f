"""Rounding to FP8 (e4m3), in plain PyTorch.

e4m3 has four bits of exponent and three of mantissa, no infinity, and 448 as its largest value:
Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forebay_kernels.reference.layers import add_rms_norm, gelu_tanh_mul, rms_norm, silu_mul, wide

#: The largest value of e4m3.
LARGEST = 448.0
#: What a group's largest value is taken for at least and at most, so that its scale and the inverse
#: of it are finite and not 0: for groups of zeros, and for those that hold an infinity.
BOUNDS = (1e-12, 3e38)


def quantize_fp8(x: Tensor, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Tokens ``[tokens, width]`` as e4m3, and a scale for each ``group`` of columns.

    ``scale = max |x| / 448`` of the group, ``[tokens, ceil(width / group)]`` float32; the values
    are ``x / scale``, at most 448 in size. The last group may be shorter; None: one a token.
    """
    tokens, width = x.shape
    group = group or width
    groups = -(-width // group)
    grouped = x.new_zeros(tokens, groups * group, dtype=wide(x).dtype)
    grouped[:, :width] = x
    grouped = grouped.view(tokens, groups, group)
    scale = grouped.abs().amax(-1).clamp(*BOUNDS) / LARGEST  # [tokens, groups]
    values = (grouped / scale[:, :, None]).clamp(-LARGEST, LARGEST).flatten(1)[:, :width]
    return values.to(torch.float8_e4m3fn), scale.float()


def dequantize_fp8(values: Tensor, scale: Tensor, group: int | None = None) -> Tensor:
    """``values * scale`` in the type of ``scale``: the inverse of ``quantize_fp8``."""
    width = values.shape[1]
    return values.to(scale.dtype) * scale.repeat_interleave(group or width, dim=1)[:, :width]


def rms_norm_fp8(
    x: Tensor, weight: Tensor, eps: float, group: int | None = None
) -> tuple[Tensor, Tensor]:
    """The norm of ``x``, quantised before it is rounded to a narrower type."""
    return quantize_fp8(rms_norm(wide(x), weight, eps), group)


def add_rms_norm_fp8(
    x: Tensor,
    added: Tensor,
    inner: Tensor | None,
    outer: Tensor,
    eps: float,
    group: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``x`` becomes what ``add_rms_norm`` makes of it; the norm of that, quantised."""
    add_rms_norm(x, added, inner, outer, eps)
    return rms_norm_fp8(x, outer, eps, group)


def silu_mul_fp8(x: Tensor, group: int | None = None) -> tuple[Tensor, Tensor]:
    """SwiGLU's gate, quantised before it is rounded: ``[tokens, 2 n] -> [tokens, n]``."""
    return quantize_fp8(silu_mul(wide(x)), group)


def gelu_tanh_mul_fp8(x: Tensor, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Gemma's gate, quantised before it is rounded: ``[tokens, 2 n] -> [tokens, n]``."""
    return quantize_fp8(gelu_tanh_mul(wide(x)), group)
