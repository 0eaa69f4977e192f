"""Forebay's operators: one name each, computed by whatever is fastest on the tensor's device."""

from __future__ import annotations

from forebay_kernels.batch import PagedBatch
from forebay_kernels.dispatch import (
    add_rms_norm,
    argmax,
    embedding,
    gelu_tanh_mul,
    kv_store,
    mark_keys,
    pack_experts,
    paged_attention,
    prepare_qkv,
    remember,
    rms_norm,
    rope,
    rotary_angles,
    route,
    sample,
    scatter,
    select_rms_norm,
    silu_mul,
    step_inputs,
)
from forebay_kernels.sampling import Drawn, SamplingRows, SamplingTable

__all__ = [
    "Drawn",
    "PagedBatch",
    "SamplingRows",
    "SamplingTable",
    "add_rms_norm",
    "argmax",
    "embedding",
    "gelu_tanh_mul",
    "kv_store",
    "mark_keys",
    "pack_experts",
    "paged_attention",
    "prepare_qkv",
    "remember",
    "rms_norm",
    "rope",
    "rotary_angles",
    "route",
    "sample",
    "scatter",
    "select_rms_norm",
    "silu_mul",
    "step_inputs",
]
