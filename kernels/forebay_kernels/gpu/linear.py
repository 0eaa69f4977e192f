"""Linear layers on a GPU: for each layout of a matrix the product that is made for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from forebay_kernels.gpu.fp8 import pack_fp8
from forebay_kernels.gpu.int8 import Int8Linear
from forebay_kernels.gpu.packed import packed
from forebay_kernels.gpu.w4a16 import PackedLinear
from forebay_kernels.matrix import Dense, Fp8, Int8, Matrix, Reordered

Product = Callable[[Tensor], Tensor]


def pack(matrix: Matrix, bias: Tensor | None, dtype: torch.dtype) -> Product | None:
    """``x @ matrix.T + bias`` of ``[tokens, in]`` in this type; None if no kernel takes the matrix.

    What is returned holds the weights once: the caller should let go of the matrix.
    """
    match matrix:
        case Dense(weight):
            weight = weight.to(dtype)
            return lambda x: F.linear(x, weight, bias)
        case Reordered(inner, order):
            product = pack(inner, bias, dtype)
            return None if product is None else lambda x: product(x[:, order])
        case Fp8():
            return pack_fp8(matrix, bias)
    found = packed(matrix, dtype)
    if found is None:
        return None
    if isinstance(matrix, Int8):
        return Int8Linear(found, bias, dtype)
    return PackedLinear(found, bias, dtype)
