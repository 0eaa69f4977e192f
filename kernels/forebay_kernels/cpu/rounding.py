"""Plain weights rounded while they are read."""

from __future__ import annotations

import torch
from torch import Tensor

from forebay_kernels.cpu.library import library
from forebay_kernels.matrix import Int8


def round_to_int8(weight: Tensor) -> Int8:
    """``[out, in]``, by the largest value of each output channel; values must be finite."""
    out, into = weight.shape
    weight = weight.contiguous()
    values = torch.empty(out, into, dtype=torch.int8)
    scale = torch.empty(out)
    library().round_to_int8(
        weight.element_size(), weight.data_ptr(), out, into, values.data_ptr(), scale.data_ptr()
    )
    return Int8(values, scale)
