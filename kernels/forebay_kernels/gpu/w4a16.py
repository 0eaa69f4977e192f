"""Products with weights of 4 and 8 bits and inputs of 16, in Triton: W4A16 and W8A16.

    out[m, o] = factor * sum_g scale[g, o] * sum_{i in g} x[m, i] (q[o, i] - zero[g, o]) + bias[o]

Integers of 4 bits are exact in bfloat16, and so are those less an integer zero: the inner sum
rounds nothing, and the scale is multiplied in once a group, in float32, where it costs an
instruction for each output instead of one for each weight. For few tokens the inputs are shared out
among programs too; each writes its part of the sum, and the last of a tile to arrive adds the parts
up in their order. That saves a launch, and the result does not depend on which one is last.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from forebay_kernels.gpu.packed import PANEL, PackedMatrix
from forebay_kernels.gpu.packed_tiles import less_zero, of_groups, pick, sum_of_tiles, value
from forebay_kernels.gpu.tuning import choose
from forebay_kernels.gpu.unpacking import unpacking

#: Above this a matrix is dequantised for cuBLAS; see benchmarks/gpu/notes/w4a16.md.
MOST_TOKENS = 256
_LEAST_TILE = 16


@triton.jit(do_not_specialize=["tokens"])
def _product_kernel(
    x: tl.tensor,  # [tokens, inputs]
    words: tl.tensor,  # [panels, tiles, 128, lanes] int16
    scale: tl.tensor,  # [rows, padded]
    zero: tl.tensor,  # [rows, padded], or None
    codes: tl.tensor,  # [16], or None
    bias: tl.tensor,  # [outputs], or None
    out: tl.tensor,  # [tokens, outputs]
    partial: tl.tensor,  # [splits, tokens, padded] float32; None: one split
    arrived: tl.tensor,  # [panels, token tiles] int32, 0 before and after; None: one split
    factor: tl.tensor,
    tokens: tl.tensor,
    inputs: tl.tensor,
    outputs: tl.tensor,
    padded: tl.tensor,  # panels * 128
    tiles: tl.tensor,
    x_row: tl.tensor,
    out_row: tl.tensor,
    words_panel: tl.tensor,
    words_tile: tl.tensor,
    words_row: tl.tensor,
    BITS: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,  # of a tile
    GROUP_TILES: tl.constexpr,  # tiles of a group; 0: all
    WHOLE: tl.constexpr,  # the last tile is no shorter
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PANEL: tl.constexpr,
    PTX: tl.constexpr,  # None: interpreted
    PRECISION: tl.constexpr,
) -> None:
    m_tile = tl.program_id(0)
    panel = tl.program_id(1)
    split = tl.program_id(2)
    share = tl.cdiv(tiles, SPLITS)
    begin = split * share
    m = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_wide = m.to(tl.int64)[:, None]
    held = (m < tokens)[:, None]
    lane = tl.arange(0, LANES)
    inside = tl.arange(0, PANEL)
    n = panel * PANEL + inside
    acc = sum_of_tiles(
        x + m_wide * x_row + lane[None, :],
        held,
        words + panel.to(tl.int64) * words_panel + (inside[:, None] * words_row + lane[None, :]),
        scale,
        zero,
        codes,
        begin,
        tl.minimum(begin + share, tiles),
        n,
        inputs,
        padded,
        words_tile,
        BITS,
        LANES,
        GROUPS,
        GROUP_TILES,
        WHOLE,
        BLOCK_M,
        PANEL,
        PTX,
        PRECISION,
    )
    out_at = out + m_wide * out_row + n[None, :]
    is_output = held & (n < outputs)[None, :]
    if SPLITS == 1:
        _finish(acc, factor, bias, n, outputs, out_at, is_output)
    else:
        AT_ONCE: tl.constexpr = 4 if BLOCK_M == 16 else 1  # loads there are registers for
        stride = tl.cast(tokens, tl.int64) * padded
        part_at = partial + m_wide * padded + n[None, :]
        tl.store(part_at + split * stride, acc, mask=held)
        tl.debug_barrier()  # all of the block's stores come before its arrival
        counter = arrived + panel * tl.num_programs(0) + m_tile
        if tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1:
            total = tl.zeros([BLOCK_M, PANEL], tl.float32)
            for first in range(0, tl.num_programs(2), AT_ONCE):
                for k in tl.static_range(AT_ONCE):
                    total += tl.load(
                        part_at + (first + k) * stride,
                        mask=held & (first + k < SPLITS),
                        other=0.0,
                        cache_modifier=".cg",  # other multiprocessors wrote them
                    )
            _finish(total, factor, bias, n, outputs, out_at, is_output)
            tl.store(counter, 0)  # for the next call


@triton.jit
def _finish(
    total: tl.tensor,
    factor: tl.tensor,
    bias: tl.tensor,
    n: tl.tensor,
    outputs: tl.tensor,
    out_at: tl.tensor,
    is_output: tl.tensor,
) -> None:
    total *= factor
    if bias is not None:
        total += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    tl.store(out_at, total.to(out_at.dtype.element_ty), mask=is_output)


@triton.jit
def _dequantize_kernel(
    words: tl.tensor,  # [panels, tiles, 128, lanes] int16
    scale: tl.tensor,  # [rows, padded]
    zero: tl.tensor,  # [rows, padded], or None
    codes: tl.tensor,  # [16], or None
    out: tl.tensor,  # [outputs, inputs]
    factor: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    padded: tl.tensor,
    words_panel: tl.tensor,
    words_tile: tl.tensor,
    words_row: tl.tensor,
    BITS: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_TILES: tl.constexpr,
    PANEL: tl.constexpr,
    PTX: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    panel = tl.program_id(1)
    DTYPE: tl.constexpr = out.dtype.element_ty
    DOTS: tl.constexpr = 16 // BITS
    lane = tl.arange(0, LANES)
    inside = tl.arange(0, PANEL)
    n = panel * PANEL + inside
    word = tl.load(
        words
        + panel.to(tl.int64) * words_panel
        + tile * words_tile
        + (inside[:, None] * words_row + lane[None, :])
    )
    HAS_ZERO: tl.constexpr = zero is not None
    zeros = zero if HAS_ZERO else scale
    s0, s1, s2, s3 = of_groups(scale, tile, padded, n, GROUPS, GROUP_TILES)
    z0, z1, z2, z3 = of_groups(zeros, tile, padded, n, GROUPS, GROUP_TILES)
    for d in tl.static_range(DOTS):
        w = value(word, codes, d, BITS, DTYPE, PTX)
        w = less_zero(w, pick(z0, z1, z2, z3, d * GROUPS // DOTS), codes, BITS, HAS_ZERO)
        each = pick(s0, s1, s2, s3, d * GROUPS // DOTS).to(tl.float32) * factor
        i = (tile * DOTS + d) * LANES + lane
        tl.store(
            out + n.to(tl.int64)[:, None] * inputs + i[None, :],
            (w.to(tl.float32) * each[:, None]).to(DTYPE),
            mask=(n < outputs)[:, None] & (i < inputs)[None, :],
        )


class PackedLinear:
    """``x @ w.T + bias`` over a packed matrix, of ``[tokens, in]`` in the type it was packed for.

    Two streams at once must not call the same layer: it counts its programs in a place of its own.
    """

    def __init__(self, matrix: PackedMatrix, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.matrix, self._bias, self._dtype = matrix, bias, dtype
        words = matrix.words
        self._padded = len(words) * PANEL
        self._launches: dict[int, tuple[tuple[int, int, int], dict[str, Any]]] = {}  # by tokens
        self._constants = layout(matrix, dtype)
        self._arrived = torch.zeros(
            len(words) * (MOST_TOKENS // _LEAST_TILE), dtype=torch.int32, device=words.device
        )

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a call reads."""
        return self.matrix.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """``[tokens, in] -> [tokens, out]``."""
        self.check(x)
        if len(x) > MOST_TOKENS:
            return F.linear(x, self.dequantize(), self._bias)
        out = torch.empty((len(x), self.matrix.shape[0]), dtype=x.dtype, device=x.device)
        if len(x):
            self._multiply(x if x.stride(1) == 1 else x.contiguous(), out)
        return out

    def check(self, x: Tensor) -> None:
        """ValueError if it cannot be multiplied."""
        if x.dtype != self._dtype or x.shape[1] != self.matrix.shape[1]:
            raise ValueError(
                f"{x.dtype} {list(x.shape)}, but it takes {self._dtype} "
                f"[.., {self.matrix.shape[1]}]"
            )

    def _multiply(self, x: Tensor, out: Tensor) -> None:
        matrix, tokens = self.matrix, len(x)
        if tokens not in self._launches:
            self._launches[tokens] = launch(matrix, tokens)
        grid, chosen = self._launches[tokens]
        splits = grid[2]
        partial = None
        if splits > 1:
            size = (splits, tokens, self._padded)
            partial = torch.empty(size, dtype=torch.float32, device=x.device)
        _product_kernel[grid](
            x,
            matrix.words,
            matrix.scale,
            matrix.zero,
            matrix.codes,
            self._bias,
            out,
            partial,
            self._arrived if splits > 1 else None,
            matrix.factor,
            tokens,
            matrix.shape[1],
            matrix.shape[0],
            self._padded,
            matrix.words.shape[1],
            x.stride(0),
            out.stride(0),
            *matrix.words.stride()[:3],
            # Full float32: the default rounds its factors to 10 bits of mantissa.
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            **chosen,
            **self._constants,
        )

    def dequantize(self) -> Tensor:
        """``[out, in]`` in the type of the inputs."""
        matrix = self.matrix
        panels, tiles = matrix.words.shape[:2]
        out = torch.empty(matrix.shape, dtype=self._dtype, device=matrix.words.device)
        _dequantize_kernel[(tiles, panels)](
            matrix.words,
            matrix.scale,
            matrix.zero,
            matrix.codes,
            out,
            matrix.factor,
            *matrix.shape,
            self._padded,
            *matrix.words.stride()[:3],
            num_warps=4,
            **self._constants,
        )
        return out


