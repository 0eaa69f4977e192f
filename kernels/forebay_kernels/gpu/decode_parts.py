"""How the programs of decode attention share rows of any lengths, worked out by each of them.

The launch depends on the number of rows alone, so that a captured graph serves all lengths. Every
program reads all lengths, takes as ``share`` the tiles that each of ``parts_aim`` programs of a KV
head would get, splits the rows that have more (evenly, into parts of at most ``share``), and finds
which part is its own. That makes at most ``parts_aim`` parts, and one for each row.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
