"""What kernels over a ``PackedMatrix`` are made of: its values, and sums of products with them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def value(
    words: tl.tensor,  # [PANEL, LANES] int16
    codes: tl.tensor,  # [16], or None
    J: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
) -> tl.tensor:
    """The words' ``J``-th values, 16 too large if they are of 4 bits."""
    if PTX is None:  # interpreted
        found = (words.to(tl.int32) >> (BITS * J)) & ((1 << BITS) - 1)
        if codes is not None:
            found = tl.load(codes + found)
        elif BITS == 4:
            found = found + 16
        else:
            found = ((found + 128) & 255) - 128
        found = found.to(DTYPE)
    else:  # the same for each J, so it is done once
        if BITS == 4:
            each = tl.inline_asm_elementwise(
                PTX,
                "=r,=r,=r,=r,r",
                [words],
                dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
                is_pure=True,
                pack=2,
            )
        else:
            each = tl.inline_asm_elementwise(
                PTX, "=r,=r,r", [words], dtype=(tl.int16, tl.int16), is_pure=True, pack=2
            )
        found = each[J].to(DTYPE, bitcast=True)
    return found


@triton.jit
def of_groups(
    rows: tl.tensor,  # [rows, padded]
    tile: tl.tensor,
    padded: tl.tensor,
    n: tl.tensor,
    GROUPS: tl.constexpr,
    GROUP_TILES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The values of a tile's groups; those that it does not have are copies."""
    row = 0
    if GROUP_TILES > 0:
        row = tile // GROUP_TILES * GROUPS
    at = rows + row * padded + n
    first = tl.load(at)
    second, third, fourth = first, first, first
    if GROUPS > 1:
        second = tl.load(at + padded)
    if GROUPS > 2:
        third = tl.load(at + 2 * padded)
        fourth = tl.load(at + 3 * padded)
    return first, second, third, fourth


@triton.jit
def pick(
    first: tl.tensor, second: tl.tensor, third: tl.tensor, fourth: tl.tensor, G: tl.constexpr
) -> tl.tensor:
    chosen = first
    if G == 1:
        chosen = second
    if G == 2:
        chosen = third
    if G == 3:
        chosen = fourth
    return chosen


@triton.jit
def less_zero(
    values: tl.tensor,  # [PANEL, LANES]
    zero: tl.tensor,  # [PANEL], if HAS_ZERO
    codes: tl.tensor,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
) -> tl.tensor:
    less = values
    if HAS_ZERO:
        less = values - zero[:, None]
    elif BITS == 4 and codes is None:
        less = values - 24.0  # 16 + 8
    return less


@triton.jit
def sum_of_tiles(
    x_at: tl.tensor,  # [BLOCK_M, LANES]
    held: tl.tensor,  # [BLOCK_M, 1]
    words_at: tl.tensor,  # [PANEL, LANES]
    scale: tl.tensor,
    zero: tl.tensor,
    codes: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    n: tl.tensor,  # [PANEL]
    inputs: tl.tensor,
    padded: tl.tensor,
    words_tile: tl.tensor,
    BITS: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_TILES: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PANEL: tl.constexpr,
    PTX: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """``[BLOCK_M, PANEL]``: the product over tiles ``begin`` to ``end``, but for the factor."""
    DTYPE: tl.constexpr = x_at.dtype.element_ty
    DOTS: tl.constexpr = 16 // BITS
    HAS_ZERO: tl.constexpr = zero is not None
    zeros = zero if HAS_ZERO else scale
    lane = tl.arange(0, LANES)
    acc = tl.zeros([BLOCK_M, PANEL], tl.float32)
    s0, s1, s2, s3 = of_groups(scale, begin, padded, n, GROUPS, GROUP_TILES)
    z0, z1, z2, z3 = of_groups(zeros, begin, padded, n, GROUPS, GROUP_TILES)
    for tile in range(begin, end):
        word = tl.load(words_at + tile * words_tile)  # [PANEL, LANES]
        # One tile ahead: they are too small to go through the pipeline of copies.
        next_s0, next_s1, next_s2, next_s3 = of_groups(
            scale, tile + 1, padded, n, GROUPS, GROUP_TILES
        )
        next_z0, next_z1, next_z2, next_z3 = of_groups(
            zeros, tile + 1, padded, n, GROUPS, GROUP_TILES
        )
        for g in tl.static_range(GROUPS):
            part = tl.zeros([BLOCK_M, PANEL], tl.float32)
            for d in tl.static_range(g * DOTS // GROUPS, (g + 1) * DOTS // GROUPS):
                w = value(word, codes, d, BITS, DTYPE, PTX)
                w = less_zero(w, pick(z0, z1, z2, z3, g), codes, BITS, HAS_ZERO)
                i = (tile * DOTS + d) * LANES
                wanted = held if WHOLE else held & (i + lane < inputs)[None, :]
                x_part = tl.load(x_at + i, mask=wanted, other=0.0)  # [BLOCK_M, LANES]
                part = tl.dot(x_part, tl.trans(w), part, input_precision=PRECISION)
            acc += part * pick(s0, s1, s2, s3, g).to(tl.float32)[None, :]
        s0, s1, s2, s3 = next_s0, next_s1, next_s2, next_s3
        z0, z1, z2, z3 = next_z0, next_z1, next_z2, next_z3
    return acc