def layout(matrix: PackedMatrix, dtype: torch.dtype) -> dict[str, Any]:
    """What the kernels are told of a matrix when they are compiled."""
    tile, group = matrix.tile, matrix.group
    ptx = unpacking(matrix.bits, dtype, matrix.codes) if matrix.words.is_cuda else None
    return {
        "BITS": matrix.bits,
        "LANES": matrix.lanes,
        "GROUPS": max(1, tile // group) if group else 1,
        "GROUP_TILES": max(1, group // tile) if group else 0,
        "PANEL": PANEL,
        "PTX": ptx,
    }


def launch(matrix: PackedMatrix, tokens: int) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """The grid (token tiles, panels, splits) and the settings of a product."""
    panels, tiles = matrix.words.shape[:2]
    chosen = choose(f"w{matrix.bits}a16", matrix.words.device, tokens=tokens)
    token_tiles = -(-tokens // chosen["block_m"])
    wanted = min(chosen["programs"] // (panels * token_tiles), chosen["splits"], tiles)
    share = -(-tiles // max(1, wanted))
    splits = -(-tiles // share)  # none without a tile
    return (token_tiles, panels, splits), {
        "WHOLE": matrix.shape[1] % matrix.tile == 0,
        "SPLITS": splits,
        "BLOCK_M": chosen["block_m"],
        "num_warps": chosen["warps"],
        "num_stages": chosen["stages"],
    }
