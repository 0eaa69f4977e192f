"""What readers of quantised checkpoints share: how they get tensors, and grouped integers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from forebay_engine.hf_config import ModelError
from forebay_kernels.matrix import GroupedInt8, Int4, Matrix, Reordered, pack_int4


class Tensors(Protocol):
    """The checkpoint's tensors, each to be taken once."""

    def __contains__(self, name: str) -> bool: ...

    def raw(self, name: str, *shape: int) -> Tensor:
        """The tensor as stored; ModelError if it is missing or, given a shape, of another."""
        ...

    def claim(self, name: str) -> None:
        """Take the tensor without reading it; ModelError if there is none left of this name."""
        ...

    def dtype_of(self, name: str) -> torch.dtype:
        """The tensor's type as stored."""
        ...

    def left(self, suffix: str) -> list[str]:
        """Names with this ending that have not been taken."""
        ...

    def skip(self, names: Iterable[str]) -> None:
        """Leave out tensors that change nothing here, if they are there."""
        ...


class Format(Protocol):
    """Reads one way to store quantised weights."""

    def matrix(self, tensors: Tensors, name: str, out: int, into: int) -> Matrix | None:
        """The layer's weight ``[out, into]``; None if this layer is stored plainly.

        ``Dense``: the format has its own way to store plain values.

        :raises ModelError: in a way that is not supported, or its tensors do not fit together.
        """
        ...

    def finish(self, tensors: Tensors) -> None:
        """All layers are read: leave out what such checkpoints hold beyond."""
        ...


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Integers of 32 bits ``[..., n]`` as ``[..., n * 32 / bits]`` uint8, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2).to(torch.uint8)


def grouped(
    name: str,
    values: Tensor,  # [out, in] uint8: from 0 to 2 ** bits - 1
    scale: Tensor,  # [out, groups]
    zero: Tensor | None,  # [out, groups], in steps of the values; None: the middle
    bits: int,
    index: Tensor | None,  # [in] int32: the group of each column; None: one after the other
) -> Matrix:
    """Values of 4 or 8 bits with a scale for each group of columns, as a matrix.

    :raises ModelError: groups of several sizes.
    """
    middle = 1 << (bits - 1)
    into, groups = values.shape[1], scale.shape[1]
    group, rest = divmod(into, groups)
    order = None
    if index is not None:
        order = torch.argsort(index, stable=True)
        regular = torch.arange(into) // max(group, 1)
        if rest == 0 and not torch.equal(index[order].long(), regular):
            rest = 1
        order = None if torch.equal(order, torch.arange(into)) else order
    if rest:
        raise ModelError(
            f"{name}: {groups} groups over {into} inputs are not of one size; quantise again with "
            "a group_size that divides the inputs"
        )
    if order is not None:
        values = values[:, order]
    scale = scale.float().contiguous()
    zeros = torch.full_like(scale, middle) if zero is None else zero.float().contiguous()
    matrix: Matrix
    if bits == 4:
        matrix = Int4(pack_int4(values), scale, zeros, group)
    else:
        signed = (values ^ 128).view(torch.int8).contiguous()  # less 128
        matrix = GroupedInt8(signed, scale, None if zero is None else zeros - middle, group)
    return matrix if order is None else Reordered(matrix, order)
