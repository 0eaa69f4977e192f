"""Decode attention over a paged cache, in Triton: one query a row, its keys split among programs.

For a row, a KV head and a share ``i`` of the row's visible slots ``S_i`` the first kernel computes

    s = scale * q k^T (capped to softcap * tanh(s / softcap) if asked)
    m_i = max s,   l_i = sum exp(s - m_i),   o_i = sum exp(s - m_i) v

and the second joins the shares: ``out = sum_i w_i o_i / sum_i w_i l_i``, ``w_i = exp(m_i - max m)``
(Flash-Decoding: Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). All
query heads of a KV head are rows of one tile, so each key and value is read once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from forebay_kernels.batch import PagedBatch
from forebay_kernels.gpu.tuning import choose

#: Rows that a matrix instruction takes at least; smaller groups are padded.
_LEAST_ROWS = 16
#: Programs that fill the device: two for each of an H200's 132 multiprocessors.
_PROGRAMS = 264
#: Shares of one row at most, so that joining them stays cheap.
_MOST_SPLITS = 32


@triton.jit
def _split_kernel(
    query: tl.tensor,  # [rows, heads, dim]
    keys: tl.tensor,  # [kv_heads, pages, block_size, dim]
    values: tl.tensor,  # [kv_heads, pages, block_size, dim]
    block_tables: tl.tensor,  # [rows, max_pages] int32
    lengths: tl.tensor,  # [rows] int32
    partial: tl.tensor,  # [rows, heads, splits, dim] float32: o_i
    highest: tl.tensor,  # [rows, heads, splits] float32: m_i, in powers of two
    total: tl.tensor,  # [rows, heads, splits] float32: l_i
    scale: tl.tensor,
    softcap: tl.tensor,
    query_row: tl.tensor,
    query_head: tl.tensor,
    keys_head: tl.tensor,
    keys_page: tl.tensor,
    keys_slot: tl.tensor,
    values_head: tl.tensor,
    values_page: tl.tensor,
    values_slot: tl.tensor,
    tables_row: tl.tensor,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    SOFTCAP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    LOG2_E: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)  # with it a cache may be over 2^31 values
    split = tl.program_id(2)

    length = tl.load(lengths + row)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(length - WINDOW, 0)
    share = tl.cdiv(tl.cdiv(length - low, TILE), SPLITS) * TILE
    begin = low + split * share
    end = tl.minimum(begin + share, length)

    member = tl.arange(0, GROUP_PADDED)
    head = kv_head * GROUP + member
    lane = tl.arange(0, DIM_PADDED)
    in_group = member < GROUP
    in_dim = lane < DIM
    q = tl.load(  # [GROUP_PADDED, DIM_PADDED]
        query + row * query_row + head[:, None] * query_head + lane[None, :],
        mask=in_group[:, None] & in_dim[None, :],
        other=0.0,
    )

    m = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    l = tl.zeros([GROUP_PADDED], tl.float32)  # noqa: E741 - the name in the formula
    o = tl.zeros([GROUP_PADDED, DIM_PADDED], tl.float32)
    for start in range(begin, end, TILE):
        position = start + tl.arange(0, TILE)
        held = position < end
        page = tl.load(
            block_tables + row * tables_row + position // BLOCK_SIZE, mask=held, other=0
        ).to(tl.int64)
        slot = position % BLOCK_SIZE
        # Slots that are not held are never loaded: they may hold NaN, which no weight removes.
        wanted = held[:, None] & in_dim[None, :]
        k = tl.load(  # [TILE, DIM_PADDED]
            keys
            + kv_head * keys_head
            + page[:, None] * keys_page
            + slot[:, None] * keys_slot
            + lane[None, :],
            mask=wanted,
            other=0.0,
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [GROUP_PADDED, TILE]
        if SOFTCAP:
            # tanh from exp(-2 |x|), which cannot overflow.
            decay = tl.exp2(-2.0 * LOG2_E * tl.abs(s / softcap))
            s = tl.where(s < 0.0, -softcap, softcap) * (1.0 - decay) / (1.0 + decay)
        s = tl.where(held[None, :], s * LOG2_E, float("-inf"))
        m_next = tl.maximum(m, tl.max(s, 1))  # finite: each tile holds a slot
        p = tl.exp2(s - m_next[:, None])
        shrink = tl.exp2(m - m_next)
        v = tl.load(  # [TILE, DIM_PADDED]
            values
            + kv_head * values_head
            + page[:, None] * values_page
            + slot[:, None] * values_slot
            + lane[None, :],
            mask=wanted,
            other=0.0,
        )
        l = l * shrink + tl.sum(p, 1)  # noqa: E741 - the name in the formula
        o = o * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        m = m_next

    place = (row * HEADS + head) * SPLITS + split
    tl.store(highest + place, m, mask=in_group)
    tl.store(total + place, l, mask=in_group)
    tl.store(
        partial + place[:, None] * DIM + lane[None, :],
        o,
        mask=in_group[:, None] & in_dim[None, :],
    )


@triton.jit
def _join_kernel(
    partial: tl.tensor,  # [rows, heads, splits, dim] float32
    highest: tl.tensor,  # [rows, heads, splits] float32
    total: tl.tensor,  # [rows, heads, splits] float32
    out: tl.tensor,  # [rows, heads, dim]
    out_row: tl.tensor,
    out_head: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    head = tl.program_id(1)
    place = (row * HEADS + head) * SPLITS
    split = tl.arange(0, SPLITS_PADDED)
    lane = tl.arange(0, DIM_PADDED)
    in_dim = lane < DIM

    m = tl.load(highest + place + split, mask=split < SPLITS, other=float("-inf"))
    top = tl.max(m, 0)
    # A row without slots has no maximum; its weights are 0 and so is its output.
    weight = tl.exp2(m - tl.where(top == float("-inf"), 0.0, top))
    whole = tl.sum(weight * tl.load(total + place + split, mask=split < SPLITS, other=0.0), 0)
    o = tl.load(  # [SPLITS_PADDED, DIM_PADDED]
        partial + (place + split)[:, None] * DIM + lane[None, :],
        mask=(split < SPLITS)[:, None] & in_dim[None, :],
        other=0.0,
    )
    joined = tl.sum(weight[:, None] * o, 0) / tl.where(whole > 0.0, whole, 1.0)
    tl.store(
        out + row * out_row + head * out_head + lane,
        joined.to(out.dtype.element_ty),
        mask=in_dim,
    )


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
    splits: int | None = None,
) -> None:
    """Write the decode rows' attention to ``out``; see ``reference.paged_attention``.

    ``splits`` programs share a row's slots; None: as many as fill the device.
    """
    rows, heads, dim = batch.num_decodes, query.shape[1], query.shape[2]
    kv_heads, _, block_size, _ = keys.shape
    for name, tensor in (("query", query), ("keys", keys), ("values", values), ("out", out)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}: head_dim must be contiguous")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads")
    if rows == 0:
        return
    chosen = choose("decode_attention", query.device, dim=dim)
    tile = chosen["tile"]
    splits = splits or _splits(max(batch.seq_lens[:rows]), rows * kv_heads, window, tile)
    group = heads // kv_heads
    partial = torch.empty((rows, heads, splits, dim), dtype=torch.float32, device=query.device)
    highest, total = torch.empty((2, rows, heads, splits), dtype=torch.float32, device=query.device)
    _split_kernel[(rows, kv_heads, splits)](
        query,
        keys,
        values,
        batch.block_tables,
        batch.lengths,
        partial,
        highest,
        total,
        scale,
        softcap or 0.0,
        *query.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        batch.block_tables.stride(0),
        HEADS=heads,
        GROUP=group,
        DIM=dim,
        BLOCK_SIZE=block_size,
        SPLITS=splits,
        WINDOW=window or 0,
        SOFTCAP=softcap is not None,
        GROUP_PADDED=max(_LEAST_ROWS, triton.next_power_of_2(group)),
        DIM_PADDED=max(16, triton.next_power_of_2(dim)),
        TILE=tile,
        # Full float32: the default rounds its factors to 10 bits of mantissa.
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        LOG2_E=math.log2(math.e),
        num_warps=chosen["warps"],
        num_stages=chosen["stages"],
    )
    _join_kernel[(rows, heads)](
        partial,
        highest,
        total,
        out,
        *out.stride()[:2],
        HEADS=heads,
        DIM=dim,
        SPLITS=splits,
        DIM_PADDED=max(16, triton.next_power_of_2(dim)),
        SPLITS_PADDED=triton.next_power_of_2(splits),
    )


def _splits(longest: int, programs: int, window: int | None, tile: int) -> int:
    """Shares of a row that fill the device, none of them without a tile."""
    seen = longest if window is None else min(longest, window)
    tiles = -(-seen // tile)
    return max(1, min(-(-_PROGRAMS // programs), tiles, _MOST_SPLITS))
