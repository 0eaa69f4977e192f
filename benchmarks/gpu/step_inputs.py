"""A step's inputs from the table of requests: a decode step of many rows, and one long chunk.

``bytes`` is what is read and written once: 8 bytes of input a token and its three numbers of 8, and
each row's pages twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from cases import Case, Make
from torch import Tensor

from forebay_kernels import reference
from forebay_kernels.gpu.step_inputs import step_inputs

_PAGE = 32
#: Rows, first position and tokens of each.
_STEPS = {"decode": (256, 1000, 1), "chunk": (1, 8192, 8192)}
_SMALL = {"decode": (3, 70, 1), "chunk": (1, 40, 150)}


def cases(device: torch.device, small: bool) -> Iterator[Make]:
    for name, step in (_SMALL if small else _STEPS).items():
        yield partial(_case, name, *step, device)


def _case(name: str, rows: int, start: int, count: int, device: torch.device) -> Case:
    pages = -(-(start + count) // _PAGE)
    return Case(
        name=f"step_inputs: {name}, {rows} rows of {count} behind {start}",
        run=_run(step_inputs, rows, start, count, device),
        reference=_run(reference.step_inputs, rows, start, count, device),
        tolerance=0.0,
        bytes=rows * (count * (4 + 3 * 8) + 2 * 4 * pages + 16),
    )


def _run(
    compute: Callable[..., None], rows: int, start: int, count: int, device: torch.device
) -> Callable[[], tuple[Tensor, ...]]:
    """Fills outputs that stay where they are, as in a captured graph."""

    def whole(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    pages = -(-(start + count) // _PAGE)
    numbers = torch.arange(rows + 1, dtype=torch.int32, device=device)
    tables = torch.arange(rows * pages, dtype=torch.int32, device=device).view(rows, 1, pages)
    tokens = torch.full((rows * count,), -1, dtype=torch.int32, device=device)
    out = {
        "token_ids": whole(rows * count, dtype=torch.int64),
        "positions": whole(rows * count, dtype=torch.int64),
        "lengths": whole(rows),
        "block_tables": whole(1, rows, pages),
        "slots": whole(1, rows * count, dtype=torch.int64),
    }
    starts, query_starts = torch.full_like(numbers[:-1], start), numbers * count

    def run() -> tuple[Tensor, ...]:
        compute(numbers[:-1], starts, query_starts, tokens, numbers, tables, _PAGE, **out)
        return tuple(out.values())

    return run
