"""One name for each operator; the device of its input chooses who computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from forebay_kernels import eager, reference
from forebay_kernels.batch import PagedBatch
from forebay_kernels.cpu import available
from forebay_kernels.cpu import operators as compiled
from forebay_kernels.matrix import Matrix
from forebay_kernels.sampling import ANYTHING, Drawn, SamplingRows, Wants

# Triton's modules are imported where they are needed: triton is not on every system, and takes
# 0.24 s to import.


def embedding(token_ids: Tensor, weight: Tensor, scale: float | None = None) -> Tensor:
    """Rows of ``weight``, times ``scale``; see ``reference.embedding``."""
    if has_triton(weight):
        from forebay_kernels.gpu import embedding as triton

        return triton.embedding(token_ids, weight, scale)
    return eager.embedding(token_ids, weight, scale)


def rotary_angles(positions: Tensor, frequency: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine that ``rope`` takes, ``frequency`` in float32; see ``reference``."""
    if has_triton(positions):
        from forebay_kernels.gpu import embedding as triton

        return triton.rotary_angles(positions, frequency, factor)
    return eager.rotary_angles(positions, frequency, factor)


def is_compiled(x: Tensor) -> bool:
    """Whether operators on rows like these are compiled ones, whose calls a tape can hold."""
    return not has_triton(x) and compiled.takes_rows(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """Root-mean-square norm over the last axis; see ``reference.rms_norm``."""
    plain = not unit_offset and weight.dim() == 1
    if plain and has_triton(x):
        from forebay_kernels.gpu import norms

        return norms.rms_norm(x, weight.float(), eps)
    if plain and compiled.takes_rows(x):
        return compiled.rms_norm(x, weight.float(), eps)
    return eager.rms_norm(x, weight, eps, unit_offset=unit_offset)


def select_rms_norm(hidden: Tensor, at: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm of some rows, ``weight`` in float32; see ``reference.select_rms_norm``."""
    if has_triton(hidden):
        from forebay_kernels.gpu import norms

        return norms.select_rms_norm(hidden, at, weight, eps)
    wanted = hidden[at.clamp(min=0)].masked_fill_(at.unsqueeze(1) < 0, 0.0)  # the norm of 0 is 0
    return rms_norm(wanted, weight, eps)


def add_rms_norm(
    x: Tensor, added: Tensor, inner: Tensor | None, outer: Tensor, eps: float
) -> Tensor:
    """``x += added``, or its norm if ``inner`` is a weight, in place; the norm of ``x`` comes back.

    Both weights are ``[width]`` float32.
    """
    if has_triton(x):
        from forebay_kernels.gpu import norms

        return norms.add_rms_norm(x, added, inner, outer, eps)
    if compiled.takes_rows(x) and added.is_contiguous():
        return compiled.add_rms_norm(x, added, inner, outer, eps)
    x += added if inner is None else eager.rms_norm(added, inner, eps)
    return eager.rms_norm(x, outer, eps)


def rms_norm_fp8(x: Tensor, weight: Tensor, eps: float, group: int) -> tuple[Tensor, Tensor]:
    """The norm as e4m3 values and scales of ``group`` columns; see ``reference.rms_norm_fp8``."""
    compute = reference.rms_norm_fp8
    if has_triton(x):
        from forebay_kernels.gpu.quantize_fp8 import rms_norm_fp8 as compute
    return compute(x, weight, eps, group)


def add_rms_norm_fp8(
    x: Tensor, added: Tensor, inner: Tensor | None, outer: Tensor, eps: float, group: int
) -> tuple[Tensor, Tensor]:
    """``add_rms_norm`` with its norm as e4m3 values and scales; see ``reference``."""
    compute = reference.add_rms_norm_fp8
    if has_triton(x):
        from forebay_kernels.gpu.quantize_fp8 import add_rms_norm_fp8 as compute
    return compute(x, added, inner, outer, eps, group)


def argmax(x: Tensor) -> Tensor:
    """The first of each row's largest elements: ``[rows, width] -> [rows]`` int64."""
    if x.stride(-1) == 1 and available(x):
        return compiled.argmax(x)
    # As argmax, in 0.27 ms a row of 262144 bf16 instead of 1.07.
    return x.max(-1).indices


def sample(
    logits: Tensor,  # [rows, vocab]
    rows: SamplingRows,
    asked: Wants = ANYTHING,
    *,
    softcap: float | None = None,
) -> Drawn:
    """A token for each row; see ``reference.sample``. ``rows.table.counts`` may be kept up."""
    if has_triton(logits):
        from forebay_kernels.gpu import sampling

        return sampling.sample(logits, rows, asked, softcap=softcap)
    return reference.sample(logits, rows, asked, softcap=softcap)


def mark_keys(rows: SamplingRows) -> None:
    """Keys of the rows' watermarks from the tokens before them; see ``reference.mark_keys``."""
    if has_triton(rows.requests):
        from forebay_kernels.gpu import watermark

        watermark.mark_keys(rows)
    else:
        reference.mark_keys(rows)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding; see ``reference.rope``."""
    return eager.rope(x, cos, sin)


def silu_mul(x: Tensor) -> Tensor:
    """SwiGLU's gate; see ``reference.silu_mul``."""
    if has_triton(x):
        from forebay_kernels.gpu import activations

        return activations.silu_mul(x)
    return compiled.silu_mul(x) if compiled.takes_rows(x) else eager.silu_mul(x)


def gelu_tanh_mul(x: Tensor) -> Tensor:
    """Gemma's gate; see ``reference.gelu_tanh_mul``."""
    if has_triton(x):
        from forebay_kernels.gpu import activations

        return activations.gelu_tanh_mul(x)
    return compiled.gelu_tanh_mul(x) if compiled.takes_rows(x) else eager.gelu_tanh_mul(x)


def silu_mul_fp8(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """SwiGLU's gate as e4m3 values and scales; see ``reference.silu_mul_fp8``."""
    compute = reference.silu_mul_fp8
    if has_triton(x):
        from forebay_kernels.gpu.quantize_fp8 import silu_mul_fp8 as compute
    return compute(x, group)


def gelu_tanh_mul_fp8(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Gemma's gate as e4m3 values and scales; see ``reference.gelu_tanh_mul_fp8``."""
    compute = reference.gelu_tanh_mul_fp8
    if has_triton(x):
        from forebay_kernels.gpu.quantize_fp8 import gelu_tanh_mul_fp8 as compute
    return compute(x, group)


def kv_store(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    key_scale: Tensor | None = None,  # [kv_heads] float32
    value_scale: Tensor | None = None,  # [kv_heads] float32
) -> None:
    """Write a step's keys and values into the paged cache; see ``reference.kv_store``."""
    _check_scales(keys, key_scale, value_scale)
    if has_triton(keys):
        from forebay_kernels.gpu import qkv

        qkv.kv_store(key, value, keys, values, slots, key_scale, value_scale)
    else:
        eager.kv_store(key, value, keys, values, slots, key_scale, value_scale)


def prepare_qkv(
    qkv: Tensor,  # [tokens, heads + 2 kv_heads, head_dim]
    kv_heads: int,
    norm: Tensor | None,  # [heads + kv_heads, head_dim] float32
    eps: float,
    angles: tuple[Tensor, Tensor] | None,  # cos and sin: [tokens, rotated / 2] float32
    keys: Tensor,  # [kv_heads, pages, block_size, head_dim]
    values: Tensor,  # [kv_heads, pages, block_size, head_dim]
    slots: Tensor,  # [tokens] int64
    key_scale: Tensor | None = None,  # [kv_heads] float32
    value_scale: Tensor | None = None,  # [kv_heads] float32
) -> Tensor:
    """Norm and rotate queries and keys, store keys and values: the queries that attention takes.

    ``qkv`` may be overwritten. Heads whose ``rotated`` is less than ``head_dim`` keep the rest. FP8
    caches have a scale a head; see ``reference.kv_store``.
    """
    _check_scales(keys, key_scale, value_scale)
    heads = qkv.shape[1] - 2 * kv_heads
    if has_triton(qkv):
        from forebay_kernels.gpu import qkv as triton

        triton.prepare_qkv(
            qkv, kv_heads, norm, eps, angles, keys, values, slots, key_scale, value_scale
        )
        return qkv[:, :heads]
    if compiled.takes_rows(qkv) and compiled.takes_cache(keys, qkv.shape[2]):
        cos, sin = angles or (None, None)
        compiled.prepare_qkv(qkv, kv_heads, norm, eps, cos, sin, keys, values, slots)
        return qkv[:, :heads]
    return eager.prepare_qkv(
        qkv, kv_heads, norm, eps, angles, keys, values, slots, key_scale, value_scale
    )


def _check_scales(keys: Tensor, key_scale: Tensor | None, value_scale: Tensor | None) -> None:
    for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)):
        if (scale is not None) != (keys.dtype == torch.float8_e4m3fn):
            raise ValueError(f"{name}: a cache of FP8 needs one, any other has none")


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
    key_scale: Tensor | None = None,  # [kv_heads] float32
    value_scale: Tensor | None = None,  # [kv_heads] float32
) -> Tensor:
    """Attention of a mixed batch over the paged cache; see ``reference.paged_attention``."""
    _check_scales(keys, key_scale, value_scale)
    settings: dict[str, Any] = {
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
        "key_scale": key_scale,
        "value_scale": value_scale,
    }
    plain = sinks is None and query.stride()[1:] == (query.shape[2], 1)
    if plain and not has_triton(query) and compiled.takes_cache(keys, query.shape[2]):
        return compiled.paged_attention(
            query, keys, values, batch, scale=scale, window=window, softcap=softcap
        )
    if has_triton(query):
        from forebay_kernels.gpu.decode_attention import decode_attention
        from forebay_kernels.gpu.prefill_attention import prefill_attention

        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        decode_attention(query, keys, values, out, batch, **settings)
        prefill_attention(query, keys, values, out, batch, **settings)
        return out
    out = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    eager.paged_attention(query, keys, values, out, batch, **settings)
    return out


def step_inputs(
    places: Tensor,  # [rows] int32
    starts: Tensor,  # [rows] int32
    query_starts: Tensor,  # [rows + 1] int32
    tokens: Tensor,  # [tokens] int32
    last: Tensor,  # [places] int32
    tables: Tensor,  # [places, groups, pages] int32
    block_size: int,
    *,
    token_ids: Tensor,  # [tokens] int64
    positions: Tensor,  # [tokens] int64
    lengths: Tensor,  # [rows] int32
    block_tables: Tensor,  # [groups, rows, pages] int32
    slots: Tensor,  # [groups, tokens] int64
) -> None:
    """What a step's model runs on, from a few words a row; see ``reference.step_inputs``."""
    compute = reference.step_inputs
    if has_triton(places):
        from forebay_kernels.gpu.step_inputs import step_inputs as compute
    compute(
        places,
        starts,
        query_starts,
        tokens,
        last,
        tables,
        block_size,
        token_ids=token_ids,
        positions=positions,
        lengths=lengths,
        block_tables=block_tables,
        slots=slots,
    )


def scatter(table: Tensor, at: Tensor, words: Tensor) -> None:
    """``table[at] = words``, all int32; no place twice."""
    if has_triton(table):
        from forebay_kernels.gpu.step_inputs import scatter as compute

        compute(table, at, words)
    else:
        reference.scatter(table, at, words)


def route(logits: Tensor, top_k: int, *, normalised: bool) -> tuple[Tensor, Tensor]:
    """A mixture's weights and experts for each token; see ``reference.route``."""
    if has_triton(logits):
        from forebay_kernels.gpu import moe

        return moe.route(logits, top_k, normalised=normalised)
    return reference.route(logits, top_k, normalised=normalised)


def pack_experts(
    gate_up: Sequence[Matrix],
    down: Sequence[Matrix],
    dtype: torch.dtype,
) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """``reference.experts`` over these matrices, of tokens of this type and what ``route`` gives.

    None: nothing computes them together on the device that they are on.
    """
    if gate_up[0].device.type != "cuda":
        return None
    from forebay_kernels.gpu import moe

    return moe.pack_experts(gate_up, down, dtype)


def remember(
    drawn: Tensor,  # [samples] int64
    places: Tensor,  # [samples] int32
    positions: Tensor,  # [samples] int32
    last: Tensor,  # [places] int32
    tokens: Tensor,  # [places, longest] int32
) -> None:
    """Put drawn tokens where the next step finds them; see ``reference.remember``."""
    compute = reference.remember
    if has_triton(drawn):
        from forebay_kernels.gpu.step_inputs import remember as compute
    compute(drawn, places, positions, last, tokens)


def has_triton(x: Tensor) -> bool:
    """Whether Triton's kernels compile for the device of ``x``."""
    return x.is_cuda
