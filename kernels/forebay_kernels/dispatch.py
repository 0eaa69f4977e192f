"""One name for each operator; the device of its input chooses who computes it."""

from __future__ import annotations

from torch import Tensor

from forebay_kernels import cpu, reference
from forebay_kernels.batch import PagedBatch


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """Root-mean-square norm over the last axis; see ``reference.rms_norm``."""
    compute = cpu.rms_norm if x.is_cpu else reference.rms_norm
    return compute(x, weight, eps, unit_offset=unit_offset)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding; see ``reference.rope``."""
    return reference.rope(x, cos, sin)


def silu_mul(x: Tensor) -> Tensor:
    """SwiGLU's gate; see ``reference.silu_mul``."""
    return cpu.silu_mul(x) if x.is_cpu else reference.silu_mul(x)


def gelu_tanh_mul(x: Tensor) -> Tensor:
    """Gemma's gate; see ``reference.gelu_tanh_mul``."""
    return cpu.gelu_tanh_mul(x) if x.is_cpu else reference.gelu_tanh_mul(x)


def kv_store(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Write a step's keys and values into the paged cache; see ``reference.kv_store``."""
    cpu.kv_store(key, value, keys, values, slots)


def paged_attention(
    query: Tensor,  # [tokens, heads, head_dim]
    keys: Tensor,  # [kv_heads, pages, block_size, head_dim]
    values: Tensor,  # [kv_heads, pages, block_size, head_dim]
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of a mixed batch over the paged cache; see ``reference.paged_attention``."""
    return cpu.paged_attention(
        query, keys, values, batch, scale=scale, window=window, softcap=softcap
    )
