"""Decode attention over a paged cache, in Triton: one query a row, long rows split among programs.

For a row, a KV head and a part ``i`` of the row's visible slots ``S_i`` the first kernel computes

    s = scale * q k^T (capped to softcap * tanh(s / softcap) if asked)
    m_i = max s,   l_i = sum exp(s - m_i),   o_i = sum exp(s - m_i) v

and the second joins the parts: ``out = sum_i w_i o_i / sum_i w_i l_i``, ``w_i = exp(m_i - max m)``
(Flash-Decoding: Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). All
query heads of a KV head are rows of one tile, so each key and value is read once. An attention sink
is a slot of the first part whose value is 0. Of an FP8 cache keys and values become float16, which
holds each of them exactly, and their scales go into ``scale`` and into ``o_i``.

The launch depends on the number of rows alone; ``decode_parts`` says which part is a program's own.
A row that is not split is written at once. Programs beyond the last part return.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from forebay_kernels.batch import PagedBatch
from forebay_kernels.gpu.decode_parts import MOST_PARTS, find, join, low_of, tiles_of
from forebay_kernels.gpu.tuning import choose

#: Rows that a matrix instruction takes at least; smaller groups are padded.
_LEAST_ROWS = 16
#: Lengths that a program reads at once.
_ROWS = 256


@triton.jit
def _pages(
    table: tl.tensor,  # [max_pages] int32
    start: tl.tensor,
    end: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Where the tile from ``start`` on lies: one page if pages hold whole tiles, or one a slot."""
    position = start
    if BLOCK_SIZE % TILE:
        position = start + tl.arange(0, TILE)
    return tl.load(table + position // BLOCK_SIZE, mask=position < end, other=0).to(tl.int64)


@triton.jit
def _exponents(
    s: tl.tensor,  # [group, tile] float32: q k^T
    scale: tl.tensor,
    softcap: tl.tensor,
    SOFTCAP: tl.constexpr,
    LOG2_E: tl.constexpr,
) -> tl.tensor:
    """Scores as exponents of 2: exp2 is one instruction, exp a multiplication more."""
    if SOFTCAP:
        # tanh from exp(-2 |x|), which cannot overflow.
        s *= scale / softcap
        decay = tl.exp2(-2.0 * LOG2_E * tl.abs(s))
        limit = softcap * LOG2_E
        s = tl.where(s < 0.0, -limit, limit) * (1.0 - decay) / (1.0 + decay)
    else:
        s *= scale * LOG2_E
    return s


@triton.jit
def _e4m3(bits: tl.tensor) -> tl.tensor:
    """The low byte of each as an FP8 number."""
    return bits.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)


