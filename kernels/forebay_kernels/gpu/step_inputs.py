"""What a step's model runs on, worked out on the device from a few words a row, in Triton.

``reference.step_inputs`` is the specification. The host sends no position, no slot and no block
table: a table of requests that stays on the device has their pages, and the last token that was
drawn for each, which the host may not know yet.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from forebay_kernels.gpu.tuning import choose


@triton.jit
def _inputs_kernel(
    places: tl.tensor,  # [rows] int32
    starts: tl.tensor,  # [rows] int32
    query_starts: tl.tensor,  # [rows + 1] int32
    tokens: tl.tensor,  # [tokens] int32
    last: tl.tensor,  # [places] int32
    tables: tl.tensor,  # [places, groups, pages] int32
    token_ids: tl.tensor,  # [tokens] int64
    positions: tl.tensor,  # [tokens] int64
    lengths: tl.tensor,  # [rows] int32
    block_tables: tl.tensor,  # [groups, rows, pages] int32
    slots: tl.tensor,  # [groups, tokens] int64
    last_place: tl.tensor,
    tables_place: tl.tensor,
    tables_group: tl.tensor,
    block_tables_group: tl.tensor,
    block_tables_row: tl.tensor,
    slots_group: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    group = tl.program_id(1)
    place = tl.load(places + row).to(tl.int64)
    start = tl.load(starts + row)
    first = tl.load(query_starts + row)
    count = tl.load(query_starts + row + 1) - first
    is_row = start >= 0
    start = tl.maximum(start, 0)
    length = tl.where(is_row, start + count, 0)
    own = tables + place * tables_place + group * tables_group
    drawn = tl.load(last + place * last_place)
    stored = tl.where(is_row, count, 0)

    for begin in range(0, count, TILE):
        lane = begin + tl.arange(0, TILE)
        held = lane < count
        position = start + lane
        page = tl.load(own + position // BLOCK_SIZE, mask=lane < stored, other=0).to(tl.int64)
        slot = tl.where(is_row, page * BLOCK_SIZE + position % BLOCK_SIZE, -1)
        tl.store(slots + group * slots_group + first + lane, slot, mask=held)
        if group == 0:
            token = tl.load(tokens + first + lane, mask=held, other=0)
            token = tl.where(token < 0, tl.maximum(drawn, 0), token)
            token = tl.where(is_row, token, 0)
            tl.store(token_ids + first + lane, token.to(tl.int64), mask=held)
            tl.store(positions + first + lane, position.to(tl.int64), mask=held)

    to = block_tables + group.to(tl.int64) * block_tables_group + row * block_tables_row
    pages = tl.cdiv(length, BLOCK_SIZE)
    for begin in range(0, pages, TILE):
        lane = begin + tl.arange(0, TILE)
        held = lane < pages
        tl.store(to + lane, tl.load(own + lane, mask=held, other=0), mask=held)
    if group == 0:
        tl.store(lengths + row, length)


@triton.jit(do_not_specialize=["count"])
def _scatter_kernel(
    table: tl.tensor,  # [words] int32
    at: tl.tensor,  # [count] int32
    words: tl.tensor,  # [count] int32
    count: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    lane = tl.program_id(0) * TILE + tl.arange(0, TILE)
    held = lane < count
    place = tl.load(at + lane, mask=held, other=0)
    tl.store(table + place, tl.load(words + lane, mask=held, other=0), mask=held)


@triton.jit(do_not_specialize=["count"])
def _remember_kernel(
    drawn: tl.tensor,  # [count] int64
    places: tl.tensor,  # [count] int32
    positions: tl.tensor,  # [count] int32
    last: tl.tensor,  # [places] int32
    tokens: tl.tensor,  # [places, longest] int32
    count: tl.tensor,
    last_place: tl.tensor,
    tokens_place: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    lane = tl.program_id(0) * TILE + tl.arange(0, TILE)
    held = lane < count
    token = tl.load(drawn + lane, mask=held, other=0).to(tl.int32)
    place = tl.load(places + lane, mask=held, other=0).to(tl.int64)
    position = tl.load(positions + lane, mask=held, other=0)
    tl.store(last + place * last_place, token, mask=held)
    tl.store(tokens + place * tokens_place + position, token, mask=held)


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
    """Fill the last five; see ``reference.step_inputs``."""
    for name, tensor in (("tables", tables), ("block_tables", block_tables), ("slots", slots)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name}: the last axis must be contiguous")
    chosen = choose("step_inputs", places.device)
    _inputs_kernel[(len(places), tables.shape[1])](
        places,
        starts,
        query_starts,
        tokens,
        last,
        tables,
        token_ids,
        positions,
        lengths,
        block_tables,
        slots,
        last.stride(0),
        *tables.stride()[:2],
        *block_tables.stride()[:2],
        slots.stride(0),
        BLOCK_SIZE=block_size,
        TILE=chosen["tile"],
        num_warps=chosen["warps"],
    )


def scatter(table: Tensor, at: Tensor, words: Tensor) -> None:
    """``table[at] = words``, all int32; no place twice."""
    if len(at):
        tile = 256
        _scatter_kernel[(triton.cdiv(len(at), tile),)](table, at, words, len(at), TILE=tile)


def remember(
    drawn: Tensor, places: Tensor, positions: Tensor, last: Tensor, tokens: Tensor
) -> None:
    """See ``reference.remember``."""
    tile = 256
    _remember_kernel[(triton.cdiv(len(drawn), tile),)](
        drawn,
        places,
        positions,
        last,
        tokens,
        len(drawn),
        last.stride(0),
        tokens.stride(0),
        TILE=tile,
    )
