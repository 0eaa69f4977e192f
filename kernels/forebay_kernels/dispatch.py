"""One name for each operator; the device of its input chooses who computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from forebay_kernels import eager, reference
from forebay_kernels.batch import PagedBatch


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """Root-mean-square norm over the last axis; see ``reference.rms_norm``."""
    return eager.rms_norm(x, weight, eps, unit_offset=unit_offset)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding; see ``reference.rope``."""
    return eager.rope(x, cos, sin)


def silu_mul(x: Tensor) -> Tensor:
    """SwiGLU's gate; see ``reference.silu_mul``."""
    return eager.silu_mul(x)


def gelu_tanh_mul(x: Tensor) -> Tensor:
    """Gemma's gate; see ``reference.gelu_tanh_mul``."""
    return eager.gelu_tanh_mul(x)


def kv_store(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Write a step's keys and values into the paged cache; see ``reference.kv_store``."""
    eager.kv_store(key, value, keys, values, slots)


def paged_attention(
    query: Tensor,  # [tokens, heads, head_dim]
    keys: Tensor,  # [kv_heads, pages, block_size, head_dim]
    values: Tensor,  # [kv_heads, pages, block_size, head_dim]
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [heads]
) -> Tensor:
    """Attention of a mixed batch over the paged cache; see ``reference.paged_attention``."""
    if sinks is not None:  # few models have them, and no faster operator knows them
        return reference.paged_attention(
            query,
            keys,
            values,
            batch,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
        )
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    first_row = 0
    if has_triton(query):
        # Imported here: triton is not there on every system, and takes 0.24 s where it is.
        from forebay_kernels.paged_decode import decode_attention

        first_row = batch.num_decodes
        decode_attention(
            query, keys, values, out, batch, scale=scale, window=window, softcap=softcap
        )
    eager.paged_attention(
        query,
        keys,
        values,
        out,
        batch,
        scale=scale,
        window=window,
        softcap=softcap,
        first_row=first_row,
    )
    return out


def has_triton(x: Tensor) -> bool:
    """Whether Triton's kernels compile for the device of ``x``."""
    return x.is_cuda
