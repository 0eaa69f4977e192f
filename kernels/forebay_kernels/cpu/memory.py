"""Where packed weights lie."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from forebay_kernels.cpu.library import library

#: So many bytes of memory that is ready to be written, or None if there are none.
Lender = Callable[[int], memoryview | None]

_lender: Lender | None = None


def borrow_from(lender: Lender | None) -> None:
    """Lay out weights in memory of ``lender``'s, as long as it has some; None: in torch's only."""
    global _lender
    _lender = lender


def panels(size: int) -> Tensor:
    """``[size]`` bytes for packed weights, in huge pages if the system has any: a step reads them
    all.
    """
    lent = None if _lender is None else _lender(size)
    if lent is not None:
        return torch.frombuffer(lent, dtype=torch.uint8)
    own = torch.empty(size, dtype=torch.uint8)
    library().huge_pages(own.data_ptr(), size)
    return own
