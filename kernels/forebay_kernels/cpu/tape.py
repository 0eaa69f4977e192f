"""Calls of compiled kernels that are recorded, to be made again in one go.

Between two operators Python takes some 10 µs, in which memory is at rest and the second thread goes
to sleep; a step has hundreds of them. A tape is the list of a step's calls with the addresses that
they had. Whoever replays it has written new contents to the recorded inputs before, and finds the
result where it was.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import Structure, byref, c_double
from typing import Any

import torch
from torch import Tensor

from forebay_kernels.cpu.library import Call, library

_recording = threading.local()


class Tape:
    """What was called while it was ``recording``.

    Results lie in memory of its own, which is used again once nobody holds them any more, in a
    replay as in the recording.

    :param inputs: all that the calls read which is not a weight; written anew before each replay.
    """

    def __init__(self, *inputs: Tensor) -> None:
        #: Whether all that the calls read are inputs, or written by earlier calls: then nothing
        #: else computed in between.
        self.complete = True
        self._held: list[Any] = [*inputs]  # what the calls' addresses point to
        self._known = {_memory(tensor) for tensor in inputs}
        self._free: dict[int, list[Tensor]] = {}  # by their size
        self._calls: list[Call] = []
        self._names: list[str] = []
        self._array: Any = None

    def __len__(self) -> int:
        """The number of calls."""
        return len(self._calls)

    def add(
        self,
        kernel: Any,
        args: Structure,
        element: int,
        reads: tuple[Tensor, ...],
        writes: tuple[Tensor, ...],
    ) -> None:
        """Record a call that was just made."""
        self.complete &= self._known.issuperset(map(_memory, reads))
        self._known.update(map(_memory, writes))
        self._held.append(args)
        address = ctypes.cast(kernel, ctypes.c_void_p)
        self._calls.append(Call(address, ctypes.addressof(args), element))
        self._names.append(kernel.__name__.removeprefix("forebay_"))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for a result."""
        size = math.prod(shape) * dtype.itemsize
        free = self._free.setdefault(size, [])
        if not free:
            free.append(torch.empty(size, dtype=torch.uint8))
            self._held.append(free[0])
        block = free.pop()
        # The tensor and all of its views hold the lease; behind the last of them it ends.
        lease = (ctypes.c_char * size).from_address(block.data_ptr())
        weakref.finalize(lease, free.append, block).atexit = False
        return torch.frombuffer(lease, dtype=dtype).view(*shape)

    def replay(self) -> None:
        """Make all calls again, in their order."""
        self._replay(None)

    def timed_replay(self) -> list[tuple[str, float]]:
        """The same; each call's operator and seconds."""
        seconds = (c_double * len(self._calls))()
        self._replay(seconds)
        return list(zip(self._names, seconds, strict=True))

    def _replay(self, seconds: Any) -> None:
        if self._array is None:
            self._array = (Call * len(self._calls))(*self._calls)
        library().replay(self._array, len(self._array), seconds)


@contextmanager
def recording(tape: Tape) -> Iterator[None]:
    """Record this thread's calls meanwhile."""
    _recording.tape = tape
    try:
        yield
    finally:
        _recording.tape = None


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for an operator's result."""
    tape: Tape | None = getattr(_recording, "tape", None)
    return torch.empty(shape, dtype=dtype) if tape is None else tape.empty(shape, dtype)


def call(
    kernel: Any,
    args: Structure,
    element: int,
    reads: tuple[Tensor, ...],
    writes: tuple[Tensor, ...],
) -> None:
    """Call an operator that takes its arguments by address.

    :param element: bytes of an element.
    :param reads: what it reads, weights and caches left out.
    """
    kernel(byref(args), element)
    tape: Tape | None = getattr(_recording, "tape", None)
    if tape is not None:
        tape.add(kernel, args, element, reads, writes)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
