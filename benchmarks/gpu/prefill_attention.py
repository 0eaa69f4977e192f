"""Attention of chunks and of short rows: how near to the matrix units' rate, or to memory's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from cases import Case
from torch import Tensor

from forebay_kernels import PagedBatch, reference
from forebay_kernels.gpu.prefill_attention import prefill_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Rows of one layer as (tokens held, tokens run); other defaults are those of Llama 3.1 8B."""

    rows: tuple[tuple[int, int], ...]
    what: str
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    page: int = 32
    window: int | None = None
    fp8: bool = False
    goal: float | None = None

    def name(self) -> str:
        kind = f"{self.heads}/{self.kv_heads} heads of {self.dim}, pages of {self.page}"
        more = ["fp8" if self.fp8 else "", f"window {self.window}" if self.window else ""]
        return "prefill_attention: " + ", ".join([self.what, kind, *filter(None, more)])

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


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    for shape in SMALL if small else SHAPES:
        yield _case(shape, device, torch.float16 if small else torch.bfloat16)


def _case(shape: Shape, device: torch.device, dtype: torch.dtype) -> Case:
    lengths = [length for length, _ in shape.rows]
    pages = [-(-length // shape.page) for length in lengths]
    order = torch.randperm(sum(pages), device=device).int()
    tables = torch.zeros((len(pages), max(pages)), dtype=torch.int32, device=device)
    for row, own in enumerate(order.split(pages)):  # type: ignore[no-untyped-call]
        tables[row, : len(own)] = own
    starts = tuple(accumulate((count for _, count in shape.rows), initial=0))
    batch = PagedBatch(
        query_starts=starts,
        seq_lens=tuple(lengths),
        num_decodes=0,
        block_tables=tables,
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        slots=torch.full((starts[-1],), -1, device=device),
    )
    query = torch.randn((starts[-1], shape.heads, shape.dim), dtype=dtype, device=device)
    size = (shape.kv_heads, sum(pages), shape.page, shape.dim)
    keys, values = (torch.randn(size, dtype=dtype, device=device) for _ in range(2))
    settings: dict[str, Any] = {"scale": shape.dim**-0.5, "window": shape.window}
    if shape.fp8:
        keys, values = keys.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn)
        scale = torch.linspace(0.5, 2.0, shape.kv_heads, device=device)
        settings |= {"key_scale": scale, "value_scale": scale}

    def run() -> Tensor:
        out = torch.empty_like(query)
        prefill_attention(query, keys, values, out, batch, **settings)
        return out

    read = 2 * shape.held() * shape.kv_heads * shape.dim * keys.element_size()
    return Case(
        name=shape.name(),
        run=run,
        reference=partial(
            reference.paged_attention, query.float(), keys, values, batch, **settings
        ),
        tolerance=2e-2 if dtype == torch.bfloat16 else 3e-3,
        bytes=read + 2 * query.numel() * query.element_size(),
        flops=4 * shape.seen() * shape.heads * shape.dim,
        goal=shape.goal,
    )
