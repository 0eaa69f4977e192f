"""How the programs of decode attention share rows of any lengths, and join what they found.

The launch depends on the number of rows alone, so that a captured graph serves all lengths. Every
program reads all lengths, takes as ``share`` the tiles that each of ``parts_aim`` programs of a KV
head would get, splits the rows that have more (evenly, into parts of at most ``share``), and finds
which part is its own. That makes at most ``parts_aim`` parts, and one for each row. A second kernel
joins the parts of rows that were split.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

#: Parts of one row at most, so that joining them stays cheap.
MOST_PARTS = 128
#: Values that a program loads at once to join rows of many parts: 64 registers of each thread.
_JOINED = 8192


@triton.jit
def low_of(length: tl.tensor, WINDOW: tl.constexpr) -> tl.tensor:
    """The first position that a row sees."""
    low = length * 0
    if WINDOW > 0:
        low = tl.maximum(length - WINDOW, 0)
    return low


@triton.jit
def tiles_of(length: tl.tensor, TILE: tl.constexpr, WINDOW: tl.constexpr) -> tl.tensor:
    """Tiles that hold what a row sees; tile ``i`` holds positions ``i * TILE`` and on."""
    return tl.cdiv(length, TILE) - low_of(length, WINDOW) // TILE


@triton.jit
def find(
    program: tl.tensor,
    lengths: tl.tensor,  # [rows] int32
    rows: tl.tensor,
    parts_aim: tl.tensor,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    MOST_PARTS: tl.constexpr,
    ROWS: tl.constexpr,  # read at once
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The row of a program's part, the program of the row's first part, and the row's parts.

    A row of length 0 has one part, whose program writes zeros. ``rows`` if there is no part left.
    """
    lane = tl.arange(0, ROWS)
    work = 0
    for first in range(0, rows, ROWS):
        length = tl.load(lengths + first + lane, mask=first + lane < rows, other=0)
        work += tl.sum(tiles_of(length, TILE, WINDOW), 0)
    share = tl.maximum(tl.cdiv(work, parts_aim), 1)

    row = 0
    start = 0  # parts of the rows before ``row``
    end = 0  # parts of the rows up to here
    own = 0  # parts of ``row``
    for first in range(0, rows, ROWS):
        there = first + lane < rows
        length = tl.load(lengths + first + lane, mask=there, other=0)
        parts = tl.cdiv(tiles_of(length, TILE, WINDOW), share)
        parts = tl.where(there, tl.minimum(tl.maximum(parts, 1), MOST_PARTS), 0)
        ends = end + tl.cumsum(parts, 0)
        before = there & (ends <= program)
        row += tl.sum(before.to(tl.int32), 0)
        start = tl.maximum(start, tl.max(tl.where(before, ends, 0), 0))
        here = (ends - parts <= program) & (ends > program)
        own += tl.sum(tl.where(here, parts, 0), 0)
        end += tl.sum(parts, 0)
    return row, start, own


@triton.jit
def _join_kernel(
    partial: tl.tensor,  # [programs, heads, dim] float32
    highest: tl.tensor,  # [programs, heads] float32
    total: tl.tensor,  # [programs, heads] float32
    spans: tl.tensor,  # [rows, 2] int32
    out: tl.tensor,  # [rows, heads, dim]
    out_row: tl.tensor,
    out_head: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    AT_ONCE: tl.constexpr,  # parts that are loaded together
) -> None:
    row = tl.program_id(0)
    head = tl.program_id(1)
    parts = tl.load(spans + 2 * row + 1)
    if parts == 1:
        return
    first = tl.load(spans + 2 * row)

    lane = tl.arange(0, DIM_PADDED)
    in_dim = lane < DIM
    top = float("-inf")
    whole = 0.0
    joined = tl.zeros([DIM_PADDED], tl.float32)
    for start in range(0, parts, AT_ONCE):
        part = start + tl.arange(0, AT_ONCE)
        there = part < parts
        place = (first + part) * HEADS + head
        # All loads before any sum: a program waits for memory once a turn.
        m = tl.load(highest + place, mask=there, other=float("-inf"))
        l = tl.load(total + place, mask=there, other=0.0)  # noqa: E741 - the name in the formula
        o = tl.load(  # [AT_ONCE, DIM_PADDED]
            partial + place[:, None] * DIM + lane[None, :],
            mask=there[:, None] & in_dim[None, :],
            other=0.0,
        )
        top_next = tl.maximum(top, tl.max(m, 0))  # finite: each part holds a slot
        weight = tl.exp2(m - top_next)
        shrink = tl.exp2(top - top_next)
        whole = whole * shrink + tl.sum(weight * l, 0)
        joined = joined * shrink + tl.sum(weight[:, None] * o, 0)
        top = top_next
    tl.store(
        out + row * out_row + head * out_head + lane,
        (joined / whole).to(out.dtype.element_ty),
        mask=in_dim,
    )


def join(
    partial: Tensor,  # [programs, heads, head_dim] float32
    highest: Tensor,  # [programs, heads] float32
    total: Tensor,  # [programs, heads] float32
    spans: Tensor,  # [rows, 2] int32
    out: Tensor,  # [rows or more, heads, head_dim]
) -> None:
    """Write what the parts of each row come to; rows of one part were written with it."""
    programs, heads, dim = partial.shape
    dim_padded = max(16, triton.next_power_of_2(dim))
    # Few rows have many parts each. Of many rows most have one: small programs return soonest, as
    # 32 of them fit a multiprocessor, and 4 of the large ones.
    few = 3 * len(spans) < programs
    values = _JOINED if few else _JOINED // 8
    _join_kernel[(len(spans), heads)](
        partial,
        highest,
        total,
        spans,
        out,
        *out.stride()[:2],
        HEADS=heads,
        DIM=dim,
        DIM_PADDED=dim_padded,
        AT_ONCE=max(1, min(MOST_PARTS, values // dim_padded)),
        num_warps=4 if few else 1,
    )
