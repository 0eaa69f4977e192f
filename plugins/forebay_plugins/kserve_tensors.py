"""Tensors as KServe v2 sends them in binary: little-endian, row by row, and what JSON has instead.

Source: the binary tensor data extension of the KServe v2 protocol, as Triton documents it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence

__all__ = ["flat", "pack", "unpack"]

#: Each datatype's letter for :mod:`struct`. BF16 has none: it is the upper half of an FP32.
_LETTERS = {
    "BOOL": "?",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
}


def flat(data: object) -> Iterator[object]:
    """The elements of lists within lists; JSON may have a tensor nested by its shape or flat."""
    if isinstance(data, list | tuple):
        for part in data:
            yield from flat(part)
    else:
        yield data


def pack(datatype: str, values: Sequence[object]) -> bytes:
    """
    :raises ValueError: a value is not of the datatype, or there is no such datatype.
    """
    try:
        if datatype == "BYTES":
            return b"".join(_string(value) for value in values)
        if datatype == "BF16":
            return b"".join(map(_bf16, values))
        if datatype == "BOOL" and not all(isinstance(value, bool) for value in values):
            raise ValueError("a value of BOOL must be true or false")
        return struct.pack(f"<{len(values)}{_LETTERS[datatype]}", *values)
    except KeyError:
        raise ValueError(f"there is no datatype {datatype!r}") from None
    except (struct.error, OverflowError) as wrong:
        raise ValueError(f"a value is not of {datatype}: {wrong}") from None


def unpack(datatype: str, data: bytes) -> list[object]:
    """
    :raises ValueError: the bytes are no such values, or no text where they should be BYTES.
    """
    try:
        if datatype == "BYTES":
            return list(_strings(data))
        if datatype == "BF16":
            halves = struct.unpack(f"<{len(data) // 2}H", data)
            return list(struct.unpack(f"<{len(halves)}f", _widened(halves)))
        letter = _LETTERS[datatype]
        return list(struct.unpack(f"<{len(data) // struct.calcsize(f'<{letter}')}{letter}", data))
    except KeyError:
        raise ValueError(f"there is no datatype {datatype!r}") from None
    except struct.error as wrong:
        raise ValueError(f"the bytes are no values of {datatype}: {wrong}") from None


def _string(value: object) -> bytes:
    if not isinstance(value, str):
        raise ValueError("a value of BYTES must be a text")
    data = value.encode()
    return struct.pack("<I", len(data)) + data


def _strings(data: bytes) -> Iterator[str]:
    at = 0
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        at += 4 + size
        if at > len(data):
            raise ValueError("a value of BYTES is longer than its tensor")
        yield data[at - size : at].decode()  # UnicodeDecodeError is a ValueError


def _bf16(value: object) -> bytes:
    """To the nearest, ties to even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return struct.pack("<H", min(bits + 0x7FFF + (bits >> 16 & 1), 0xFFFFFFFF) >> 16)


def _widened(halves: Iterable[int]) -> bytes:
    return b"".join(struct.pack("<I", half << 16) for half in halves)
