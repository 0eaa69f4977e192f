"""Linear layers over weights that are packed for the kernels."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from forebay_kernels.cpu.library import DenseMatrix, available, library
from forebay_kernels.matrix import Dense, Matrix


class PackedLinear:
    """``x @ matrix.T + bias`` in the type of ``x``; holds a packed copy of the matrix."""

    def __init__(self, matrix: Dense, bias: Tensor | None) -> None:
        self._kernel = library().linear
        weight = matrix.weight.contiguous()
        self._out, self._into = weight.shape
        self._dtype, self._element = weight.dtype, weight.element_size()
        self._panels = packed(weight)
        self._bias = None if bias is None else bias.float().contiguous()
        self._matrix = DenseMatrix(
            self._panels.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            self._out,
            self._into,
        )
        self._address = ctypes.byref(self._matrix)

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a call reads."""
        return self._panels.numel()

    def __call__(self, x: Tensor) -> Tensor:
        """``[tokens, in] -> [tokens, out]``."""
        if x.dtype != self._dtype or x.shape[-1] != self._into:
            raise ValueError(f"{x.dtype} {list(x.shape)} for {self._dtype} [.., {self._into}]")
        if x.stride(-1) != 1:
            x = x.contiguous()
        tokens = x.shape[0]
        out = torch.empty((tokens, self._out), dtype=self._dtype)
        self._kernel(
            self._address,
            self._element,
            x.data_ptr(),
            x.stride(0),
            tokens,
            out.data_ptr(),
            self._out,
        )
        return out


def packed(weight: Tensor) -> Tensor:
    """Panels of a contiguous ``[rows, columns]``, in bytes; see ``native/product.h``."""
    kernels = library()
    rows, columns = weight.shape
    row_bytes = columns * weight.element_size()
    panels = torch.empty(kernels.packed_bytes(rows, row_bytes), dtype=torch.uint8)
    kernels.huge_pages(panels.data_ptr(), panels.numel())
    kernels.pack(weight.data_ptr(), row_bytes, rows, row_bytes, panels.data_ptr())
    return panels


def pack(matrix: Matrix, bias: Tensor | None = None) -> PackedLinear | None:
    """The layer on the compiled kernels; None if they can't take it."""
    if isinstance(matrix, Dense) and available(matrix.weight):
        return PackedLinear(matrix, bias)
    return None
