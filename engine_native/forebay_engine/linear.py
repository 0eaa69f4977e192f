"""Matrix products with a model's weights, packed once for the machine that computes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from forebay_kernels import cpu
from forebay_kernels import matrix as matrices
from forebay_kernels.matrix import Dense, Matrix

Product = Callable[[Tensor], Tensor]


class Linear:
    """``x @ matrix.T + bias``, by compiled kernels where there are some for this matrix."""

    def __init__(self, matrix: Matrix, bias: Tensor | None = None) -> None:
        self._product: Product = (
            cpu.pack(matrix, bias) or _by_onednn(matrix, bias) or _by_torch(matrix, bias)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """``[tokens, in] -> [tokens, out]``."""
        return self._product(x)


def _by_onednn(matrix: Matrix, bias: Tensor | None) -> Product | None:
    """Of bf16 on a CPU, laid out once: 1.3 to 1.6 times as fast as ``F.linear`` for few tokens."""
    if not (isinstance(matrix, Dense) and matrix.weight.is_cpu):
        return None
    if matrix.weight.dtype != torch.bfloat16:
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(matrix.weight)

    def product(x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return out

    return product


def _by_torch(matrix: Matrix, bias: Tensor | None) -> Product:
    return lambda x: matrices.linear(x, matrix, bias)
