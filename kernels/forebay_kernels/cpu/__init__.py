"""Operators for CPUs in C++ (``native/``), compiled for this machine when they are first needed."""

from __future__ import annotations

from forebay_kernels.cpu.library import available, enabled, set_threads
from forebay_kernels.cpu.linear import DenseLinear, PackedLinear, pack
from forebay_kernels.cpu.memory import borrow_from
from forebay_kernels.cpu.operators import rows_of
from forebay_kernels.cpu.rounding import round_to_int8
from forebay_kernels.cpu.screen import Screen, screens
from forebay_kernels.cpu.tape import Tape, recording

__all__ = [
    "DenseLinear",
    "PackedLinear",
    "Screen",
    "Tape",
    "available",
    "borrow_from",
    "enabled",
    "pack",
    "recording",
    "round_to_int8",
    "rows_of",
    "screens",
    "set_threads",
]
