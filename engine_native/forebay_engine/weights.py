"""Tensors of a checkpoint's safetensors files, mapped into memory and handed out by name.

Every tensor is taken once, with the shape its place needs; what is missing, misshapen or left over
is an error, so a checkpoint of another kind cannot be served by accident. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from forebay_engine.hf_config import ModelError
from forebay_kernels.matrix import Dense, Matrix

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Weights:
    """An open checkpoint; use as a context manager, and call ``finish`` when all is taken."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.folder = folder
        self.dtype = dtype
        self.device = device
        self._files: dict[str, Any] = {}  # tensor name -> open file
        self._left: set[str] = set()
        self._open = ExitStack()

    def __enter__(self) -> Weights:
        for path in _files(self.folder):
            try:
                file = self._open.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: cannot be read as safetensors: {error}") from error
            self._files.update(dict.fromkeys(file.keys(), file))
        self._left = set(self._files)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor of this name, checked to have this shape, in ``dtype`` or the model's."""
        if name not in self._left:
            what = "is taken twice" if name in self._files else "is missing"
            raise ModelError(f"{self.folder}: the tensor {name} {what}")
        self._left.discard(name)
        tensor: Tensor = self._files[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"{self.folder}: {name} has the shape {list(tensor.shape)}, "
                f"config.json asks for {list(shape)}"
            )
        return tensor.to(self.device, dtype or self.dtype)

    def matrix(self, name: str, out: int, into: int, *, transposed: bool = False) -> Matrix:
        """The weight of the linear layer ``name``, ``[out, into]``, as the checkpoint holds it.

        ``transposed``: plain values are stored as ``[into, out]``.
        """
        if transposed:
            return Dense(self.take(f"{name}.weight", into, out).T.contiguous())
        return Dense(self.take(f"{name}.weight", out, into))

    def stacked(self, name: str, count: int, out: int, into: int) -> list[Matrix]:
        """The weights of ``count`` layers that are stored as one tensor ``[count, out, into]``."""
        return [Dense(weight) for weight in self.take(name, count, out, into)]

    def tied(self, embedding: Tensor) -> Matrix:
        """The embedding ``[vocab, hidden]`` in its second place, as the output layer's weight."""
        return Dense(embedding)

    def skip(self, names: Iterable[str]) -> None:
        """Leave out tensors that some writers store although they follow from others."""
        self._left.difference_update(names)

    def finish(self) -> None:
        """ModelError if a tensor was never taken: then the model is not what we think it is."""
        if self._left:
            some = ", ".join(sorted(self._left)[:5])
            raise ModelError(f"{self.folder}: {len(self._left)} tensors have no place: {some}")


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if any(Path(name).name != name for name in names):
            raise ModelError(f"{index}: names files outside the folder")
        return [folder / name for name in sorted(names)]
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE]
    raise ModelError(
        f"{folder}: neither {_SINGLE} nor {_INDEX} is there; only safetensors are read"
    )
