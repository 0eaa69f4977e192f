"""That tests of kernels see what touches memory that is not theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from forebay_kernels.gpu.decode_attention import decode_attention
from forebay_kernels.gpu.prefill_attention import prefill_attention
from kernel_memory import Memory

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="only the interpreter can be asked"
)


@triton.jit
def _copy(source: Any, target: Any, count: Any, MASKED: tl.constexpr, TILE: tl.constexpr) -> None:
    at = tl.arange(0, TILE)
    held = at < count if MASKED else at < TILE
    tl.store(target + at, tl.load(source + at, mask=held), mask=at < count)


@triton.jit
def _count(target: Any, count: Any, TILE: tl.constexpr) -> None:
    at = tl.arange(0, TILE)
    tl.atomic_add(target + at, 1, mask=at <= count)


def test_loads_and_stores_outside_of_a_launch_s_tensors_fail() -> None:
    whole = torch.arange(32)
    _copy[(1,)](whole[:13], torch.zeros(13), 13, MASKED=True, TILE=16)
    with pytest.raises(Exception, match="loads 3 of 16 values outside"):
        _copy[(1,)](whole[:13], torch.zeros(13), 13, MASKED=False, TILE=16)
    with pytest.raises(Exception, match="stores 1 of 13 values outside"):
        _copy[(1,)](whole, torch.zeros(12), 13, MASKED=True, TILE=16)
    _count[(1,)](whole[:13], 12, TILE=16)
    with pytest.raises(Exception, match="stores 1 of 14 values outside"):
        _count[(1,)](whole[:13], 13, TILE=16)


def test_what_was_loaded_is_known(memory: Memory) -> None:
    whole = torch.arange(12).view(3, 4)
    with memory.recorded():
        _copy[(1,)](whole[1:], torch.zeros(5), 5, MASKED=True, TILE=8)
        loaded = memory.loaded(whole)
    assert loaded.int().tolist() == [[0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


@pytest.mark.parametrize("block_size", [8, 24, 64])
@pytest.mark.parametrize("window", [None, 20])
def test_attention_reads_no_page_number_behind_a_row_s_end(
    make_case: Any, memory: Memory, block_size: int, window: int | None
) -> None:
    """Though it reads them a tile ahead: behind the last row's there may be nothing."""
    rows = [(9, 1), (0, 1), (130, 1), (40, 7), (300, 70), (33, 16)]
    case = make_case(rows, dim=16, block_size=block_size, dtype=torch.float16)
    batch = case.batch
    settings: dict[str, Any] = {"scale": 0.25, "window": window}
    with memory.recorded():
        for attention in (decode_attention, prefill_attention):
            out = torch.empty_like(case.query)
            attention(case.query, case.keys, case.values, out, batch, **settings)
        read = memory.loaded(batch.block_tables)
    for row, (length, count) in enumerate(rows):
        pages = -(-length // block_size)
        seen = 0 if window is None else max(0, length - count - window + 1) // block_size
        assert read[row, seen:pages].all(), rows[row]
        assert not read[row, pages:].any(), rows[row]