@triton.jit
def _write(
    o: tl.tensor,  # [group, lanes] float32
    parts: tl.tensor,
    out: tl.tensor,  # pointers [group, lanes]
    partial: tl.tensor,  # pointers [group, lanes] float32
    mask: tl.tensor,
) -> None:
    if parts == 1:
        tl.store(out, o.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(partial, o, mask=mask)


@triton.jit(do_not_specialize=["rows", "parts_aim", "tables_row"])
def _split_kernel(
    query: tl.tensor,  # [rows, heads, dim]
    keys: tl.tensor,  # [kv_heads, pages, block_size, dim]
    values: tl.tensor,  # [kv_heads, pages, block_size, dim]
    block_tables: tl.tensor,  # [rows, max_pages] int32
    lengths: tl.tensor,  # [rows] int32
    sinks: tl.tensor | None,  # [heads]
    key_scale: tl.tensor | None,  # [kv_heads] float32
    value_scale: tl.tensor | None,  # [kv_heads] float32
    out: tl.tensor,  # [rows, heads, dim]
    partial: tl.tensor,  # [programs, heads, dim] float32: o_i
    highest: tl.tensor,  # [programs, heads] float32: m_i, in powers of two
    total: tl.tensor,  # [programs, heads] float32: l_i
    spans: tl.tensor,  # [rows, 2] int32: the program of a row's first part, and its parts
    rows: tl.tensor,
    parts_aim: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    query_row: tl.tensor,
    query_head: tl.tensor,
    out_row: tl.tensor,
    out_head: tl.tensor,
    cache_head: tl.tensor,
    cache_page: tl.tensor,
    cache_slot: tl.tensor,
    tables_row: tl.tensor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    SOFTCAP: tl.constexpr,
    FP8: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    MOST_PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    LOG2_E: tl.constexpr,
) -> None:
    kv_head = tl.program_id(0)
    program = tl.program_id(1)
    row, first, parts = find(program, lengths, rows, parts_aim, TILE, WINDOW, MOST_PARTS, ROWS)
    if row >= rows:
        return
    part = program - first
    if (kv_head == 0) & (part == 0):
        tl.store(spans + 2 * row, first)
        tl.store(spans + 2 * row + 1, parts)

    length = tl.load(lengths + row)
    low = low_of(length, WINDOW)
    tiles = tiles_of(length, TILE, WINDOW)
    begin = (low // TILE + part * tiles // parts) * TILE
    end = tl.minimum((low // TILE + (part + 1) * tiles // parts) * TILE, length)

    member = tl.arange(0, GROUP_PADDED)
    head = kv_head * GROUP + member
    in_group = member < GROUP
    lane = tl.arange(0, DIM_PADDED)
    in_dim = lane < DIM
    q = tl.load(  # [GROUP_PADDED, DIM_PADDED]
        query + row * query_row + head[:, None] * query_head + lane[None, :],
        mask=in_group[:, None] & in_dim[None, :],
        other=0.0,
    )
    if key_scale is not None:
        scale *= tl.load(key_scale + kv_head)

    column = tl.arange(0, TILE)
    m = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    # A sum for each column of a tile: adding them up once saves two barriers a tile.
    l = tl.zeros([GROUP_PADDED, TILE], tl.float32)  # noqa: E741 - the name in the formula
    if sinks is not None:
        m = tl.load(sinks + head, mask=in_group, other=0.0).to(tl.float32) * LOG2_E
        l += tl.where((column == 0) & (part == 0), 1.0, 0.0)[None, :]  # noqa: E741
    if FP8:
        # A matrix instruction takes values of neighbouring slots in one register, and only pairs of
        # bytes can be turned while they are loaded: values of even and odd dims apart.
        q = q.to(tl.float16)
        pairs = values.to(tl.pointer_type(tl.int16))
        pair_lane = tl.arange(0, DIM_PADDED // 2)
        in_pairs = pair_lane < DIM // 2
        o = tl.zeros([GROUP_PADDED, DIM_PADDED // 2], tl.float32)
        o_odd = tl.zeros([GROUP_PADDED, DIM_PADDED // 2], tl.float32)
    else:
        o = tl.zeros([GROUP_PADDED, DIM_PADDED], tl.float32)

    cache = kv_head.to(tl.int64) * cache_head  # with it a cache may be over 2^31 values
    table = block_tables + row * tables_row
    # The pages of a tile are loaded one tile ahead: the loads of its slots wait for nothing, and
    # so the compiler keeps several tiles of them under way.
    page = _pages(table, begin, end, BLOCK_SIZE, TILE)
    for start in range(begin, end, TILE):
        position = start + column
        held = position < end
        if WINDOW > 0:
            held &= position >= low
        slot = cache + page * cache_page + position % BLOCK_SIZE * cache_slot
        page = _pages(table, start + TILE, end, BLOCK_SIZE, TILE)
        # Slots that are not held are never loaded: they may hold NaN, which no weight removes.
        k = tl.load(  # [TILE, DIM_PADDED]
            keys + slot[:, None] + lane[None, :],
            mask=held[:, None] & in_dim[None, :],
            other=0.0,
        )
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)  # [GROUP_PADDED, TILE]
        s = _exponents(s, scale, softcap, SOFTCAP, LOG2_E)
        s = tl.where(held[None, :], s, float("-inf"))
        m_next = tl.maximum(m, tl.max(s, 1))  # finite: each tile holds a slot
        p = tl.exp2(s - m_next[:, None])
        shrink = tl.exp2(m - m_next)[:, None]
        l = l * shrink + p  # noqa: E741 - the name in the formula
        m = m_next
        if FP8:
            pair = tl.load(  # [TILE, DIM_PADDED / 2]
                pairs + (slot // 2)[:, None] + pair_lane[None, :],
                mask=held[:, None] & in_pairs[None, :],
                other=0,
            )
            o = tl.dot(p.to(q.dtype), _e4m3(pair), o * shrink)
            o_odd = tl.dot(p.to(q.dtype), _e4m3(pair >> 8), o_odd * shrink)
        else:
            v = tl.load(  # [TILE, DIM_PADDED]
                values + slot[:, None] + lane[None, :],
                mask=held[:, None] & in_dim[None, :],
                other=0.0,
            )
            o = tl.dot(p.to(v.dtype), v, o * shrink, input_precision=PRECISION)

    whole = tl.sum(l, 1)
    place = program * HEADS + head
    if parts > 1:
        tl.store(highest + place, m, mask=in_group)
        tl.store(total + place, whole, mask=in_group)
    # A row that is not split is finished here; one of length 0 has no sum, and gets zeros.
    unit = tl.where(parts > 1, 1.0, 1.0 / tl.where(whole > 0.0, whole, 1.0))
    if value_scale is not None:
        unit *= tl.load(value_scale + kv_head)
    o *= unit[:, None]
    to_out = (out + row * out_row + head * out_head)[:, None]
    to_partial = (partial + place * DIM)[:, None]
    if FP8:
        mask = in_group[:, None] & in_pairs[None, :]
        even = 2 * pair_lane[None, :]
        o_odd *= unit[:, None]
        _write(o, parts, to_out + even, to_partial + even, mask)
        _write(o_odd, parts, to_out + even + 1, to_partial + even + 1, mask)
    else:
        mask = in_group[:, None] & in_dim[None, :]
        _write(o, parts, to_out + lane[None, :], to_partial + lane[None, :], mask)


def decode_attention(
    query: Tensor,  # [tokens, heads, head_dim]: the first ``num_decodes`` are computed
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
    """Write the decode rows' attention to ``out``; see ``reference.paged_attention``."""
    rows, heads, dim = batch.num_decodes, query.shape[1], query.shape[2]
    kv_heads, _, block_size, _ = keys.shape
    fp8 = keys.dtype == torch.float8_e4m3fn
    for name, tensor in (("query", query), ("keys", keys), ("values", values), ("out", out)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}: head_dim must be contiguous")
    if values.stride() != keys.stride():
        raise ValueError("values: strides must be those of keys")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads")
    if fp8 and any(stride % 2 for stride in keys.stride()[:3]):
        raise ValueError("keys: of an FP8 cache the strides must be even, and head_dim so too")
    if rows == 0:
        return
    dim_padded = max(16, triton.next_power_of_2(dim))
    group = heads // kv_heads
    chosen = choose(
        "decode_attention",
        query.device,
        group=group,
        slot_bytes=dim_padded * keys.element_size(),
    )
    # Of shapes and bounds alone: a captured graph replays this launch with other lengths.
    most_tiles = rows * -(-max(batch.seq_lens[:rows]) // chosen["tile"])
    parts_aim = max(1, min(-(-chosen["programs"] // kv_heads), most_tiles))
    programs = parts_aim + rows  # splitting rows evenly needs at most one more for each
    partial, highest, total = (
        torch.empty((programs, heads, *more), dtype=torch.float32, device=query.device)
        for more in ((dim,), (), ())
    )
    spans = torch.empty((rows, 2), dtype=torch.int32, device=query.device)
    _split_kernel[(kv_heads, programs)](
        query,
        keys,
        values,
        batch.block_tables,
        batch.lengths,
        sinks,
        key_scale,
        value_scale,
        out,
        partial,
        highest,
        total,
        spans,
        rows,
        parts_aim,
        scale,
        softcap or 0.0,
        *query.stride()[:2],
        *out.stride()[:2],
        *keys.stride()[:3],
        batch.block_tables.stride(0),
        HEADS=heads,
        GROUP=group,
        DIM=dim,
        BLOCK_SIZE=block_size,
        WINDOW=window or 0,
        SOFTCAP=softcap is not None,
        FP8=fp8,
        GROUP_PADDED=max(_LEAST_ROWS, triton.next_power_of_2(group)),
        DIM_PADDED=dim_padded,
        TILE=chosen["tile"],
        MOST_PARTS=MOST_PARTS,
        ROWS=_ROWS,
        # Full float32: the default rounds its factors to 10 bits of mantissa.
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        LOG2_E=math.log2(math.e),
        num_warps=chosen["warps"],
        num_stages=chosen["stages"],
    )
    join(partial, highest, total, spans, out)
