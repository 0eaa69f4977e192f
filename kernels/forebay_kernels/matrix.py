"""Weight matrices as they lie in memory: dense, or quantised in one of a few layouts.

Each checkpoint format is unpacked into one of these when it is read, so that a kernel has to know
these layouts and no formats. ``dequantize`` is the specification of a layout, ``linear`` and
``linear_w8a8`` are those of the products that fast kernels compute.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Matrix(ABC):
    """A matrix ``w`` of ``[out, in]``, of which ``x @ w.T`` is wanted."""

    __slots__ = ()

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """``[out, in]`` float32."""

    @property
    def device(self) -> torch.device:
        """Where its values are."""
        return next(part.device for part in self._parts().values())

    def to(self, device: torch.device) -> Matrix:
        """The same there."""
        return replace(self, **{name: part.to(device) for name, part in self._parts().items()})  # type: ignore[type-var]

    def _parts(self) -> dict[str, Tensor | Matrix]:
        """What it is made of, by the names of its fields."""
        each = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: part for name, part in each.items() if isinstance(part, Tensor | Matrix)}

    @classmethod
    @abstractmethod
    def _join(cls, parts: Sequence[Any]) -> Matrix | None:
        """Parts of this class as one; None if they cannot be without changing a value."""


@dataclass(frozen=True, slots=True, eq=False)
class Dense(Matrix):
    """Plain values."""

    weight: Tensor  # [out, in] float32 or bfloat16

    @property
    def shape(self) -> tuple[int, int]:
        return _shape(self.weight)

    def dequantize(self) -> Tensor:
        return self.weight.float()

    @classmethod
    def _join(cls, parts: Sequence[Dense]) -> Dense:
        return cls(torch.cat([part.weight for part in parts]))


@dataclass(frozen=True, slots=True, eq=False)
class Int8(Matrix):
    """``w[o, i] = weight[o, i] * scale[o]``: symmetric, one scale for each output channel."""

    weight: Tensor  # [out, in] int8
    scale: Tensor  # [out] float32

    @property
    def shape(self) -> tuple[int, int]:
        return _shape(self.weight)

    def dequantize(self) -> Tensor:
        return self.weight.float() * self.scale[:, None]

    @classmethod
    def _join(cls, parts: Sequence[Int8]) -> Int8:
        return cls(
            torch.cat([part.weight for part in parts]), torch.cat([part.scale for part in parts])
        )


@dataclass(frozen=True, slots=True, eq=False)
class GroupedInt8(Matrix):
    """``w[o, i] = (weight[o, i] - zero[o, g]) * scale[o, g]`` with ``g = i // group``.

    GPTQ with 8 bits, and GGUF's Q8_0 (groups of 32, no zero).
    """

    weight: Tensor  # [out, in] int8
    scale: Tensor  # [out, in / group] float32
    zero: Tensor | None  # [out, in / group] float32; None: all are 0
    group: int  # divides in

    @property
    def shape(self) -> tuple[int, int]:
        return _shape(self.weight)

    def dequantize(self) -> Tensor:
        return _scaled_groups(self.weight.float(), self.scale, self.zero, self.group)

    @classmethod
    def _join(cls, parts: Sequence[GroupedInt8]) -> GroupedInt8 | None:
        group = parts[0].group
        if any(part.group != group for part in parts):
            return None
        weight, scale = torch.cat([p.weight for p in parts]), torch.cat([p.scale for p in parts])
        return cls(weight, scale, _joined_zeros(parts), group)


@dataclass(frozen=True, slots=True, eq=False)
class Int4(Matrix):
    """``w[o, i] = (q[o, i] - zero[o, g]) * scale[o, g]`` with ``g = i // group``, q from 0 to 15.

    With a ``codebook`` (bitsandbytes' nf4 and fp4) it is ``codebook[q[o, i]] * scale[o, g]``.
    """

    packed: Tensor  # [out, in / 2] uint8; q of column 2 j in the low four bits, 2 j + 1 in the high
    scale: Tensor  # [out, in / group] float32
    zero: Tensor | None  # [out, in / group] float32; None: there is a codebook
    group: int  # divides in
    codebook: Tensor | None = None  # [16] float32; None: there is a zero

    @property
    def shape(self) -> tuple[int, int]:
        out, half = self.packed.shape
        return out, 2 * half

    def dequantize(self) -> Tensor:
        q = unpack_int4(self.packed)  # [out, in]
        values = q.float() if self.codebook is None else self.codebook[q.int()]
        return _scaled_groups(values, self.scale, self.zero, self.group)

    @classmethod
    def _join(cls, parts: Sequence[Int4]) -> Int4 | None:
        group, codebook = parts[0].group, parts[0].codebook
        if any(part.group != group or not _same(part.codebook, codebook) for part in parts):
            return None
        packed, scale = torch.cat([p.packed for p in parts]), torch.cat([p.scale for p in parts])
        return cls(packed, scale, _joined_zeros(parts), group, codebook)


@dataclass(frozen=True, slots=True, eq=False)
class Fp8(Matrix):
    """``w[o, i] = weight[o, i] * scale[o, g]`` with ``g = i // group``.

    A scale of the whole tensor, of each channel (both: ``group = in``), or of blocks of 128 by 128
    is repeated for each output channel, so that matrices can be joined.
    """

    weight: Tensor  # [out, in] float8_e4m3fn
    scale: Tensor  # [out, ceil(in / group)] float32
    group: int  # the last group may be shorter

    @property
    def shape(self) -> tuple[int, int]:
        return _shape(self.weight)

    def dequantize(self) -> Tensor:
        each = self.scale.repeat_interleave(self.group, dim=1)[:, : self.weight.shape[1]]
        return self.weight.float() * each

    @classmethod
    def _join(cls, parts: Sequence[Fp8]) -> Fp8 | None:
        group = parts[0].group
        if any(part.group != group for part in parts):
            return None
        weight = torch.cat([part.weight.view(torch.uint8) for part in parts])
        scale = torch.cat([part.scale for part in parts])
        return cls(weight.view(torch.float8_e4m3fn), scale, group)


@dataclass(frozen=True, slots=True, eq=False)
class Reordered(Matrix):
    """A matrix whose column ``j`` belongs to the input's column ``order[j]``.

    GPTQ's act-order quantises columns by importance; sorted by group they have a plain layout, and
    the input is brought into the same order with ``x[:, order]``.
    """

    matrix: Matrix
    order: Tensor  # [in] int64, a permutation

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    def dequantize(self) -> Tensor:
        stored = self.matrix.dequantize()
        return torch.empty_like(stored).index_copy_(1, self.order, stored)

    @classmethod
    def _join(cls, parts: Sequence[Reordered]) -> Reordered | None:
        order = parts[0].order
        inner = _joined([part.matrix for part in parts])
        if inner is None or not all(torch.equal(part.order, order) for part in parts):
            return None
        return cls(inner, order)


def linear(x: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
    """``x @ w.T + bias`` in the type of ``x``: ``[..., in] -> [..., out]``."""
    weight = matrix.weight if isinstance(matrix, Dense) else matrix.dequantize()
    return F.linear(x, weight.to(x.dtype), bias)


def linear_w8a8(x: Tensor, matrix: Int8) -> Tensor:
    """The product in integers: ``[tokens, in] -> [tokens, out]`` in the type of ``x``.

    Each token is rounded to int8 by a scale of its own, the products are summed up exactly, and
    both scales are multiplied in at the end, in float32: what a kernel with int8 dot products
    computes. A token's values are off by at most 1/254 of its largest.
    """
    rounded, scale = quantize_tokens(x)
    # Exact in float64: the sum stays far below 2 ** 53.
    total = rounded.double() @ matrix.weight.double().T
    return (total.float() * scale[:, None] * matrix.scale).to(x.dtype)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens ``[tokens, in]`` as int8 in -127..127, and their scales ``[tokens]`` float32.

    The scale is ``max |x| / 127``; ties are rounded to even; a token of zeros has the scale 0.
    """
    scale = x.abs().amax(dim=1).float() / 127.0
    divisor = torch.where(scale > 0.0, scale, 1.0)
    return (x.float() / divisor[:, None]).round().to(torch.int8), scale


def pack_int4(values: Tensor) -> Tensor:
    """Integers from 0 to 15, ``[..., in]``, as bytes ``[..., in / 2]``, even columns low."""
    values = values.to(torch.uint8)
    return values[..., 0::2] | (values[..., 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of ``pack_int4``, as uint8."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def concatenate(parts: Sequence[Matrix], dtype: torch.dtype) -> Matrix:
    """Matrices over the same input as one, their outputs one after the other.

    Parts of unlike layout (one that was left unquantised, say) are dequantised into ``dtype``.

    :raises ValueError: the inputs are not of one size.
    """
    if len({part.shape[1] for part in parts}) != 1:
        raise ValueError(f"inputs of several sizes: {[part.shape[1] for part in parts]}")
    if len(parts) == 1:
        return parts[0]
    joined = _joined(parts)
    if joined is None:
        joined = Dense(torch.cat([part.dequantize().to(dtype) for part in parts]))
    return joined


def _joined(parts: Sequence[Matrix]) -> Matrix | None:
    kind = type(parts[0])
    return kind._join(parts) if all(type(part) is kind for part in parts) else None


def _joined_zeros(parts: Sequence[GroupedInt8] | Sequence[Int4]) -> Tensor | None:
    """The parts' zeros; of those without, 0, unless no part has any."""
    if all(part.zero is None for part in parts):
        return None
    return torch.cat(
        [torch.zeros_like(part.scale) if part.zero is None else part.zero for part in parts]
    )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def _scaled_groups(values: Tensor, scale: Tensor, zero: Tensor | None, group: int) -> Tensor:
    """``(values - zero) * scale``, each group of columns by its own: ``[out, in]`` float32."""
    grouped = values.reshape(len(values), -1, group)  # [out, in / group, group]
    if zero is not None:
        grouped = grouped - zero[:, :, None]
    return (grouped * scale[:, :, None]).flatten(1)


def _shape(weight: Tensor) -> tuple[int, int]:
    out, into = weight.shape
    return out, into
