"""How weights of 4 and 8 bits lie in a GPU's memory: ``PackedMatrix``, which kernels read.

Outputs are cut into panels of 128, inputs into tiles, and a tile of a panel is a matrix ``[128,
lanes]`` of int16 words. A word holds ``16 / bits`` values, and those are ``lanes`` inputs apart:
value ``j`` of lane ``i``, in bits ``j * bits`` and up, belongs to the tile's input ``j * lanes +
i``. The ``j``-th values of a tile's words are therefore a matrix ``[128, lanes]`` over neighbouring
inputs, which a shift and a mask leave in the registers where a tensor core wants it: no value has
to move to another thread. Such a matrix lies in one group of inputs, so its products share a scale.

A tile of a panel is one run of memory, through which a block streams. Only where 8 bits have one
scale for each output do its rows lie as those of a plain matrix, which ``torch._int_mm`` takes: see
``as_bytes``.

A stack of experts is one matrix of their outputs one after the other, each a multiple of 128:
expert ``e`` begins at panel ``e * out / 128``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from forebay_kernels.matrix import GroupedInt8, Int4, Int8, Matrix, unpack_int4

#: Outputs of a panel.
PANEL = 128
#: What is added to values of 4 bits: a float from 16 to 32 whose four bits behind the leading one
#: are the value takes one instruction to make, and a stored zero holds the same 16.
BIAS = 16.0
#: Lanes by bits, the more the better.
_LANES = {4: (32, 16), 8: (64, 32, 16)}
#: Scales are at most two to this power; float16 ends at 2 ** 16 and gets inexact below 2 ** -14.
_TOP = 14


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """``w[o, i] = (q[o, i] - zero) * scale * factor``, or ``codes[q[o, i]] * scale * factor``.

    ``q`` is unsigned of 4 bits, or signed of 8. What pads the last panel and the last tile has the
    scale 0, so it adds nothing to an output as long as the inputs there are read as 0.
    """

    words: Tensor  # [panels, tiles, 128, lanes] int16
    #: Of each group, and as many rows beyond as a tile has groups: kernels load one tile ahead.
    #: float16 holds exactly what GPTQ and AWQ store, others to 2^-12: far below their last bit.
    scale: Tensor  # [rows, panels * 128] float16
    #: In the type of the inputs; of 4 bits, 16 + zero. bfloat16 has eighths there, float16 64ths,
    #: and checkpoints have integers.
    zero: Tensor | None  # [rows, panels * 128]; None: 8 of 4 bits, 0 of 8 bits
    codes: Tensor | None  # [16] in the type of the inputs
    factor: float  # a power of two, which keeps scales in the range of float16
    bits: int
    group: int  # inputs that share a scale; 0: all
    shape: tuple[int, int]

    @property
    def lanes(self) -> int:
        return self.words.shape[3]

    @property
    def tile(self) -> int:
        """Inputs of a tile: several groups, or a part of one."""
        return self.lanes * 16 // self.bits

    def as_bytes(self) -> Tensor:
        """``[panels * 128, tiles * tile]`` int8, without a copy, of rows that lie so.

        Byte ``2 * i + j`` of a tile belongs to its input ``j * lanes + i``.
        """
        rows = self.words.transpose(1, 2)  # [panels, 128, tiles, lanes]
        return rows.view(-1, rows.shape[2] * rows.shape[3]).view(torch.int8)

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a product reads."""
        held = (self.words, self.scale, self.zero)
        return sum(tensor.nbytes for tensor in held if tensor is not None)


def packed(matrix: Matrix, dtype: torch.dtype) -> PackedMatrix | None:
    """The matrix for inputs of this type; None if it is of another kind, or its groups don't fit.

    Those of 4 bits may have 16, 32, or a multiple of 64 inputs, of 8 bits 16 or a multiple of 32;
    a single group fits whatever its size.
    """
    match matrix:
        case Int4(nibbles, scale, zero, group, codebook):
            codes = None if codebook is None else codebook.to(dtype)
            if zero is not None:
                zero = None if bool((zero == 8.0).all()) else zero + BIAS
            return _packed(unpack_int4(nibbles), 4, scale, zero, codes, group, dtype)
        case Int8(weight, scale):
            return _packed(weight, 8, scale[:, None], None, None, weight.shape[1], dtype)
        case GroupedInt8(weight, scale, zero, group):
            return _packed(weight, 8, scale, zero, None, group, dtype)
    return None


def _packed(
    q: Tensor,  # [out, in] uint8 or int8
    bits: int,
    scale: Tensor,  # [out, in / group]
    zero: Tensor | None,  # [out, in / group]
    codes: Tensor | None,
    group: int,
    dtype: torch.dtype,
) -> PackedMatrix | None:
    out, into = q.shape
    group = 0 if group == into else group
    lanes = _lanes(bits, group)
    if lanes is None:
        return None
    tile = lanes * 16 // bits
    panels, tiles = -(-out // PANEL), -(-into // tile)
    rows = 1 if group == 0 else -(-tiles * tile // group) + max(1, tile // group)
    factor = _factor(scale)
    words = _words(q, bits, panels, tiles, lanes)
    if bits == 8 and group == 0:
        words = words.transpose(1, 2).contiguous().transpose(1, 2)
    return PackedMatrix(
        words,
        _by_rows(scale / factor, rows, panels).to(torch.float16),
        None if zero is None else _by_rows(zero, rows, panels).to(dtype),
        codes,
        factor,
        bits,
        group,
        (out, into),
    )


def _lanes(bits: int, group: int) -> int | None:
    for lanes in _LANES[bits]:
        tile = lanes * 16 // bits
        if group % lanes == 0 and (group % tile == 0 or tile % group == 0):
            return lanes
    return None


def _words(q: Tensor, bits: int, panels: int, tiles: int, lanes: int) -> Tensor:
    """``[panels, tiles, 128, lanes]`` int16, see above."""
    count = 16 // bits
    out, into = q.shape
    q = F.pad(q, (0, tiles * count * lanes - into, 0, panels * PANEL - out))
    parts = q.view(panels, PANEL, tiles, count, lanes).permute(3, 0, 2, 1, 4)
    words = torch.zeros(parts.shape[1:], dtype=torch.int32, device=q.device)
    for j, part in enumerate(parts):
        words |= (part.int() & ((1 << bits) - 1)) << (j * bits)
    return words.to(torch.int16)


def _by_rows(values: Tensor, rows: int, panels: int) -> Tensor:
    """``[out, groups]`` as ``[rows, panels * 128]``, 0 where there are none."""
    out, groups = values.shape
    return F.pad(values, (0, rows - groups, 0, panels * PANEL - out)).T.contiguous()


def _factor(scale: Tensor) -> float:
    largest = float(scale.abs().max())
    return 2.0 ** (math.frexp(largest)[1] - _TOP) if largest > 0.0 else 1.0
