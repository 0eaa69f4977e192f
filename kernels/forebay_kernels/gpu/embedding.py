"""What stands before the first layer, in Triton: rows of the embedding, and angles of positions.

embedding       out[t] = weight[token_ids[t]] (* scale)
rotary_angles   cos, sin of positions[t] * frequency[i], * factor
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from forebay_kernels.gpu.tuning import choose


@triton.jit
def _embedding_kernel(
    token_ids: tl.tensor,  # [tokens] int64
    weight: tl.tensor,  # [vocab, WIDTH]
    out: tl.tensor,  # [tokens, WIDTH]
    scale: tl.tensor,
    vocab: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)  # with it there may be over 2^31 values
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(token_ids + token).to(tl.int64)
    width = tl.where(index >= 0, tl.where(index < vocab, WIDTH, 0), 0)
    value = tl.load(weight + index * WIDTH + lane, mask=lane < width, other=0.0)
    if SCALED:
        value = (value.to(tl.float32) * scale).to(out.dtype.element_ty)
    tl.store(out + token * WIDTH + lane, value, mask=lane < WIDTH)


@triton.jit
def _angles_kernel(
    positions: tl.tensor,  # [tokens] int64
    frequency: tl.tensor,  # [HALF] float32
    cos: tl.tensor,  # [tokens, HALF] float32
    sin: tl.tensor,  # [tokens, HALF] float32
    factor: tl.tensor,
    count: tl.tensor,  # tokens * HALF
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    position = tl.load(positions + place // HALF, mask=inside, other=0).to(tl.float32)
    angle = position * tl.load(frequency + place % HALF, mask=inside, other=0.0)
    tl.store(cos + place, tl.cos(angle) * factor, mask=inside)
    tl.store(sin + place, tl.sin(angle) * factor, mask=inside)


def embedding(token_ids: Tensor, weight: Tensor, scale: float | None) -> Tensor:
    """Rows of ``weight``: ``[tokens] -> [tokens, width]``; zeros for ids that it does not have."""
    if not token_ids.is_contiguous() or not weight.is_contiguous():
        raise ValueError("token_ids, weight: must be contiguous")
    vocab, width = weight.shape
    tokens = token_ids.numel()
    out = torch.empty((*token_ids.shape, width), dtype=weight.dtype, device=weight.device)
    chosen = choose("embedding", weight.device)
    if tokens:
        _embedding_kernel[(tokens, triton.cdiv(width, chosen["block"]))](
            token_ids,
            weight,
            out,
            1.0 if scale is None else scale,
            vocab,
            WIDTH=width,
            BLOCK=chosen["block"],
            SCALED=scale is not None,
            num_warps=chosen["warps"],
        )
    return out


def rotary_angles(positions: Tensor, frequency: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of ``positions * frequency``, each ``[tokens, half]``."""
    for name, tensor in (("positions", positions), ("frequency", frequency)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: must be contiguous")
    half = len(frequency)
    count = len(positions) * half
    cos, sin = (
        torch.empty((len(positions), half), dtype=torch.float32, device=positions.device)
        for _ in range(2)
    )
    chosen = choose("rotary_angles", positions.device)
    if count:
        _angles_kernel[(triton.cdiv(count, chosen["block"]),)](
            positions,
            frequency,
            cos,
            sin,
            factor,
            count,
            HALF=half,
            BLOCK=chosen["block"],
            num_warps=chosen["warps"],
        )
    return cos, sin
