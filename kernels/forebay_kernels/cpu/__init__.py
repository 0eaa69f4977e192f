"""Operators for CPUs in C++ (``native/``), compiled for this machine when they are first needed."""

from __future__ import annotations

from forebay_kernels.cpu.library import available, enabled, set_threads
from forebay_kernels.cpu.linear import PackedLinear, pack
from forebay_kernels.cpu.memory import borrow_from

__all__ = ["PackedLinear", "available", "borrow_from", "enabled", "pack", "set_threads"]
