"""GGUF files: metadata read whole, tensors mapped into memory.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Read here rather than by the gguf
package's reader, which makes an array of each of a vocabulary's 262144 tokens, scores and types:
thirty seconds on a busy machine, where this takes one. Its decoders of blocks are used as they are.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from forebay_engine.hf_config import ModelError

#: The file's name in the folder that ``gguf.model_folder`` makes.
MODEL_FILE = "model.gguf"

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
#: Type numbers of scalar values in the metadata, as struct and numpy name them.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
#: Values dequantised at once: 1 MiB of float32.
_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies and what it is."""

    name: str
    shape: tuple[int, ...]  # slowest axis first, as torch names it
    kind: GGMLQuantizationType
    blocks: npt.NDArray[np.uint8]  # [rows, bytes of a row], mapped from the file

    def chunks(self) -> list[slice]:
        """The rows, a few at a time."""
        step = max(1, _CHUNK // self.shape[-1])
        return [slice(start, start + step) for start in range(0, len(self.blocks), step)]

    def values(self, rows: slice) -> npt.NDArray[np.float32]:
        """Of these rows: ``[rows, shape[-1]]``."""
        found = dequantize(self.blocks[rows], self.kind)
        return np.require(found, np.float32, "W")  # plain values are still the file's


class GgufFile:
    """``metadata`` by key, ``tensors`` by name."""

    def __init__(self, path: Path) -> None:
        """:raises ModelError: not such a file, or one that ends early."""
        self.path = path
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 4
        if self._data[:4] != _MAGIC:
            raise ModelError(f"{path} is no GGUF file")
        try:
            (version,) = self._take("I")
            if version not in _VERSIONS:
                raise ModelError(f"{path}: GGUF version {version} is not supported; write it again")
            count, entries = self._take("QQ")
            self.metadata = {self._string(): self._value() for _ in range(entries)}
            headers = [self._header() for _ in range(count)]
        except struct.error as error:
            raise ModelError(f"{path} ends within its header; fetch it again") from error
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        start = -(-self._at // alignment) * alignment
        self.tensors = {header[0]: self._tensor(start, *header) for header in headers}

    def _take(self, kinds: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{kinds}", self._data, self._at)
        self._at += struct.calcsize(f"<{kinds}")
        return found

    def _string(self) -> str:
        (length,) = self._take("Q")
        text = self._data[self._at : self._at + length]
        self._at += length
        return text.decode("utf-8", "replace")

    def _value(self, kind: int | None = None) -> Any:
        kind = self._take("I")[0] if kind is None else kind
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            of, count = self._take("IQ")
            if of in _SCALARS:
                return list(self._take(f"{count}{_SCALARS[of]}"))
            return [self._value(of) for _ in range(count)]
        if kind not in _SCALARS:
            raise ModelError(f"{self.path}: metadata of the unknown type {kind}")
        return self._take(_SCALARS[kind])[0]

    def _header(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (axes,) = self._take("I")
        shape = tuple(reversed(self._take(f"{axes}Q")))  # the fastest axis comes first there
        kind, offset = self._take("IQ")
        return name, shape, kind, offset

    def _tensor(
        self, start: int, name: str, shape: tuple[int, ...], number: int, offset: int
    ) -> GgufTensor:
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise ModelError(
                f"{self.path}: {name} is of the unknown type {number}; a newer gguf package may "
                "know it"
            ) from error
        values, size = GGML_QUANT_SIZES[kind]
        row = shape[-1] // values * size
        rows = int(np.prod(shape[:-1], dtype=np.int64))
        begin = start + offset
        if begin + rows * row > len(self._data):
            raise ModelError(f"{self.path} ends within {name}; fetch it again")
        blocks = np.frombuffer(self._data, np.uint8, rows * row, begin).reshape(rows, row)
        return GgufTensor(name, shape, kind, blocks)
