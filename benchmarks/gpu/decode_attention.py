"""Paged decode attention: how near to reading each key and value once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from cases import Attention, Case, Make

from forebay_kernels.gpu.decode_attention import decode_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape(Attention):
    """Decode rows of one layer."""

    rows: int
    length: int
    page: int = 16
    #: Lengths from an eighth of ``length`` to fifteen eighths of it, so that it is their mean.
    uneven: bool = False

    def lengths(self) -> list[int]:
        if not self.uneven:
            return [self.length] * self.rows
        step = self.length * 7 / 4 / max(1, self.rows - 1)
        return [self.length // 8 + round(step * row) for row in range(self.rows)]

    def name(self) -> str:
        more = ["lengths uneven"] if self.uneven else []
        shape = f"{self.rows} x {self.length} tokens"
        return "decode_attention: " + ", ".join([shape, *self.kind(), *more])


#: The share of the copy ceiling that is asked for from 65,536 tokens on.
GOAL = 0.85

SHAPES = [
    *(Shape(rows=64, length=1024, page=page, goal=GOAL) for page in (16, 32, 64)),
    Shape(rows=64, length=1024, heads=64, goal=GOAL),
    Shape(rows=64, length=1024, uneven=True, goal=GOAL),
    Shape(rows=256, length=1024, goal=GOAL),
    Shape(rows=16, length=4096, goal=GOAL),
    Shape(rows=8, length=8192, goal=GOAL),
    Shape(rows=1, length=32768, goal=0.6),
    Shape(rows=1, length=1024),
    Shape(rows=64, length=1024, heads=16),  # Qwen3 0.6B
    Shape(rows=256, length=2048, heads=4, kv_heads=1, dim=256, window=512),  # Gemma 3 270M
    *(Shape(rows=128, length=1024, page=page, fp8=True) for page in (16, 64)),
    Shape(rows=1, length=32768, fp8=True),
]

SMALL = [
    Shape(rows=3, length=40, heads=4, kv_heads=1, dim=64, uneven=True),
    Shape(rows=2, length=33, heads=2, kv_heads=1, dim=64, page=64, fp8=True),
]


def cases(device: torch.device, small: bool) -> Iterator[Make]:
    for shape in SMALL if small else SHAPES:
        yield partial(_case, shape, device, small)


def _case(shape: Shape, device: torch.device, small: bool) -> Case:
    lengths = shape.lengths()
    seen = sum(min(length, shape.window or length) for length in lengths)
    rows = [(length, 1) for length in lengths]
    return shape.case(decode_attention, shape.name(), rows, device, small=small, held=seen)
