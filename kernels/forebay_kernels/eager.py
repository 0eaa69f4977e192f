"""Faster PyTorch formulations of the operators, for any device and tuned for CPUs.

Each is tested against its reference. Attention is torch's fused one, fed so that it is fast on a
CPU: a group's query heads are rows of one problem (with ``enable_gqa`` it moves 2 GB/s instead of
10), masks are boolean and already expanded (an additive one made 8 rows of bf16 9 times slower),
and gathers stay small.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from forebay_kernels.batch import PagedBatch
from forebay_kernels.gather import Gather, plan_gathers
from forebay_kernels.reference import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    wide = x.float()
    rstd = torch.rsqrt_(wide.square().mean(-1, keepdim=True).add_(eps))
    # Not in place at first: of a float32 input ``wide`` is the input itself.
    return (wide * rstd).mul_(weight + 1.0 if unit_offset else weight).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)  # [tokens, heads, dim/2]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [tokens, 1, dim/2]
    out = torch.empty_like(x)
    half = x.shape[-1] // 2
    out[..., :half] = (a * cos).addcmul_(b, sin, value=-1)
    out[..., half:] = (b * cos).addcmul_(a, sin)
    return out


def silu_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_tanh_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)


def embedding(token_ids: Tensor, weight: Tensor, scale: float | None) -> Tensor:
    rows = F.embedding(token_ids, weight)
    return rows if scale is None else rows.mul_(scale)


def rotary_angles(positions: Tensor, frequency: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    angle = positions.float().unsqueeze(1) * frequency  # [tokens, dim / 2]
    cos, sin = angle.cos(), angle.sin()
    return (cos, sin) if factor == 1.0 else (cos.mul_(factor), sin.mul_(factor))


def kv_store(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None:
    if int(slots.min()) < 0:
        stored = slots >= 0
        key, value, slots = key[stored], value[stored], slots[stored]
    for heads, cache, scale in ((key, keys, key_scale), (value, values, value_scale)):
        if scale is not None:
            most = torch.finfo(cache.dtype).max
            heads = heads.float().div(scale.unsqueeze(1)).clamp_(-most, most).to(cache.dtype)
            # Of FP8 torch moves bytes only.
            heads, cache = heads.view(torch.uint8), cache.view(torch.uint8)
        cache.flatten(1, 2).index_copy_(1, slots, heads.transpose(0, 1))


def prepare_qkv(
    qkv: Tensor,  # [tokens, heads + 2 kv_heads, head_dim]
    kv_heads: int,
    norm: Tensor | None,  # [heads + kv_heads, head_dim] float32
    eps: float,
    angles: tuple[Tensor, Tensor] | None,  # cos and sin: [tokens, rotated / 2] float32
    keys: Tensor,  # [kv_heads, pages, block_size, head_dim]
    values: Tensor,  # [kv_heads, pages, block_size, head_dim]
    slots: Tensor,  # [tokens] int64
    key_scale: Tensor | None,  # [kv_heads] float32
    value_scale: Tensor | None,  # [kv_heads] float32
) -> Tensor:
    heads = qkv.shape[1] - 2 * kv_heads
    x, value = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
    if norm is not None:
        x = rms_norm(x, norm, eps)
    if angles is not None:
        x = _rotated(x, *angles)
    kv_store(x[:, heads:], value, keys, values, slots, key_scale, value_scale)
    return x[:, :heads]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated = 2 * cos.shape[1]
    if rotated == x.shape[2]:
        return rope(x, cos, sin)
    return torch.cat((rope(x[..., :rotated], cos, sin), x[..., rotated:]), dim=-1)


def paged_attention(
    query: Tensor,  # [tokens, heads, head_dim]
    keys: Tensor,  # [kv_heads, pages, block_size, head_dim]
    values: Tensor,  # [kv_heads, pages, block_size, head_dim]
    out: Tensor,  # [tokens, heads, head_dim]
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [heads]
    key_scale: Tensor | None = None,  # [kv_heads] float32
    value_scale: Tensor | None = None,  # [kv_heads] float32
) -> None:
    """Write the attention of all rows to ``out``."""
    if batch.replayed:
        raise ValueError("lengths must be known to the host: this attention can't be replayed")
    plan: list[Gather] | None = batch.memo.get(("gathers", window))
    if plan is None:
        plan = plan_gathers(batch, keys, window)
        batch.memo["gathers", window] = plan
    tokens, heads, dim = query.shape
    kv_heads = keys.shape[0]
    grouped = query.view(tokens, kv_heads, heads // kv_heads, dim)
    target = out.view(grouped.shape)
    if sinks is not None:
        sinks = sinks.view(kv_heads, -1, 1, 1)
    for part in plan:
        queries = grouped[part.tokens]
        k = part.read(keys, query.dtype, key_scale)
        v = part.read(values, query.dtype, value_scale)
        if len(queries) == part.rows:  # a query a row: [kv_heads, rows, group, dim]
            by_row = None if sinks is None else sinks.transpose(1, 2)
            found = _attend(queries.transpose(0, 1), k, v, part.mask, scale, softcap, by_row)
            target[part.tokens] = found.transpose(0, 1)
        else:  # a chunk: [kv_heads, group, count, dim]
            q = queries.permute(1, 2, 0, 3)
            k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
            found = _attend(q, k, v, part.mask, scale, softcap, sinks)
            target[part.tokens] = found.permute(2, 0, 1, 3)


def _attend(
    q: Tensor,  # [kv_heads, n, queries, dim]
    k: Tensor,  # [kv_heads, n, slots, dim]
    v: Tensor,  # [kv_heads, n, slots, dim]
    mask: Tensor | None,  # [n or 1, queries or 1, slots]; None: all is seen
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,  # [kv_heads, n or 1, queries or 1, 1]
) -> Tensor:
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = (wide(q) @ wide(k).transpose(2, 3)).mul_(scale)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores.masked_fill_(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype).expand(*scores.shape[:3], 1)), dim=-1)
    likely = scores.softmax(-1)[..., : k.shape[2]]
    return (likely @ wide(v)).to(q.dtype)
