"""Matrix products with a model's weights, packed once for the machine that computes them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Condition
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from forebay_kernels import cpu
from forebay_kernels import matrix as matrices
from forebay_kernels.matrix import Dense, Matrix, Reordered

Product = Callable[[Tensor], Tensor]
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Rounded:
    """Tokens in e4m3, as the one layer that reads them asked for (``Linear.group``)."""

    values: Tensor  # [tokens, in] e4m3
    scale: Tensor  # [tokens, in / group] float32
    #: What they were before, and what products with them are.
    dtype: torch.dtype


Tokens = Tensor | Rounded


@runtime_checkable
class TakesRounded(Protocol):
    """A product that rounds tokens to e4m3, or takes such (``forebay_kernels.gpu.fp8``)."""

    group: int

    def rounds(self, x: Tensor) -> bool: ...

    def quantized(self, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor: ...


#: Lays out weights while others are read, and while the tokenizer is.
_packer = ThreadPoolExecutor(1, "forebay-pack")


def in_turn(job: Callable[[], R]) -> Future[R]:
    """Run it behind what is being laid out."""
    return _packer.submit(job)


class Backlog:
    """Bytes of matrices that wait to be laid out; until then each has two copies."""

    def __init__(self, most: int) -> None:
        self._most, self._bytes = most, 0
        self._changed = Condition()

    def enter(self, amount: int) -> None:
        """Wait until there is room; what is too large for all of it comes in alone."""
        with self._changed:
            self._changed.wait_for(lambda: not self._bytes or self._bytes + amount <= self._most)
            self._bytes += amount

    def leave(self, amount: int) -> None:
        with self._changed:
            self._bytes -= amount
            self._changed.notify_all()


_backlog = Backlog(768 << 20)


class Linear:
    """``x @ matrix.T + bias``, by compiled kernels where there are some for this matrix.

    A CPU's for quantised weights round their inputs to int8, which bfloat16 inputs hardly notice.
    float32 is asked for exactness: for such inputs weights are dequantised, once.
    """

    def __init__(self, matrix: Matrix, bias: Tensor | None = None) -> None:
        self._weights: tuple[Matrix, Tensor | None] | None = (matrix, bias)
        self._product: Product = self._settle
        self._rounding: TakesRounded | None = None
        self._packing: Future[None] | None = None
        if isinstance(matrix, Dense) and matrix.weight.is_cpu:
            amount = matrix.weight.nbytes
            _backlog.enter(amount)
            self._packing = _packer.submit(self._pack, matrix.weight.dtype)
            self._packing.add_done_callback(lambda done: _backlog.leave(amount))
        elif isinstance(matrix, Dense):
            self._pack(matrix.weight.dtype)

    def __call__(self, x: Tokens) -> Tensor:
        """``[tokens, in] -> [tokens, out]``.

        :raises TypeError: tokens are rounded that were not asked for so.
        """
        if not isinstance(x, Rounded):
            return self._product(x)
        if self._rounding is None:
            raise TypeError("rounded tokens for a layer that takes none: ask its group first")
        return self._rounding.quantized(x.values, x.scale, x.dtype)

    def group(self, x: Tensor) -> int | None:
        """By how many columns each it wants tokens rounded to e4m3; None: as they are.

        That depends on the type of ``x`` and on its rows' number, which a recorded step repeats.
        """
        if self._weights is not None:
            self._finish(x.dtype)
        if self._rounding is None or not self._rounding.rounds(x):
            return None
        return self._rounding.group

    @property
    def product(self) -> Product:
        """What multiplies; of weights that wait to be laid out, what would do so first."""
        return self._product

    def _settle(self, x: Tensor) -> Tensor:
        """The first product: what it needs is under way, or depends on ``x``."""
        self._finish(x.dtype)
        return self._product(x)

    def _finish(self, dtype: torch.dtype) -> None:
        if self._packing is not None:
            self._packing.result()
        self._pack(dtype)

    def _pack(self, dtype: torch.dtype) -> None:
        if self._weights is not None:
            self._product = product = _product(*self._weights, dtype)
            self._rounding = product if isinstance(product, TakesRounded) else None
            self._weights = None  # the product has a copy of its own


def _product(matrix: Matrix, bias: Tensor | None, dtype: torch.dtype) -> Product:
    """What multiplies with inputs of this type."""
    if isinstance(matrix, Reordered):
        inner, order = _product(matrix.matrix, bias, dtype), matrix.order
        return lambda x: inner(x[:, order])
    if isinstance(matrix, Dense) or dtype != torch.float32:
        packed = _packed(matrix, bias, dtype)
        if packed is not None:
            return packed
    if isinstance(matrix, Dense):
        return _by_onednn(matrix, bias) or (lambda x: matrices.linear(x, matrix, bias))
    return _product(Dense(matrix.dequantize().to(dtype)), bias, dtype)


def _packed(matrix: Matrix, bias: Tensor | None, dtype: torch.dtype) -> Product | None:
    """By the kernels of the device that the weights are on; None if none takes them."""
    if matrix.device.type != "cuda":
        return cpu.pack(matrix, bias)
    # Imported here: Triton is not there on every system.
    from forebay_kernels.gpu.linear import pack

    return pack(matrix, bias, dtype)


def _by_onednn(matrix: Dense, bias: Tensor | None) -> Product | None:
    """Of bf16 on a CPU, laid out once: 1.3 to 1.6 times as fast as ``F.linear`` for few tokens."""
    if not matrix.weight.is_cpu or matrix.weight.dtype != torch.bfloat16:
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(matrix.weight)

    def product(x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return out

    return product
