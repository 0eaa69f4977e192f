"""What stands for CUDA's graphs on a processor, and holds a recorded step to their discipline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

#: What a graph can't do: tell the host a value, or have shapes that depend on one.
#: In inference mode ``item`` and ``bool`` are operators of their own, which show nothing beneath.
FORBIDDEN = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "unique",
    "bincount",
)

Call = tuple[object, ...]


class Calls(TorchDispatchMode):
    """The operators that are called: with which shapes, numbers, and places in memory.

    A tensor is known by its place if it was there before, and by its number if it was made here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Call] = []
        self._made: dict[int, int] = {}
        self._held: list[Tensor] = []  # so that no place is given away twice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func)
        if "aten.lift_fresh" in name:  # a constant of a CPU's operator
            self._make(args[0])
        if any(f"aten.{bad}" in name for bad in FORBIDDEN):
            raise AssertionError(f"a recorded step must not call {name}")
        given = [self._seen(leaf) for leaf in tree_flatten((args, kwargs or {}))[0]]
        out = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(out)[0]:
            if not isinstance(leaf, Tensor):
                continue
            if leaf.untyped_storage().data_ptr() not in self._outer(args, kwargs):
                self._make(leaf)
        self.found.append((name, *given))
        return out

    def _make(self, tensor: Tensor) -> None:
        self._made.setdefault(tensor.untyped_storage().data_ptr(), len(self._made))
        self._held.append(tensor)

    def _seen(self, leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        place = leaf.untyped_storage().data_ptr()
        where = ("made", self._made[place]) if place in self._made else ("there", place)
        return (*where, leaf.storage_offset(), tuple(leaf.shape), leaf.stride(), leaf.dtype)

    def _outer(self, args: Any, kwargs: Any) -> set[int]:
        leaves = tree_flatten((args, kwargs or {}))[0]
        places = {x.untyped_storage().data_ptr() for x in leaves if isinstance(x, Tensor)}
        return places - self._made.keys()


class CheckingRecorder:
    """Replays a step by running it again, which must come to the very same calls.

    A graph would repeat the recorded ones: if a number that the host knows, a shape, or a tensor
    that is not at the place where it was recorded plays a part, the calls differ. ``replays``
    counts, by the number of the recording.
    """

    def __init__(self) -> None:
        self.replays: list[int] = []

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        with Calls() as recorded:
            step()
        number = len(self.replays)
        self.replays.append(0)

        def replay() -> None:
            self.replays[number] += 1
            with Calls() as again:
                step()
            for one, other in zip(recorded.found, again.found, strict=True):
                assert one == other, f"recorded {one}, but replayed {other}"

        return replay
