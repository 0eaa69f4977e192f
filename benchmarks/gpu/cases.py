"""What a kernel's benchmark says of itself, so that one script can check and time all of them.

Each kernel has a module here with ``cases(device, small) -> Iterator[Case]``. ``small`` shapes are
for a run under Triton's interpreter, which proves the script and not the speed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel on one shape; ``run`` allocates as it does in the engine, and nothing else."""

    #: ``kernel: shape``, as printed.
    name: str
    run: Callable[[], Tensor | tuple[Tensor, ...]]
    #: The same by the reference, in float32 or wider, of which ``run``'s relative error is taken.
    reference: Callable[[], Tensor | tuple[Tensor, ...]]
    #: Largest relative error (of norms) that is right for the types.
    tolerance: float
    #: Read and written by an ideal kernel: each value once.
    bytes: int
    #: Multiplications and additions; 0: memory is the limit.
    flops: int = 0
    #: Which matrix ceiling bounds ``flops``: ``bf16``, ``fp8`` or ``int8``.
    unit: str = "bf16"
    #: Share of the ceiling that it is to reach; None: no goal of its own.
    goal: float | None = None
