"""Where kernels load and store under Triton's interpreter, which itself takes any address.

It reads what lies behind a tensor as a GPU would, and mostly nobody notices. With :func:`watch` a
launch fails that touches what lies in none of the tensors that it was given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor


class Memory:
    """The tensors of a launch, and what was loaded while somebody asked."""

    def __init__(self) -> None:
        self._begins: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)
        self._ends: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)
        self._loads: list[npt.NDArray[np.uint64]] | None = None

    def give(self, tensors: list[Tensor]) -> None:
        """These, and no others, may be touched from now on: each from its first value to its last.

        What lies between the rows of a view counts as its own.
        """
        spans = sorted(
            (x.data_ptr(), x.data_ptr() + _reach(x) * x.element_size())
            for x in tensors
            if x.numel()
        )
        runs: list[list[int]] = []  # views of one tensor make one
        for begin, end in spans:
            if runs and begin < runs[-1][1]:
                runs[-1][1] = max(runs[-1][1], end)
            else:
                runs.append([begin, end])
        self._begins = np.array([begin for begin, _ in runs], np.uint64)
        self._ends = np.array([end for _, end in runs], np.uint64)

    def touch(self, pointers: Any, mask: Any, *, loads: bool) -> None:
        """:raises IndexError: one of them lies nowhere, or not where the first one does."""
        at = np.asarray(pointers.data)
        held = np.asarray(mask.data) if mask is not None else np.True_
        at = at[np.broadcast_to(held, at.shape)].ravel()
        if not at.size:
            return
        run = np.searchsorted(self._begins, at, side="right") - 1
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        outside = (run < 0) | (run != run[0]) | (at + size > self._ends[np.maximum(run, 0)])
        if outside.any():
            kind = "loads" if loads else "stores"
            raise IndexError(f"{kind} {outside.sum()} of {at.size} values outside of all tensors")
        if loads and self._loads is not None:
            self._loads.append(at)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        self._loads = []
        try:
            yield
        finally:
            self._loads = None

    def loaded(self, x: Tensor) -> Tensor:
        """Which values of a contiguous tensor were: bool, of its shape; within ``recorded``."""
        found = torch.zeros(x.numel(), dtype=torch.bool)
        for at in self._loads or ():
            own = (at >= x.data_ptr()) & (at < x.data_ptr() + x.nbytes)
            found[torch.from_numpy(((at[own] - x.data_ptr()) // x.element_size()).astype(int))] = (
                True
            )
        return found.view(x.shape)


def _reach(x: Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def watch(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """Let the interpreter ask before it touches anything."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    memory = Memory()
    given, load = GridExecutor._init_args_hst, InterpreterBuilder.create_masked_load
    store, update = InterpreterBuilder.create_masked_store, InterpreterBuilder.create_atomic_rmw
    swap = InterpreterBuilder.create_atomic_cas

    def give(self: Any, args: Any, kwargs: Any) -> Any:
        found = given(self, args, kwargs)
        memory.give([x for x in (*found[0], *found[1].values()) if isinstance(x, Tensor)])
        return found

    def load_seen(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        memory.touch(pointers, mask, loads=True)
        return load(self, pointers, mask, *rest)

    def store_seen(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        memory.touch(pointers, mask, loads=False)
        return store(self, pointers, value, mask, *rest)

    def update_seen(self: Any, kind: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        memory.touch(pointers, mask, loads=False)
        return update(self, kind, pointers, value, mask, *rest)

    def swap_seen(self: Any, pointers: Any, *rest: Any) -> Any:
        memory.touch(pointers, None, loads=False)
        return swap(self, pointers, *rest)

    monkeypatch.setattr(GridExecutor, "_init_args_hst", give)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", load_seen)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", store_seen)
    monkeypatch.setattr(InterpreterBuilder, "create_atomic_rmw", update_seen)
    monkeypatch.setattr(InterpreterBuilder, "create_atomic_cas", swap_seen)
    return memory
