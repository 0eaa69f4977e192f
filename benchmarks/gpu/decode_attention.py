"""Paged decode attention: how near to reading each key and value once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from cases import Case
from torch import Tensor

from forebay_kernels import PagedBatch, reference
from forebay_kernels.gpu.decode_attention import decode_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Decode rows of one layer; the defaults are those of Llama 3.1 8B."""

    rows: int
    length: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    page: int = 16
    window: int | None = None
    fp8: bool = False
    #: Lengths from an eighth of ``length`` to fifteen eighths of it, so that it is their mean.
    uneven: bool = False
    goal: float | None = None

    def lengths(self) -> list[int]:
        if not self.uneven:
            return [self.length] * self.rows
        step = self.length * 7 / 4 / max(1, self.rows - 1)
        return [self.length // 8 + round(step * row) for row in range(self.rows)]

    def name(self) -> str:
        kind = f"{self.heads}/{self.kv_heads} heads of {self.dim}, pages of {self.page}"
        more = [
            "fp8" if self.fp8 else "",
            f"window {self.window}" if self.window else "",
            "lengths uneven" if self.uneven else "",
        ]
        shape = f"{self.rows} x {self.length} tokens, {kind}"
        return "decode_attention: " + ", ".join([shape, *filter(None, more)])


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


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    for shape in SMALL if small else SHAPES:
        yield _case(shape, device, torch.float16 if small else torch.bfloat16)


def _case(shape: Shape, device: torch.device, dtype: torch.dtype) -> Case:
    lengths = shape.lengths()
    pages = [-(-length // shape.page) for length in lengths]
    order = torch.randperm(sum(pages), device=device).int()
    tables = torch.zeros((shape.rows, max(pages)), dtype=torch.int32, device=device)
    for row, own in enumerate(torch.split(order, pages)):
        tables[row, : len(own)] = own
    batch = PagedBatch(
        query_starts=tuple(range(shape.rows + 1)),
        seq_lens=tuple(lengths),
        num_decodes=shape.rows,
        block_tables=tables,
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        slots=torch.full((shape.rows,), -1, device=device),
    )
    query = torch.randn((shape.rows, shape.heads, shape.dim), dtype=dtype, device=device)
    size = (shape.kv_heads, sum(pages), shape.page, shape.dim)
    keys, values = (torch.randn(size, dtype=dtype, device=device) for _ in range(2))
    settings: dict[str, Any] = {"scale": shape.dim**-0.5, "window": shape.window}
    if shape.fp8:
        keys, values = keys.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn)
        scale = torch.linspace(0.5, 2.0, shape.kv_heads, device=device)
        settings |= {"key_scale": scale, "value_scale": scale}

    def run() -> Tensor:
        out = torch.empty_like(query)
        decode_attention(query, keys, values, out, batch, **settings)
        return out

    seen = sum(min(length, shape.window or length) for length in lengths)
    read = 2 * seen * shape.kv_heads * shape.dim * keys.element_size()
    return Case(
        name=shape.name(),
        run=run,
        reference=partial(
            reference.paged_attention, query.float(), keys, values, batch, **settings
        ),
        tolerance=2e-2 if dtype == torch.bfloat16 else 3e-3,
        bytes=read + 2 * query.numel() * query.element_size(),
        goal=shape.goal,
    )
