"""Every operator in plain PyTorch, written to be read: the specification of the fast ones.

All arithmetic is in float32 (float64 for float64 inputs), rounded once to the input's type.

The cache of one layer is two tensors, keys and values, each ``[kv_heads, pages, block_size,
head_dim]``: one head's page is one contiguous run, so a page is gathered with one copy, and the
pages of a row form a contiguous ``[tokens, head_dim]`` matrix for each head.
"""

from __future__ import annotations

from forebay_kernels.reference.attention import paged_attention, visible
from forebay_kernels.reference.fp8 import (
    add_rms_norm_fp8,
    gelu_tanh_mul_fp8,
    quantize_fp8,
    rms_norm_fp8,
    silu_mul_fp8,
)
from forebay_kernels.reference.layers import (
    add_rms_norm,
    embedding,
    gelu_tanh_mul,
    kv_store,
    prepare_qkv,
    rms_norm,
    rope,
    rotary_angles,
    select_rms_norm,
    silu_mul,
    wide,
)
from forebay_kernels.reference.moe import experts, route
from forebay_kernels.reference.sampling import sample
from forebay_kernels.reference.step_inputs import remember, scatter, step_inputs
from forebay_kernels.reference.watermark import mark_keys

__all__ = [
    "add_rms_norm",
    "add_rms_norm_fp8",
    "embedding",
    "experts",
    "gelu_tanh_mul",
    "gelu_tanh_mul_fp8",
    "kv_store",
    "mark_keys",
    "paged_attention",
    "prepare_qkv",
    "quantize_fp8",
    "remember",
    "rms_norm",
    "rms_norm_fp8",
    "rope",
    "rotary_angles",
    "route",
    "sample",
    "scatter",
    "select_rms_norm",
    "silu_mul",
    "silu_mul_fp8",
    "step_inputs",
    "visible",
    "wide",
]
