"""Seconds that work takes on the device, and what the device can do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forebay_engine.gpu.graphs import CudaRecorder

#: More than a GPU's second cache holds (60 MB on an H200), in float32: read between two runs, so
#: that each finds its input in memory, as a layer does whose turn comes after all the others. It is
#: not written, for written lines go back to memory while the run reads: 50 MB of them would cost
#: one that reads 268 MB a sixth of its rate.
_FLUSH = 64 << 20
_WARM_UPS, _RUNS = 3, 20


def seconds(run: Callable[[], object], device: torch.device, runs: int = _RUNS) -> float:
    """The median of some runs, each a replay: of short ones Python's launches would be a part."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    flush = torch.zeros(_FLUSH, device=device)
    run = CudaRecorder(device).record(run)
    for _ in range(_WARM_UPS):
        run()
    marks = []
    for _ in range(runs):
        flush.sum()
        marks.append((mark(), mark()))
        marks[-1][0].record()
        run()
        marks[-1][1].record()
    torch.cuda.synchronize()
    return statistics.median(float(one.elapsed_time(other)) for one, other in marks) / 1e3


def mark() -> Any:
    """A place in the device's queue whose time is taken, once ``record`` is called."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Bytes a second of a copy, and operations a second of a matrix product, by unit.

    A unit that could not be measured bounds nothing.
    """

    copy: float
    flops: dict[str, float]

    def least(self, amount: int, flops: int, unit: str) -> float:
        """Seconds under which nobody moves so many bytes or makes so many operations."""
        rate = self.flops.get(unit)
        return max(amount / self.copy, flops / rate if rate else 0.0)


def ceilings(device: torch.device, small: bool) -> Iterator[tuple[str, Callable[[], float]]]:
    """Names, ``copy`` first, and what measures each: torch's own copy and products.

    On random data: zeros make clocks rise.
    """
    yield "copy", lambda: _copy(device, 1 << 20 if small else 4 << 30)
    units = {"bf16": _product} | (
        {"fp8": _fp8_product, "int8": _int8_product} if device.type == "cuda" else {}
    )
    n = 64 if small else 8192
    for unit, product in units.items():
        yield unit, lambda product=product: _rate(product, n, device)  # type: ignore[misc]


def _copy(device: torch.device, size: int) -> float:
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)


def _rate(
    product: Callable[[Tensor, Tensor], Callable[[], Tensor]], n: int, device: torch.device
) -> float:
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    return 2 * n**3 / seconds(product(a, b), device)


def _product(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    x, w = a.bfloat16(), b.bfloat16()
    return lambda: x @ w


def _fp8_product(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    x, w = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    one = torch.ones((), device=a.device)

    def run() -> Tensor:
        return torch._scaled_mm(
            x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return run


def _int8_product(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    x, w = (value.mul(30).clamp(-127, 127).to(torch.int8) for value in (a, b))
    return lambda: torch._int_mm(x, w.t())
