"""Attention of chunks and of short rows: how near to the matrix units' rate, or to memory's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from cases import Attention, Case, Make

from forebay_kernels.gpu.prefill_attention import prefill_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape(Attention):
    """Rows of one layer as (tokens held, tokens run)."""

    rows: tuple[tuple[int, int], ...]
    what: str

    def name(self) -> str:
        return "prefill_attention: " + ", ".join([self.what, *self.kind()])

    def seen(self) -> int:
        """Slots that the queries see, counted for each query."""
        limit = self.window or max(length for length, _ in self.rows)
        return sum(
            min(position, limit)
            for length, count in self.rows
            for position in range(length - count + 1, length + 1)
        )

    def held(self) -> int:
        """Slots that any query of their row sees."""
        reach = self.window or max(length for length, _ in self.rows)
        return sum(min(length, reach + count - 1) for length, count in self.rows)


#: 400 TFLOP/s, of 790 that a matrix product reaches in bfloat16.
GOAL = 400 / 790

PROMPT = ((8192, 8192),)
SHAPES = [
    *(Shape(rows=PROMPT, what="8k prompt", page=page, goal=GOAL) for page in (16, 32, 128)),
    Shape(rows=((2048, 2048),), what="2k prompt"),
    Shape(rows=((2048, 2048),) * 4, what="4 prompts of 2k"),
    Shape(rows=((16896, 512),), what="chunk of 512 behind 16k"),
    Shape(rows=((32768, 64),), what="chunk of 64 behind 32k"),
    Shape(rows=((1029, 5),) * 64, what="64 x 5 guesses behind 1k"),
    Shape(rows=((32773, 5),), what="5 guesses behind 32k"),
    Shape(rows=((1029, 5),) * 48 + ((2048, 2048),), what="48 x 5 guesses and a 2k prompt"),
    Shape(rows=PROMPT, what="8k prompt", heads=16),  # Qwen3 0.6B
    Shape(rows=PROMPT, what="8k prompt", heads=4, kv_heads=1, dim=256, window=512),  # Gemma 3 270M
    Shape(rows=PROMPT, what="8k prompt", fp8=True),
]

SMALL = [
    Shape(rows=((40, 40), (70, 9)), what="small", heads=4, kv_heads=2, dim=64),
    Shape(rows=((70, 5),) * 2, what="small guesses", heads=2, kv_heads=1, dim=64, fp8=True),
]


def cases(device: torch.device, small: bool) -> Iterator[Make]:
    for shape in SMALL if small else SHAPES:
        yield partial(_case, shape, device, small)


def _case(shape: Shape, device: torch.device, small: bool) -> Case:
    return shape.case(
        prefill_attention,
        shape.name(),
        shape.rows,
        device,
        small=small,
        held=shape.held(),
        flops=4 * shape.seen() * shape.heads * shape.dim,
    )
