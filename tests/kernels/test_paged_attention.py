"""Paged attention, eager and compiled, against the reference in float64 on awkward shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import forebay_kernels as kernels
from forebay_kernels import cpu, gather

#: (tokens held, tokens run): lengths 0 and 1, page edges at 16, and rows long enough to be split.
DECODES = [(1, 1), (0, 1), (15, 1), (16, 1), (17, 1), (130, 1), (301, 1)]
CHUNKS = [(5, 5), (40, 7), (33, 16), (64, 48)]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 20, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_batch(
    path: str, make_case: Any, dtype: torch.dtype, window: int | None, softcap: float | None
) -> None:
    case = make_case(DECODES + CHUNKS, dtype=dtype)
    settings: dict[str, Any] = {"scale": 0.125, "window": window, "softcap": softcap}
    got = kernels.paged_attention(case.query, case.keys, case.values, case.batch, **settings)
    case.assert_near(got, **settings)
    assert not got[1].any()  # the row that holds nothing


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (6, 2), (8, 8), (14, 2)])
@pytest.mark.parametrize("dim", [16, 80, 256])
def test_mixed_batch_shapes(path: str, make_case: Any, heads: int, kv_heads: int, dim: int) -> None:
    case = make_case(DECODES + CHUNKS, heads=heads, kv_heads=kv_heads, dim=dim, block_size=5)
    got = kernels.paged_attention(
        case.query, case.keys, case.values, case.batch, scale=dim**-0.5, window=30
    )
    case.assert_near(got, scale=dim**-0.5, window=30)


def test_sinks_take_their_share(make_case: Any) -> None:
    """As one token more that every query sees: its value is nothing."""
    case = make_case(DECODES + CHUNKS, heads=4, kv_heads=2, dtype=torch.float64)
    sinks = torch.tensor([0.5, -1.0, 2.0, -torch.inf], dtype=torch.float64)
    values = torch.ones_like(case.values)

    def attended(of: Tensor, **settings: Any) -> Tensor:
        return kernels.paged_attention(case.query, case.keys, of, case.batch, scale=0.3, **settings)

    share = attended(values, sinks=sinks)[..., :1]  # of all other tokens together
    torch.testing.assert_close(
        attended(case.values, sinks=sinks), attended(case.values) * share, rtol=1e-9, atol=1e-12
    )
    assert bool((share[2:, :3] < 1.0).all())
    only = torch.sigmoid(0.3 * (case.query[0] * own_key(case)).sum(-1) - sinks)  # one token held
    torch.testing.assert_close(share[0, :, 0], only)


def own_key(case: Any) -> Tensor:
    """The key of the first row's only token, for each of 4 heads: ``[4, dim]``."""
    page = int(case.batch.block_tables[0, 0])
    key: Tensor = case.keys[:, page, 0].repeat_interleave(2, dim=0)
    return key


def test_neighbouring_pages_are_read_in_place(make_case: Any) -> None:
    """One row over pages in order: a view of the cache, no copy, the same result."""
    case = make_case([(70, 1)], spare_pages=0)
    order = case.batch.block_tables[0, :5].long()
    keys, values = case.keys[:, order], case.values[:, order]
    batch = kernels.PagedBatch(
        query_starts=(0, 1),
        seq_lens=(70,),
        num_decodes=1,
        block_tables=torch.arange(5, dtype=torch.int32).unsqueeze(0),
        lengths=case.batch.lengths,
        slots=case.batch.slots,
    )
    part = gather.plan_gathers(batch, keys, None)[0]
    assert part.read(keys, keys.dtype).data_ptr() == keys.data_ptr()
    got = kernels.paged_attention(case.query, keys, values, batch, scale=0.1)
    case.assert_near(got, scale=0.1)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 200, 300])
def test_long_rows_are_read_in_spans(
    path: str, make_case: Any, window: int | None, softcap: float | None
) -> None:
    rows = [(256, 1), (257, 1), (700, 1), (300, 100), (520, 9)]
    case = make_case(rows, heads=3, kv_heads=1, dim=32, dtype=torch.bfloat16)
    settings: dict[str, Any] = {"scale": 0.2, "window": window, "softcap": softcap}
    got = kernels.paged_attention(case.query, case.keys, case.values, case.batch, **settings)
    case.assert_near(got, **settings)


def test_queries_may_lie_among_keys_and_values(path: str, make_case: Any) -> None:
    """Attention takes the queries where the projection left them."""
    case = make_case(DECODES + CHUNKS)
    wide = torch.full((len(case.query), 9, 64), float("nan"))
    wide[:, :4] = case.query
    got = kernels.paged_attention(wide[:, :4], case.keys, case.values, case.batch, scale=0.1)
    case.assert_near(got, scale=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 40, 300])
def test_a_query_depends_on_no_other(
    make_case: Any, dtype: torch.dtype, window: int | None
) -> None:
    """Decoded, in a chunk, beside others, by one thread or three: the same bits."""
    chunk = make_case([(640, 640)], dtype=dtype)
    settings: dict[str, Any] = {"scale": 0.3, "window": window}
    caches = chunk.keys, chunk.values
    whole = kernels.paged_attention(chunk.query, *caches, chunk.batch, **settings)
    ends = [1, 31, 255, 256, 257, 300, 511, 512, 513, 640]
    batch = kernels.PagedBatch(
        query_starts=tuple(range(len(ends) + 1)),
        seq_lens=tuple(ends),
        num_decodes=len(ends),
        block_tables=chunk.batch.block_tables.expand(len(ends), -1).contiguous(),
        lengths=torch.tensor(ends, dtype=torch.int32),
        slots=torch.zeros(len(ends), dtype=torch.int64),
    )
    last = torch.tensor(ends) - 1
    for threads in (1, 3):
        cpu.set_threads(threads)
        found = kernels.paged_attention(chunk.query[last], *caches, batch, **settings)
        assert torch.equal(found, whole[last])
    cpu.set_threads(1)


def test_rows_of_unlike_length_are_not_padded_to_the_longest(make_case: Any) -> None:
    case = make_case([(n, 1) for n in (3, 4, 500, 20, 490, 17)])
    parts = gather.plan_gathers(case.batch, case.keys, None)
    assert [part.rows for part in parts] == [2, 4]
    read = sum(part.rows * part.pages_per_row for part in parts)
    assert read <= 2 * sum(-(-n // 16) for n in case.batch.seq_lens)


def test_gathers_stay_small(make_case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([(64, 1)] * 9)
    monkeypatch.setattr(gather, "GATHER_BYTES", 3 * 4 * 2 * 16 * 64 * 4)  # three rows' pages
    assert [part.rows for part in gather.plan_gathers(case.batch, case.keys, None)] == [3, 3, 3]


@pytest.mark.parametrize(("softcap", "sunk"), [(None, False), (2.0, False), (None, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_caches_are_read_by_their_scales(
    make_case: Any, dtype: torch.dtype, softcap: float | None, sunk: bool
) -> None:
    case = make_case(DECODES + CHUNKS, dtype=dtype).in_fp8()
    sinks = torch.linspace(-1.0, 1.0, 4) if sunk else None
    settings: dict[str, Any] = {"scale": 0.125, "window": 40, "softcap": softcap, "sinks": sinks}
    got = kernels.paged_attention(
        case.query, case.keys, case.values, case.batch, **settings, **case.scales
    )
    case.assert_near(got, **settings)
    assert not got[1].any()
