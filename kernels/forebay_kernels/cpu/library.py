"""The compiled kernels as functions: what ``native/kernels.cpp`` exports, with its types."""

from __future__ import annotations

import ctypes
import logging
import os
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from forebay_kernels.cpu.compiler import CannotCompile, compiled

#: ``auto``: compiled where they can be; ``torch``: never; ``compiled``: always, or an error.
CHOICE = "FOREBAY_CPU_KERNELS"
#: Types that the kernels know.
DTYPES = (torch.float32, torch.bfloat16)

log = logging.getLogger(__name__)


class DenseMatrix(Structure):
    """Packed weights of a linear layer."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("panels", c_void_p),
        ("bias", c_void_p),  # [out] float32, or None
        ("out", c_int64),
        ("into", c_int64),
    ]


class QuantizedMatrix(Structure):
    """Packed bytes or nibbles of a linear layer, with scales and zeros of groups."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("panels", c_void_p),
        ("scale", c_void_p),  # [panels, groups, 32] float32
        ("zero", c_void_p),  # the same, or None: same_zero
        ("bias", c_void_p),  # [out] float32, or None
        ("codes", c_void_p),  # [16] uint8, or None
        ("out", c_int64),
        ("into", c_int64),
        ("group", c_int64),
        ("bits", c_int32),
        ("same_zero", c_float),
    ]


class LinearArgs(Structure):
    """A product with a packed matrix; strides in elements."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("matrix", c_void_p),
        ("x", c_void_p),
        ("out", c_void_p),
        ("x_stride", c_int64),
        ("out_stride", c_int64),
        ("rows", c_int64),
        ("chosen", c_void_p),  # [count] int32, or None: all panels
        ("count", c_int64),
    ]


class ScreenMatrix(Structure):
    """Packed weights rounded to int8, and how far from the weights they are."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("panels", c_void_p),
        ("scale", c_void_p),  # [panels * 32] float32, as the other two
        ("error", c_void_p),
        ("length", c_void_p),
        ("out", c_int64),
        ("into", c_int64),
    ]


class Draws(Structure):
    """What is drawn behind each row."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("inverse", c_void_p),  # [rows] float32: 1 / temperature, or 0: greedy
        ("keys", c_void_p),  # [rows] uint64
    ]


class AttentionArgs(Structure):
    """One layer's attention of a step; strides in elements."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("query", c_void_p),
        ("query_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("tables", c_void_p),
        ("table_stride", c_int64),
        ("starts", c_void_p),
        ("lengths", c_void_p),
        ("rows", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("dim", c_int64),
        ("pages", c_int64),
        ("block_size", c_int64),
        ("window", c_int64),  # 0: none
        ("scale", c_float),
        ("softcap", c_float),  # 0: none
    ]


class QkvArgs(Structure):
    """Norm, rotation and storing of a step's queries, keys and values."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("qkv", c_void_p),
        ("stride", c_int64),
        ("norm", c_void_p),
        ("cosine", c_void_p),
        ("sine", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("slots", c_void_p),
        ("tokens", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("dim", c_int64),
        ("half", c_int64),
        ("cached", c_int64),
        ("eps", c_float),
    ]


class ResidualArgs(Structure):
    """Addition to the residual stream, and the norm of the result."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("stream", c_void_p),
        ("added", c_void_p),
        ("inner", c_void_p),
        ("outer", c_void_p),
        ("out", c_void_p),
        ("rows", c_int64),
        ("width", c_int64),
        ("eps", c_float),
    ]


class NormArgs(Structure):
    """The norm of each row."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("x", c_void_p),
        ("weight", c_void_p),
        ("out", c_void_p),
        ("rows", c_int64),
        ("width", c_int64),
        ("eps", c_float),
    ]


class GateArgs(Structure):
    """The gate of an MLP."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("x", c_void_p),
        ("out", c_void_p),
        ("rows", c_int64),
        ("width", c_int64),
        ("kind", c_int32),
    ]


class Call(Structure):
    """One of the operators that take their arguments by address."""

    _fields_: ClassVar[list[tuple[str, Any]]] = [
        ("run", c_void_p),
        ("args", c_void_p),
        ("element", c_int64),
    ]


_INT, _LONG, _POINTER = c_int32, c_int64, c_void_p
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "threads": (None, [_INT]),
    "packed_bytes": (_LONG, [_LONG, _LONG]),
    "huge_pages": (None, [_POINTER, _LONG]),
    "pack": (None, [_POINTER, _LONG, _LONG, _LONG, _POINTER]),
    "linear": (None, [POINTER(LinearArgs), _INT]),
    "replay": (None, [POINTER(Call), _LONG, POINTER(c_double)]),
    "screens": (_INT, []),
    "make_screen": (None, [_INT, _POINTER, _LONG, POINTER(ScreenMatrix)]),
    "screen": (
        _LONG,
        [POINTER(ScreenMatrix), _INT, _POINTER, _LONG, _LONG, POINTER(Draws), _POINTER, _LONG],
    ),
    "quantized_linear": (None, [POINTER(LinearArgs), _INT]),
    "round_to_int8": (None, [_INT, _POINTER, _LONG, _LONG, _POINTER, _POINTER]),
    "attention": (None, [POINTER(AttentionArgs), _INT]),
    "prepare_qkv": (None, [POINTER(QkvArgs), _INT]),
    "add_and_norm": (None, [POINTER(ResidualArgs), _INT]),
    "norm": (None, [POINTER(NormArgs), _INT]),
    "gate": (None, [POINTER(GateArgs), _INT]),
    "argmax": (None, [_INT, _POINTER, _LONG, _LONG, _LONG, _POINTER]),
}


@cache
def library() -> Any:
    """The kernels, or None where they are not wanted or cannot be had, which is logged once.

    :raises CannotCompile: ``FOREBAY_CPU_KERNELS=compiled``, but they can't be.
    """
    choice = os.environ.get(CHOICE, "auto")
    if choice not in ("auto", "torch", "compiled"):
        raise CannotCompile(f"{CHOICE}={choice!r} is not one of auto, torch, compiled")
    if choice == "torch":
        return None
    try:
        found = ctypes.CDLL(str(compiled()))
    except (CannotCompile, OSError) as error:
        if choice == "compiled":
            raise CannotCompile(f"{CHOICE}=compiled, but {error}") from error
        log.warning("the CPU kernels are torch's, which are slower: %s", error)
        return None
    for name, (result, arguments) in _FUNCTIONS.items():
        function = found[f"forebay_{name}"]
        function.restype, function.argtypes = result, arguments
        setattr(found, name, function)
    return found


def enabled() -> bool:
    """Whether there are compiled kernels."""
    return library() is not None


def available(x: Tensor) -> bool:
    """Whether the kernels can take this tensor."""
    return x.is_cpu and x.dtype in DTYPES and library() is not None


def set_threads(threads: int) -> None:
    """Share each operator among so many threads, the caller's one of them."""
    kernels = library()
    if kernels is not None:
        kernels.threads(threads)
