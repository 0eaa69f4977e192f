"""A checkpoint's tensors, mapped into memory and handed out by name: safetensors or a GGUF file.

Every tensor is taken once, with the shape its place needs; what is missing, misshapen or left over
is an error, so a checkpoint of another kind cannot be served by accident. Nothing is unpickled.
Layers are read one at a time, so that memory never holds much beside the finished model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from forebay_engine.gguf_file import MODEL_FILE, GgufFile
from forebay_engine.gguf_weights import GgufWeights
from forebay_engine.hf_config import ModelError
from forebay_engine.quantization import read_format
from forebay_engine.quantization.on_load import ON_LOAD
from forebay_engine.quantization.stored import Format
from forebay_kernels.matrix import Dense, Matrix

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
#: The embedding's name where the decoder itself was stored; in a model with a head it is a part.
_EMBEDDING = "embed_tokens.weight"
#: The output layer's name in every family that stores one.
_HEAD = "lm_head"


class Weights:
    """An open checkpoint; use as a context manager, and call ``finish`` when all is taken."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        quantization: str = "none",
        progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        """``quantization``: what plainly stored layers become; ``none`` or one of ``ON_LOAD``.

        ``progress`` is told the share of the files' bytes that has been handed out, 0 to 1.
        """
        if quantization != "none" and quantization not in ON_LOAD:
            known = ", ".join(("none", *ON_LOAD))
            raise ModelError(f"quantization {quantization!r} is not one of {known}")
        self.folder = folder
        self.dtype = dtype
        self.device = device
        self._on_load = ON_LOAD.get(quantization)
        self._format: Format | None = None
        self._read: dict[str, Callable[[], Tensor]] = {}  # by tensor name
        self._left: set[str] = set()
        self._open = ExitStack()
        self._progress = progress
        self._bytes = self._taken = 0

    def __enter__(self) -> Weights:
        gguf = self.folder / MODEL_FILE
        if gguf.is_file():
            self._bytes = gguf.stat().st_size
            stored = GgufWeights(GgufFile(gguf), self.dtype)
            self._read, self._format = stored.readers(), stored
        else:
            self._open_safetensors()
        self._left = set(self._read)
        return self

    def _open_safetensors(self) -> None:
        for path in _files(self.folder):
            self._bytes += path.stat().st_size if path.is_file() else 0
            try:
                file = self._open.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path}: cannot be read as safetensors: {error}") from error
            names: list[str] = file.keys()
            self._read.update({name: partial(file.get_tensor, name) for name in names})
        if _EMBEDDING in self._read:  # a decoder that was stored without its output layer
            self._read = {f"model.{name}": read for name, read in self._read.items()}
        self._format = read_format(self.folder)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    def __contains__(self, name: str) -> bool:
        return name in self._read

    def claim(self, name: str) -> None:
        """Count the tensor as taken; ModelError if there is none left of this name."""
        if name not in self._left:
            what = "is taken twice" if name in self._read else "is missing"
            raise ModelError(f"{self.folder}: the tensor {name} {what}")
        self._left.discard(name)

    def raw(self, name: str, *shape: int) -> Tensor:
        """The tensor of this name as stored, checked to have this shape if one is given."""
        self.claim(name)
        tensor = self._read[name]()
        self._taken += tensor.nbytes
        self._progress(min(self._taken / self._bytes, 1.0))  # a GGUF's grow when dequantised
        if shape and tuple(tensor.shape) != shape:
            raise ModelError(
                f"{self.folder}: {name} has the shape {list(tensor.shape)}, "
                f"config.json asks for {list(shape)}"
            )
        return tensor

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor of this name, checked to have this shape, in ``dtype`` or the model's."""
        return self.raw(name, *shape).to(self.device, dtype or self.dtype)

    def matrix(self, name: str, out: int, into: int, *, transposed: bool = False) -> Matrix:
        """The weight of the linear layer ``name``, ``[out, into]``.

        As the checkpoint has quantised it; plain values become what ``quantization`` asks for.
        ``transposed``: plain values are stored as ``[into, out]``.
        """
        found = self._format.matrix(self, name, out, into) if self._format is not None else None
        if isinstance(found, Dense):
            return self.settled(found.weight, is_head=name == _HEAD)
        if found is not None:
            return found.to(self.device)
        stored = f"{name}.weight"
        weight = self.raw(stored, into, out).T if transposed else self.raw(stored, out, into)
        return self.settled(weight, is_head=name == _HEAD)

    def stacked(self, name: str, count: int, out: int, into: int) -> list[Matrix]:
        """The weights of ``count`` layers that are stored as one tensor ``[count, out, into]``."""
        return [self.settled(weight) for weight in self.raw(name, count, out, into)]

    def tied(self, embedding: Tensor) -> Matrix:
        """The embedding ``[vocab, hidden]`` in its second place, as the output layer's weight."""
        return self.settled(embedding, is_head=True)

    def settled(self, weight: Tensor, *, is_head: bool = False) -> Matrix:
        """Plain values in the model's type, or quantised from the type that they came in."""
        if not weight.is_floating_point():
            raise ModelError(
                f"{self.folder}: there are weights in {weight.dtype}, and config.json does not say "
                "how they are quantised"
            )
        if self._on_load is None:
            return Dense(weight.to(self.device, self.dtype).contiguous())
        layer, head = self._on_load
        return (head if is_head else layer)(weight.to(self.device))

    def dtype_of(self, name: str) -> torch.dtype:
        """The tensor's type as stored."""
        return self._read[name]().dtype

    def left(self, suffix: str) -> list[str]:
        """Names with this ending that have not been taken."""
        return sorted(name for name in self._left if name.endswith(suffix))

    def skip(self, names: Iterable[str]) -> None:
        """Leave out tensors that some writers store although they follow from others."""
        self._left.difference_update(names)

    def finish(self) -> None:
        """ModelError if a tensor was never taken: then the model is not what we think it is."""
        if self._format is not None:
            self._format.finish(self)
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
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    remedy = (
        f"; {pickled[0].name} is a pickle, which can run any program: load it once where that does "
        "not matter, and save it with transformers' save_pretrained"
        if pickled
        else ""
    )
    raise ModelError(
        f"{folder}: neither {_SINGLE} nor {_INDEX} is there; only safetensors are read{remedy}"
    )
