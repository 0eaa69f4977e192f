"""The few columns of a product that can hold what is drawn, found by a copy in int8.

A step of a small model with a large vocabulary mostly reads its output layer, and of all these
logits a draw wants the one that is largest, noise included. So they are first computed from weights
rounded to int8, in half the bytes, each with a bound on its error; what cannot be the largest is
left out, and the rest is computed as ever, to the same bits. ``native/screen.h`` has the
arithmetic.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_float, c_uint64

import torch
from torch import Tensor

from forebay_kernels.cpu import memory
from forebay_kernels.cpu.library import Draws, ScreenMatrix, available, library
from forebay_kernels.cpu.linear import PANEL, DenseLinear

#: Of all panels, the share up to which it pays to compute them behind the screen, which takes half
#: of the time of the whole product.
_SHARE = 0.33
#: Calls without a screen after one that did not pay: twice as many each time, up to these.
_LONGEST_PAUSE = 64
#: Inputs up to which the sums stay in 32 bits.
_WIDEST = 1 << 16


class Screen:
    """A copy of the weights behind ``product``, ``[out, in]`` without bias, in int8."""

    def __init__(self, product: DenseLinear, weight: Tensor) -> None:
        """:raises ValueError: there is no screen for such weights."""
        out, into = weight.shape
        if not (available(weight) and into <= _WIDEST):
            raise ValueError(f"no screen for {weight.dtype} [{out}, {into}] on {weight.device}")
        kernels = library()
        panels = -(-out // PANEL)
        self.product = product
        rounded = memory.panels(kernels.packed_bytes(out, into))
        figures = torch.empty(3, panels * PANEL)
        self._held = (rounded, figures)  # what the matrix points to
        self._matrix = ScreenMatrix(
            rounded.data_ptr(), *(part.data_ptr() for part in figures), out, into
        )
        weight = weight.contiguous()
        kernels.make_screen(weight.element_size(), weight.data_ptr(), into, byref(self._matrix))
        self._most = max(1, int(panels * _SHARE))
        self._found = torch.empty(self._most, dtype=torch.int32)
        self._pause, self._next_pause = 0, 1

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, and that a call reads."""
        return sum(tensor.nbytes for tensor in self._held)

    def shortlist(
        self, x: Tensor, temperatures: Sequence[float], keys: Sequence[int]
    ) -> tuple[Tensor, Tensor] | None:
        """Logits among which is what each row of ``x`` draws: ``[rows, n]``, and their ids ``[n]``.

        A row draws the first largest of ``logits / temperature + noise``, where the noise is
        ``forebay_engine.noise.gumbel`` under its key; with temperature 0 of ``logits``. The logits
        are those of the whole product, bit by bit, and their ids rise. None: so many would be left
        that the whole product is better.

        :param x: ``[rows, in]`` in the type of the weights.
        :raises ValueError: it is not, or there is not one temperature and key for each row.
        """
        x, rows = self.product.taken(x), len(x)
        if not len(temperatures) == len(keys) == rows:
            raise ValueError(
                f"of {rows} rows, {len(temperatures)} temperatures and {len(keys)} keys"
            )
        if self._pause:
            self._pause -= 1
            return None
        inverse = (c_float * rows)(*(1.0 / t if t else 0.0 for t in temperatures))
        seeds = (c_uint64 * rows)(*keys)
        draws = Draws(ctypes.addressof(inverse), ctypes.addressof(seeds))
        count: int = library().screen(
            byref(self._matrix),
            x.element_size(),
            x.data_ptr(),
            x.stride(0),
            rows,
            byref(draws),
            self._found.data_ptr(),
            self._most,
        )
        if count > self._most:
            self._pause = self._next_pause
            self._next_pause = min(2 * self._pause, _LONGEST_PAUSE)
            return None
        self._next_pause = 1
        found = self._found[:count]
        ids = (found.long()[:, None] * PANEL + torch.arange(PANEL)).flatten()
        ids = ids[: len(ids) - int((ids[-PANEL:] >= self._matrix.out).sum())]
        return self.product.panels(x, found)[:, : len(ids)], ids


def screens(weight: Tensor) -> bool:
    """Whether a screen of such weights is faster than they are on this machine."""
    return available(weight) and weight.shape[1] <= _WIDEST and bool(library().screens())
