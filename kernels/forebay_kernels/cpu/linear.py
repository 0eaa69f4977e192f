"""Linear layers over weights that are packed for the kernels."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from forebay_kernels.cpu import memory
from forebay_kernels.cpu.library import (
    DTYPES,
    DenseMatrix,
    LinearArgs,
    QuantizedMatrix,
    available,
    library,
)
from forebay_kernels.cpu.tape import call, empty
from forebay_kernels.matrix import Dense, GroupedInt8, Int4, Int8, Matrix, unpack_int4

#: Columns of a panel, as in ``native/product.h``.
PANEL = 32
#: Positions of an input that are rounded together where the weights have no groups.
_GROUPS = (128, 64, 32, 16, 8, 4)


class PackedLinear:
    """``x @ matrix.T + bias`` in the type of ``x``, over a packed copy of the matrix."""

    def __init__(
        self, kernel: Any, matrix: ctypes.Structure, dtypes: tuple[torch.dtype, ...], *held: Tensor
    ) -> None:
        self._kernel, self._address = kernel, ctypes.addressof(matrix)
        self._matrix, self._held = matrix, held  # what the address points to
        self.out, self._into = matrix.out, matrix.into
        self._dtypes = dtypes

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a call reads."""
        return sum(tensor.nbytes for tensor in self._held)

    def __call__(self, x: Tensor) -> Tensor:
        """``[tokens, in] -> [tokens, out]``."""
        return self._run(self._kernel, x, self.out)

    def _run(self, kernel: Any, x: Tensor, width: int, chosen: Tensor | None = None) -> Tensor:
        """``[tokens, in] -> [tokens, width]``."""
        x = self.taken(x)
        out = empty((len(x), width), x.dtype)
        args = LinearArgs(
            self._address,
            x.data_ptr(),
            out.data_ptr(),
            x.stride(0),
            width,
            len(x),
            _address(chosen),
            0 if chosen is None else len(chosen),
        )
        call(kernel, args, x.element_size(), (x,), (out,))
        return out

    def taken(self, x: Tensor) -> Tensor:
        """The input ``[tokens, in]`` as kernels read it: each token without gaps.

        :raises ValueError: its type or width is another.
        """
        if x.shape[1] != self._into or x.dtype not in self._dtypes:
            takes = " or ".join(map(str, self._dtypes))
            raise ValueError(f"{x.dtype} {list(x.shape)}, but it takes {takes} [.., {self._into}]")
        return x if x.stride(1) == 1 else x.contiguous()


class DenseLinear(PackedLinear):
    """The same over plain weights, of which some panels can be asked for."""

    def panels(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Their columns only, to the same bits: ``[tokens, in] -> [tokens, panels * 32]``.

        :param chosen: ``[panels] int32``. Columns past the last of all hold anything.
        """
        return self._run(library().linear, x, len(chosen) * PANEL, chosen)


def pack(matrix: Matrix, bias: Tensor | None = None) -> PackedLinear | None:
    """The layer on the compiled kernels; None if they can't take it."""
    bias = None if bias is None else bias.float().contiguous()
    match matrix:
        case Dense(weight) if available(weight):
            return _dense(weight.contiguous(), bias)
        case Int8(weight, scale) if _takes(weight, _own_group(weight)):
            group = _own_group(weight)
            scales = scale[:, None].expand(-1, weight.shape[1] // group)
            return _quantized(_unsigned(weight), scales, None, bias, group)
        case GroupedInt8(weight, scale, zero, group) if _takes(weight, group):
            zeros = None if zero is None else zero + 128.0
            return _quantized(_unsigned(weight), scale, zeros, bias, group)
        case Int4(q, scale, zero, group, codebook) if group % 8 == 0 and _takes(q, group):
            return _int4(q, scale, zero, bias, group, codebook)
    return None


def _dense(weight: Tensor, bias: Tensor | None) -> DenseLinear:
    panels = packed(weight)
    matrix = DenseMatrix(panels.data_ptr(), _address(bias), *weight.shape)
    held = [panels] if bias is None else [panels, bias]
    return DenseLinear(library().linear, matrix, (weight.dtype,), *held)


def _int4(
    q: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group: int,
    codebook: Tensor | None,
) -> PackedLinear:
    """Four columns in low halves, the next four in high ones; a codebook rounded to 8 bits."""
    values = unpack_int4(q).view(len(q), -1, 2, 4)  # [out, in / 8, 2, 4]
    halves = (values[:, :, 0] | (values[:, :, 1] << 4)).flatten(1)  # [out, in / 2]
    if codebook is None:
        return _quantized(halves, scale, zero, bias, group, bits=4)
    step = codebook.abs().max() / 127.0
    codes = ((codebook / step).round() + 128.0).to(torch.uint8)
    return _quantized(halves, scale * step, None, bias, group, bits=4, codes=codes)


def _quantized(
    q: Tensor,  # [out, in] uint8, or [out, in / 2] of nibbles
    scale: Tensor,  # [out, in / group]
    zero: Tensor | None,  # the same; None: 128
    bias: Tensor | None,
    group: int,
    *,
    bits: int = 8,
    codes: Tensor | None = None,
) -> PackedLinear:
    panels, scales = packed(q), _by_panels(scale)
    zeros = None if zero is None else _by_panels(zero)
    matrix = QuantizedMatrix(
        panels.data_ptr(),
        scales.data_ptr(),
        _address(zeros),
        _address(bias),
        _address(codes),
        len(q),
        q.shape[1] * 8 // bits,
        group,
        bits,
        128.0,
    )
    held = [x for x in (panels, scales, zeros, bias, codes) if x is not None]
    return PackedLinear(library().quantized_linear, matrix, DTYPES, *held)


def packed(weight: Tensor) -> Tensor:
    """Panels of a contiguous ``[rows, columns]``, in bytes; see ``native/product.h``."""
    kernels = library()
    rows, columns = weight.shape
    row_bytes = columns * weight.element_size()
    panels = memory.panels(kernels.packed_bytes(rows, row_bytes))
    kernels.pack(weight.data_ptr(), row_bytes, rows, row_bytes, panels.data_ptr())
    return panels


def _by_panels(values: Tensor) -> Tensor:
    """``[out, groups]`` as ``[panels, groups, 32]`` float32, columns past the end 0."""
    padded = torch.nn.functional.pad(values.float(), (0, 0, 0, -len(values) % PANEL))
    return padded.view(-1, PANEL, values.shape[1]).transpose(1, 2).contiguous()


def _takes(weight: Tensor, group: int) -> bool:
    return group % 4 == 0 and group > 0 and weight.is_cpu and library() is not None


def _own_group(weight: Tensor) -> int:
    return next((group for group in _GROUPS if weight.shape[1] % group == 0), 0)


def _unsigned(weight: Tensor) -> Tensor:
    return weight.contiguous().view(torch.uint8) ^ 128


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
