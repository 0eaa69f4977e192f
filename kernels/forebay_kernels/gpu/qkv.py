"""From projection to attention, in Triton: norm and rotation of heads, the write to the cache.

For each query and key head ``x`` of a token at angle ``t``, with ``rotated`` of its values rotated

    x = x / sqrt(mean(x^2) + eps) * w                 (if there is a norm)
    x[i], x[i + rotated/2] = x[i] cos t_i - x[i + rotated/2] sin t_i,
                             x[i + rotated/2] cos t_i + x[i] sin t_i

(https://arxiv.org/abs/2104.09864, half-split). Queries are written where they were read, keys and
values to slot ``page * block_size + offset`` of the cache, each value read once and written once.
An FP8 cache holds ``x / scale`` of its head, held within 448, the largest E4M3 value: beyond it the
conversion would give NaN (https://arxiv.org/abs/2209.05433).

A program is one warp with a few heads of one token, so no value crosses a warp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from forebay_kernels.gpu.tuning import choose

#: Of FP8, E4M3.
_LARGEST = 448.0


@triton.jit
def _as_stored(
    x: tl.tensor,  # [TILE, n] float32
    scale: tl.tensor,  # [kv_heads] float32, if SCALED
    head: tl.tensor,  # [TILE]
    inside: tl.tensor,  # [TILE]
    SCALED: tl.constexpr,
    LARGEST: tl.constexpr,
) -> tl.tensor:
    if SCALED:
        x = x * (1.0 / tl.load(scale + head, mask=inside, other=1.0))[:, None]
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    return x


@triton.jit
def _place(
    head: tl.tensor,  # [TILE]
    slot: tl.tensor,  # int64
    head_stride: tl.tensor,
    page_stride: tl.tensor,
    slot_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
) -> tl.tensor:
    """Where a slot of each head begins in a cache, ``[TILE]``, which may be over 2^31."""
    page, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    return head.to(tl.int64) * head_stride + page * page_stride + offset * slot_stride


@triton.jit
def _move(
    heads: tl.tensor,  # [kv_heads, DIM], of one token
    head: tl.tensor,  # [TILE]
    inside: tl.tensor,  # [TILE]
    cache: tl.tensor,  # [kv_heads, pages, BLOCK_SIZE, DIM]
    place: tl.tensor,  # [TILE]
    scale: tl.tensor,  # [kv_heads] float32, if SCALED
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    SCALED: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    lane = tl.arange(0, DIM_PADDED)
    held = inside[:, None] & (lane < DIM)[None, :]
    x = tl.load(heads + head[:, None] * DIM + lane[None, :], mask=held, other=0.0)
    x = _as_stored(x.to(tl.float32), scale, head, inside, SCALED, LARGEST)
    tl.store(cache + place[:, None] + lane[None, :], x.to(cache.dtype.element_ty), mask=held)


@triton.jit
def _prepare_kernel(
    qkv: tl.tensor,  # [tokens, HEADS + 2 KV_HEADS, DIM]; queries are written
    norm: tl.tensor,  # [HEADS + KV_HEADS, DIM] float32, if NORM
    cos: tl.tensor,  # [tokens, HALF] float32, if ROTATE
    sin: tl.tensor,  # [tokens, HALF] float32, if ROTATE
    keys: tl.tensor,  # [KV_HEADS, pages, BLOCK_SIZE, DIM]
    values: tl.tensor,  # [KV_HEADS, pages, BLOCK_SIZE, DIM]
    key_scale: tl.tensor,  # [KV_HEADS] float32, if SCALED
    value_scale: tl.tensor,  # [KV_HEADS] float32, if SCALED
    slots: tl.tensor,  # [tokens] int64
    eps: tl.tensor,
    qkv_token: tl.tensor,
    cos_token: tl.tensor,
    keys_head: tl.tensor,
    keys_page: tl.tensor,
    keys_slot: tl.tensor,
    values_head: tl.tensor,
    values_page: tl.tensor,
    values_slot: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,  # a head is HALF values, their partners, and DIM - 2 HALF that stay
    BLOCK_SIZE: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    SCALED: tl.constexpr,
    TILE: tl.constexpr,
    QUERY_TILES: tl.constexpr,
    KEY_TILES: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)  # with it there may be over 2^31 values
    tile = tl.program_id(1)
    slot = tl.load(slots + token)
    row = qkv + token * qkv_token

    if tile >= QUERY_TILES + KEY_TILES:
        if slot >= 0:
            head = (tile - (QUERY_TILES + KEY_TILES)) * TILE + tl.arange(0, TILE)
            _move(
                row + (HEADS + KV_HEADS) * DIM,
                head,
                head < KV_HEADS,
                values,
                _place(head, slot, values_head, values_page, values_slot, BLOCK_SIZE),
                value_scale,
                DIM,
                DIM_PADDED,
                SCALED,
                LARGEST,
            )
    else:
        is_query = tile < QUERY_TILES
        first = tl.where(is_query, tile * TILE, HEADS + (tile - QUERY_TILES) * TILE)
        head = first + tl.arange(0, TILE)
        inside = head < tl.where(is_query, HEADS, HEADS + KV_HEADS)
        lane = tl.arange(0, HALF_PADDED)
        held = inside[:, None] & (lane < HALF)[None, :]
        within = head[:, None] * DIM + lane[None, :]
        a = tl.load(row + within, mask=held, other=0.0).to(tl.float32)
        b = tl.load(row + within + HALF, mask=held, other=0.0).to(tl.float32)
        if HALF * 2 < DIM:
            last = tl.arange(0, REST_PADDED)
            rest_held = inside[:, None] & (last < DIM - 2 * HALF)[None, :]
            rest_within = head[:, None] * DIM + 2 * HALF + last[None, :]
            rest = tl.load(row + rest_within, mask=rest_held, other=0.0).to(tl.float32)
        if NORM:
            squares = tl.sum(a * a + b * b, 1)
            if HALF * 2 < DIM:
                squares += tl.sum(rest * rest, 1)
            inverse = tl.rsqrt(squares / DIM + eps)[:, None]
            a = a * inverse * tl.load(norm + within, mask=held, other=0.0)
            b = b * inverse * tl.load(norm + within + HALF, mask=held, other=0.0)
            if HALF * 2 < DIM:
                rest = rest * inverse * tl.load(norm + rest_within, mask=rest_held, other=0.0)
        if ROTATE:
            # Of every head at once: so loaded, they lie as the heads do, and none changes place.
            angle = token * cos_token + lane[None, :] + tl.zeros([TILE, 1], tl.int64)
            cosine = tl.load(cos + angle, mask=held, other=0.0)
            sine = tl.load(sin + angle, mask=held, other=0.0)
            a, b = a * cosine - b * sine, b * cosine + a * sine
        if is_query:
            tl.store(row + within, a.to(qkv.dtype.element_ty), mask=held)
            tl.store(row + within + HALF, b.to(qkv.dtype.element_ty), mask=held)
            if NORM and HALF * 2 < DIM:
                tl.store(row + rest_within, rest.to(qkv.dtype.element_ty), mask=rest_held)
        elif slot >= 0:
            own = head - HEADS
            start = _place(own, slot, keys_head, keys_page, keys_slot, BLOCK_SIZE)
            to = keys + start[:, None] + lane[None, :]
            a = _as_stored(a, key_scale, own, inside, SCALED, LARGEST)
            b = _as_stored(b, key_scale, own, inside, SCALED, LARGEST)
            tl.store(to, a.to(keys.dtype.element_ty), mask=held)
            tl.store(to + HALF, b.to(keys.dtype.element_ty), mask=held)
            if HALF * 2 < DIM:
                rest = _as_stored(rest, key_scale, own, inside, SCALED, LARGEST)
                to = keys + start[:, None] + 2 * HALF + last[None, :]
                tl.store(to, rest.to(keys.dtype.element_ty), mask=rest_held)


@triton.jit
def _store_kernel(
    key: tl.tensor,  # [tokens, KV_HEADS, DIM]
    value: tl.tensor,  # [tokens, KV_HEADS, DIM]
    keys: tl.tensor,  # [KV_HEADS, pages, BLOCK_SIZE, DIM]
    values: tl.tensor,  # [KV_HEADS, pages, BLOCK_SIZE, DIM]
    key_scale: tl.tensor,  # [KV_HEADS] float32, if SCALED
    value_scale: tl.tensor,  # [KV_HEADS] float32, if SCALED
    slots: tl.tensor,  # [tokens] int64
    key_token: tl.tensor,
    value_token: tl.tensor,
    keys_head: tl.tensor,
    keys_page: tl.tensor,
    keys_slot: tl.tensor,
    values_head: tl.tensor,
    values_page: tl.tensor,
    values_slot: tl.tensor,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SCALED: tl.constexpr,
    TILE: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)  # with it there may be over 2^31 values
    slot = tl.load(slots + token)
    if slot >= 0:
        head = tl.program_id(1) * TILE + tl.arange(0, TILE)
        inside = head < KV_HEADS
        _move(
            key + token * key_token,
            head,
            inside,
            keys,
            _place(head, slot, keys_head, keys_page, keys_slot, BLOCK_SIZE),
            key_scale,
            DIM,
            DIM_PADDED,
            SCALED,
            LARGEST,
        )
        _move(
            value + token * value_token,
            head,
            inside,
            values,
            _place(head, slot, values_head, values_page, values_slot, BLOCK_SIZE),
            value_scale,
            DIM,
            DIM_PADDED,
            SCALED,
            LARGEST,
        )


def prepare_qkv(
    qkv: Tensor,  # [tokens, heads + 2 kv_heads, head_dim]; queries are written
    kv_heads: int,
    norm: Tensor | None,  # [heads + kv_heads, head_dim] float32
    eps: float,
    angles: tuple[Tensor, Tensor] | None,  # cos and sin: [tokens, rotated / 2] float32
    keys: Tensor,  # [kv_heads, pages, block_size, head_dim]
    values: Tensor,  # [kv_heads, pages, block_size, head_dim]
    slots: Tensor,  # [tokens] int64
    key_scale: Tensor | None,  # [kv_heads] float32
    value_scale: Tensor | None,  # [kv_heads] float32
) -> None:
    """Norm and rotate queries in place, and keys on their way to the cache; store the values."""
    tokens, total, dim = qkv.shape
    heads = total - 2 * kv_heads
    _check_heads("qkv", qkv)
    _check_cache(keys, values, slots, key_scale, value_scale)
    if norm is not None and not (norm.is_contiguous() and norm.shape == (heads + kv_heads, dim)):
        raise ValueError(f"norm: must be [{heads + kv_heads}, {dim}] and contiguous")
    cos, sin = angles or (None, None)
    half = dim // 2
    if cos is not None and sin is not None:
        half = cos.shape[1]
        if cos.stride() != sin.stride() or cos.stride(1) != 1 or 2 * half > dim:
            raise ValueError(f"angles: cos and sin must lie alike, [tokens, at most {dim // 2}]")
    chosen = choose("prepare_qkv", qkv.device, dim=dim)
    tile = chosen["heads"]
    changed = norm is not None or cos is not None
    query_tiles = triton.cdiv(heads, tile) if changed else 0
    key_tiles = triton.cdiv(kv_heads, tile)
    if tokens == 0:
        return
    _prepare_kernel[(tokens, query_tiles + 2 * key_tiles)](
        qkv,
        norm,
        cos,
        sin,
        keys,
        values,
        key_scale,
        value_scale,
        slots,
        eps,
        qkv.stride(0),
        0 if cos is None else cos.stride(0),
        *keys.stride()[:3],
        *values.stride()[:3],
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        HALF=half,
        BLOCK_SIZE=keys.shape[2],
        NORM=norm is not None,
        ROTATE=cos is not None,
        SCALED=key_scale is not None,
        TILE=tile,
        QUERY_TILES=query_tiles,
        KEY_TILES=key_tiles,
        DIM_PADDED=triton.next_power_of_2(dim),
        HALF_PADDED=triton.next_power_of_2(half),
        REST_PADDED=triton.next_power_of_2(max(1, dim - 2 * half)),
        LARGEST=_LARGEST,
        num_warps=chosen["warps"],
    )


def kv_store(
    key: Tensor,  # [tokens, kv_heads, head_dim]
    value: Tensor,  # [tokens, kv_heads, head_dim]
    keys: Tensor,  # [kv_heads, pages, block_size, head_dim]
    values: Tensor,  # [kv_heads, pages, block_size, head_dim]
    slots: Tensor,  # [tokens] int64
    key_scale: Tensor | None,  # [kv_heads] float32
    value_scale: Tensor | None,  # [kv_heads] float32
) -> None:
    """Write a step's keys and values into the paged cache; see ``reference.kv_store``."""
    tokens, kv_heads, dim = key.shape
    _check_heads("key", key)
    _check_heads("value", value)
    _check_cache(keys, values, slots, key_scale, value_scale)
    chosen = choose("prepare_qkv", key.device, dim=dim)
    if tokens == 0:
        return
    _store_kernel[(tokens, triton.cdiv(kv_heads, chosen["heads"]))](
        key,
        value,
        keys,
        values,
        key_scale,
        value_scale,
        slots,
        key.stride(0),
        value.stride(0),
        *keys.stride()[:3],
        *values.stride()[:3],
        KV_HEADS=kv_heads,
        DIM=dim,
        BLOCK_SIZE=keys.shape[2],
        SCALED=key_scale is not None,
        TILE=chosen["heads"],
        DIM_PADDED=triton.next_power_of_2(dim),
        LARGEST=_LARGEST,
        num_warps=chosen["warps"],
    )


def _check_heads(name: str, x: Tensor) -> None:
    if x.stride()[1:] != (x.shape[2], 1):
        raise ValueError(f"{name}: the heads of a token must be contiguous")


def _check_cache(
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> None:
    for name, cache in (("keys", keys), ("values", values)):
        if cache.stride(3) != 1:
            raise ValueError(f"{name}: head_dim must be contiguous")
    if slots.dtype != torch.int64 or not slots.is_contiguous():
        raise ValueError("slots: must be int64 and contiguous")
    for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)):
        if scale is not None and (scale.dtype != torch.float32 or scale.shape != keys.shape[:1]):
            raise ValueError(f"{name}: must be [{keys.shape[0]}] float32")
