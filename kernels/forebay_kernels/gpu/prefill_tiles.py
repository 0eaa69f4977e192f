"""How a prefill kernel reads a tile of the paged cache: page numbers first, a turn later its slots.

Where pages hold whole tiles, a tile has one page and its addresses are one sum; where tiles hold
whole pages, a slot's place within its page is known when compiling.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_pages(
    table: tl.tensor,  # [max_pages] int32
    start: tl.tensor,
    stop: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """The page of the tile, or of each of its slots if it may span several; 0 from ``stop`` on."""
    if BLOCK_SIZE % TILE == 0:
        page = tl.load(table + start // BLOCK_SIZE, mask=start < stop, other=0)
    else:
        step = tl.arange(0, TILE)
        if TILE % BLOCK_SIZE == 0:  # as a sum the second part is known when compiling
            place = table + start // BLOCK_SIZE + step // BLOCK_SIZE
        else:
            place = table + (start + step) // BLOCK_SIZE
        # Without masks ``stop`` is a tile's end, and one comparison serves all slots.
        inside = start + (step if MASKED else tl.zeros_like(step)) < stop
        page = tl.load(place, mask=inside, other=0)
    return page


@triton.jit
def load_tile(
    cache: tl.tensor,  # [pages, block_size, dim]: a head's keys or values
    page: tl.tensor,  # of the tile, or [TILE]
    start: tl.tensor,
    low: tl.tensor,
    stop: tl.tensor,
    PAGE: tl.constexpr,  # elements from page to page
    SLOT: tl.constexpr,  # and from slot to slot
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:  # [TILE, DIM_PADDED]
    step = tl.arange(0, TILE)
    lane = tl.arange(0, DIM_PADDED)
    if BLOCK_SIZE % TILE == 0:
        first = cache + (page.to(tl.int64) * PAGE + start % BLOCK_SIZE * SLOT)
        place = first + (step[:, None] * SLOT + lane[None, :])
    else:
        slot = (step if TILE % BLOCK_SIZE == 0 else start + step) % BLOCK_SIZE
        place = cache + (page.to(tl.int64) * PAGE + slot * SLOT)[:, None] + lane[None, :]
    if MASKED:
        # Slots that no query sees are never loaded: they may hold NaN, which no weight removes.
        held = (start + step >= low) & (start + step < stop)
        tile = tl.load(place, mask=held[:, None] & (lane < DIM)[None, :], other=0.0)
    elif DIM < DIM_PADDED:
        tile = tl.load(place, mask=(lane < DIM)[None, :], other=0.0)
    else:
        tile = tl.load(place)
    return tile
