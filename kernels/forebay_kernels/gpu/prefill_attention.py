"""Attention of rows of several tokens over a paged cache, in Triton: chunks of prompts, guesses.

A program takes ``ROWS`` queries of a row and a KV head: the row's tokens times the query heads that
share the KV head, flattened. So each key is read once for a whole group, short rows fill a matrix
instruction, and no group size wastes any. Over tiles of the visible slots it keeps

    s = scale * q k^T (capped to softcap * tanh(s / softcap) if asked)
    m' = max(m, max s),   l' = l e^(m - m') + sum e^(s - m'),   o' = o e^(m - m') + e^(s - m') v

and ends with ``out = o / l`` (FlashAttention-2: https://arxiv.org/abs/2307.08691). Slots that all
the program's queries see take a loop without masks; the diagonal, and a window's edge, take one
with masks and half the tile. Rows too long for one program share their slots among several, whose
results the decode kernel's second step joins.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from forebay_kernels.batch import PagedBatch
from forebay_kernels.gpu.decode_parts import join
from forebay_kernels.gpu.prefill_plan import Plan, plan_prefill
from forebay_kernels.gpu.prefill_tiles import load_tile, tile_pages
from forebay_kernels.gpu.tuning import choose


@triton.jit
def _attend(
    q: tl.tensor,  # [ROWS, DIM_PADDED]
    position: tl.tensor,  # [ROWS] int32
    m: tl.tensor,  # [ROWS] float32, in powers of two
    l: tl.tensor,  # [ROWS] float32  # noqa: E741 - the name in the formula
    o: tl.tensor,  # [ROWS, DIM_PADDED] float32
    keys: tl.tensor,  # [pages, block_size, dim]
    values: tl.tensor,  # [pages, block_size, dim]
    table: tl.tensor,  # [max_pages] int32
    begin: tl.tensor,
    stop: tl.tensor,
    low: tl.tensor,  # first slot that a query of the tile sees
    factor: tl.tensor,
    cap: tl.tensor,
    PAGE: tl.constexpr,  # elements of a head's keys, and values, from page to page
    SLOT: tl.constexpr,  # and from slot to slot
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """``m``, ``l`` and ``o`` with the slots ``begin .. stop`` added."""
    page = tile_pages(table, begin, stop, BLOCK_SIZE, TILE, MASKED)
    for start in range(begin, stop, TILE):
        k = load_tile(
            keys, page, start, low, stop, PAGE, SLOT,
            BLOCK_SIZE, DIM, DIM_PADDED, TILE, MASKED,
        )  # fmt: skip
        v = load_tile(
            values, page, start, low, stop, PAGE, SLOT,
            BLOCK_SIZE, DIM, DIM_PADDED, TILE, MASKED,
        )  # fmt: skip
        # A tile ahead: else the loads above would wait for it, and not be pipelined.
        page = tile_pages(table, start + TILE, stop, BLOCK_SIZE, TILE, MASKED)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)  # [ROWS, TILE]
        if SOFTCAP:
            # tanh(x) = 1 - 2 / (e^2x + 1), which is 1 long before 2^126, the largest there is.
            s = cap - 2.0 * cap / (tl.exp2(tl.minimum(s * factor, 126.0)) + 1.0)
        if MASKED:
            column = start + tl.arange(0, TILE)
            seen = (column[None, :] <= position[:, None]) & (column < stop)[None, :]
            if WINDOW > 0:
                seen = seen & (column[None, :] > position[:, None] - WINDOW)
            s = tl.where(seen, s, float("-inf"))
        if SOFTCAP:
            m_next = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2(s - m_next[:, None])
        else:
            m_next = tl.maximum(m, tl.max(s, 1) * factor)
            # Said outright: whether a product and a sum become one is the compiler's choice.
            p = tl.exp2(tl.fma(s, factor, -m_next[:, None]))
        shrink = tl.exp2(m - m_next)
        l = l * shrink + tl.sum(p, 1)  # noqa: E741 - the name in the formula
        o = tl.dot(p.to(q.dtype), v.to(q.dtype), o * shrink[:, None], input_precision=PRECISION)
        m = m_next
    return m, l, o


@triton.jit(  # what changes from step to step: a kernel for 1, for 16 and so on is not wanted
    do_not_specialize=["first_row", "first_token", "row_count", "splits", "tables_row"]
)
def _prefill_kernel(
    query: tl.tensor,  # [tokens, heads, dim]
    keys: tl.tensor,  # [kv_heads, pages, block_size, dim]
    values: tl.tensor,  # [kv_heads, pages, block_size, dim]
    out: tl.tensor,  # [tokens, heads, dim]
    block_tables: tl.tensor,  # [rows, max_pages] int32
    lengths: tl.tensor,  # [rows] int32
    sinks: tl.tensor,  # [heads], or None
    key_scale: tl.tensor,  # [kv_heads] float32, or None
    value_scale: tl.tensor,  # [kv_heads] float32, or None
    items: tl.tensor,  # [items, 6] int32: row, token, count, tile, share, place; None: uniform
    partial: tl.tensor,  # [places * splits, heads, dim] float32: o; None: no row is shared
    highest: tl.tensor,  # [places * splits, heads] float32: m
    total: tl.tensor,  # [places * splits, heads] float32: l
    spans: tl.tensor,  # [places, 2] int32: where a token's shares begin, and how many there are
    scale: tl.tensor,
    softcap: tl.tensor,
    first_row: tl.tensor,  # these three: where uniform rows begin, and the tokens of each
    first_token: tl.tensor,
    row_count: tl.tensor,
    splits: tl.tensor,
    query_token: tl.tensor,
    query_head: tl.tensor,
    cache_head: tl.tensor,
    out_token: tl.tensor,
    out_head: tl.tensor,
    tables_row: tl.tensor,
    PAGE: tl.constexpr,  # elements of a head's keys, and values, from page to page
    SLOT: tl.constexpr,  # and from slot to slot
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    SOFTCAP: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    EDGE: tl.constexpr,  # a tile with masks: divides TILE
    PRECISION: tl.constexpr,
    LOG2_E: tl.constexpr,
) -> None:
    # Heads change fastest: the heaviest tiles of all of them start first, and programs that run
    # together read the same few heads' keys.
    kv_head = (tl.program_id(0) % (HEADS // GROUP)).to(tl.int64)
    number = tl.program_id(0) // (HEADS // GROUP)
    if items is None:
        tiles = tl.cdiv(row_count * GROUP, ROWS)
        share = number % splits
        tile = number // splits % tiles
        nth_row = number // splits // tiles
        row = first_row + nth_row
        token = first_token + nth_row * row_count
        count = row_count
        place = nth_row * row_count
        shares = splits
    else:
        item = items + number * 6
        row = tl.load(item)
        token = tl.load(item + 1)
        count = tl.load(item + 2)
        tile = tl.load(item + 3)
        share = tl.load(item + 4)
        place = tl.load(item + 5)
        shares = tl.where(place < 0, 1, splits)

    length = tl.load(lengths + row)
    nth = (tile * ROWS + tl.arange(0, ROWS)) // GROUP  # token of the row
    head = kv_head * GROUP + (tile * ROWS + tl.arange(0, ROWS)) % GROUP
    lane = tl.arange(0, DIM_PADDED)
    q = tl.load(
        query
        + (token + nth).to(tl.int64)[:, None] * query_token
        + head[:, None] * query_head
        + lane[None, :],
        mask=(nth < count)[:, None] & (lane < DIM)[None, :],
        other=0.0,
    )
    if (keys.dtype.element_ty != q.dtype) & (q.dtype == tl.bfloat16):
        # float8 becomes float16 in one instruction for two, bfloat16 in eight.
        q = q.to(tl.float16)

    # What the tile sees is low .. last; this share of it begin .. stop.
    before = length - count
    first = before + tile * ROWS // GROUP
    last = tl.minimum(before + (tile * ROWS + ROWS - 1) // GROUP, length - 1)
    low = tl.maximum(first - WINDOW + 1, 0) if WINDOW > 0 else 0
    origin = low // TILE * TILE
    each = tl.cdiv(tl.cdiv(last + 1 - origin, TILE), shares) * TILE
    begin = origin + share * each
    stop = tl.minimum(begin + each, last + 1)
    begin = tl.maximum(begin, low // EDGE * EDGE)
    diagonal = tl.minimum(tl.maximum((first + 1) // TILE * TILE, begin), stop)

    if key_scale is not None:
        scale *= tl.load(key_scale + kv_head)
    factor = scale * LOG2_E
    cap = softcap * LOG2_E
    if SOFTCAP:
        factor = 2.0 * factor / softcap
    # Lower than any score, and finite: a row that sees nothing of a tile must not get inf - inf.
    m = tl.full([ROWS], -3e38, tl.float32)
    l = tl.zeros([ROWS], tl.float32)  # noqa: E741 - the name in the formula
    o = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        m = tl.where(share == 0, tl.maximum(m, sink), m)
        l += tl.where(share == 0, 1.0, 0.0)  # noqa: E741

    position = before + nth
    table = block_tables + row.to(tl.int64) * tables_row
    keys += kv_head * cache_head
    values += kv_head * cache_head
    if WINDOW > 0:
        edge = tl.maximum(tl.cdiv(last - WINDOW + 1, TILE) * TILE, begin)
        edge = tl.minimum(edge, diagonal)
        m, l, o = _attend(  # noqa: E741
            q, position, m, l, o, keys, values, table, begin, edge, low, factor, cap,
            PAGE, SLOT, BLOCK_SIZE, DIM, DIM_PADDED,
            EDGE, WINDOW, SOFTCAP, PRECISION, True,
        )  # fmt: skip
        begin = edge
    m, l, o = _attend(  # noqa: E741
        q, position, m, l, o, keys, values, table, begin, diagonal, low, factor, cap,
        PAGE, SLOT, BLOCK_SIZE, DIM, DIM_PADDED,
        TILE, WINDOW, SOFTCAP, PRECISION, False,
    )  # fmt: skip
    m, l, o = _attend(  # noqa: E741
        q, position, m, l, o, keys, values, table, diagonal, stop, low, factor, cap,
        PAGE, SLOT, BLOCK_SIZE, DIM, DIM_PADDED,
        EDGE, WINDOW, SOFTCAP, PRECISION, True,
    )  # fmt: skip

    if value_scale is not None:
        o *= tl.load(value_scale + kv_head)
    if items is not None:
        # Read again: places kept from the load of the queries cost 24 registers in the loops.
        tile = tl.load(items + number * 6 + 3, volatile=True)
    nth = (tile * ROWS + tl.arange(0, ROWS)) // GROUP
    member = (tile * ROWS + tl.arange(0, ROWS)) % GROUP
    head = kv_head * GROUP + member
    in_dim = (lane < DIM)[None, :]
    joined = 0  # tokens of the row that are joined later
    if partial is not None:
        at = (place + nth) * splits
        spanned = tl.where((place >= 0) & (share == 0) & (kv_head == 0), count, 0)
        once = (nth < spanned) & (member == 0)
        tl.store(spans + 2 * (place + nth), at, mask=once)
        tl.store(spans + 2 * (place + nth) + 1, tl.where(length > 0, splits, 1), mask=once)
        # A row of length 0 has nothing to join, and is written as zeros.
        joined = tl.where((place >= 0) & (length > 0), count, 0)
        at = (at + share) * HEADS + head
        tl.store(highest + at, m, mask=nth < joined)
        tl.store(total + at, l, mask=nth < joined)
        mask = (nth < joined)[:, None] & in_dim
        tl.store(partial + at[:, None] * DIM + lane[None, :], o, mask=mask)
    tl.store(
        out
        + (token + nth).to(tl.int64)[:, None] * out_token
        + head[:, None] * out_head
        + lane[None, :],
        (o / tl.where(l > 0.0, l, 1.0)[:, None]).to(out.dtype.element_ty),
        mask=((nth >= joined) & (nth < count))[:, None] & in_dim,
    )


def prefill_attention(
    query: Tensor,  # [tokens, heads, head_dim]: those of rows from ``num_decodes`` on
    keys: Tensor,  # [kv_heads, pages, block_size, head_dim]
    values: Tensor,  # [kv_heads, pages, block_size, head_dim]
    out: Tensor,  # [tokens, heads, head_dim]
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [heads]
    key_scale: Tensor | None = None,  # [kv_heads] float32: what a stored key is multiplied by
    value_scale: Tensor | None = None,  # [kv_heads] float32
) -> None:
    """Write the attention of all rows behind the decode rows to ``out``.

    See ``reference.paged_attention``. A replayed step needs rows of as many tokens each.
    """
    heads, dim = query.shape[1:]
    kv_heads, _, block_size, _ = keys.shape
    for name, tensor in (("query", query), ("keys", keys), ("values", values), ("out", out)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}: head_dim must be contiguous")
    if values.stride() != keys.stride():
        raise ValueError("values: strides must be those of keys")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads")
    if scale <= 0:
        raise ValueError(f"scale: {scale} must be positive, as the largest score is scaled last")
    if batch.num_rows == batch.num_decodes:
        return
    dim_padded = max(16, triton.next_power_of_2(dim))
    group = heads // kv_heads
    first = batch.num_decodes
    longest = max(batch.query_len(row) for row in range(first, batch.num_rows))
    chosen = choose(
        "prefill_attention",
        query.device,
        dim=dim,
        queries=longest * group,
        bits=8 * keys.element_size(),
        softcap=int(softcap is not None),
    )
    plan = plan_prefill(batch, kv_heads, group, window, chosen)
    parts = _scratch(plan, heads, dim, query.device) if plan.runs else None
    _prefill_kernel[(plan.programs * kv_heads,)](
        query,
        keys,
        values,
        out,
        batch.block_tables,
        batch.lengths,
        sinks,
        key_scale,
        value_scale,
        plan.items,
        *(parts or (None,) * 4),
        scale,
        softcap or 0.0,
        first,
        batch.query_starts[first],
        batch.query_len(first),
        plan.splits,
        *query.stride()[:2],
        keys.stride(0),
        *out.stride()[:2],
        batch.block_tables.stride(0),
        PAGE=keys.stride(1),
        SLOT=keys.stride(2),
        HEADS=heads,
        GROUP=group,
        DIM=dim,
        BLOCK_SIZE=block_size,
        WINDOW=window or 0,
        SOFTCAP=softcap is not None,
        DIM_PADDED=dim_padded,
        ROWS=chosen["rows"],
        TILE=chosen["tile"],
        EDGE=chosen["edge"],
        # Full float32: the default rounds its factors to 10 bits of mantissa.
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        LOG2_E=math.log2(math.e),
        num_warps=chosen["warps"],
        num_stages=chosen["stages"],
    )
    if parts is not None:
        partial, highest, total, spans = parts
        for run in plan.runs:
            of_run = spans[run.place : run.place + run.tokens]
            join(partial, highest, total, of_run, out[run.token :])


def _scratch(
    plan: Plan, heads: int, dim: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernel's ``partial``, ``highest``, ``total`` and ``spans``."""
    size = (plan.places * plan.splits, heads)
    partial = torch.empty((*size, dim), dtype=torch.float32, device=device)
    highest, total = torch.empty((2, *size), dtype=torch.float32, device=device)
    return partial, highest, total, torch.empty((plan.places, 2), dtype=torch.int32, device=device)
