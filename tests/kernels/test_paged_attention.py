"""Paged attention, eager and Triton, against the reference in float64 on awkward shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import forebay_kernels as kernels
from forebay_kernels import cpu, dispatch, eager, gather, reference
from forebay_kernels.gpu.decode_attention import decode_attention

#: Relative error of the result in each type, and what bounds it: rounding of probabilities and sum.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}

#: (tokens held, tokens run): lengths 0 and 1, page edges at 16, and rows long enough to be split.
DECODES = [(1, 1), (0, 1), (15, 1), (16, 1), (17, 1), (130, 1), (301, 1)]
CHUNKS = [(5, 5), (40, 7), (33, 16), (64, 48)]


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    error = (got.double() - want).norm() / want.norm()
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


def by_triton(case: Any, splits: int | None = None, **settings: Any) -> Tensor:
    out = torch.full_like(case.query, float("nan"))
    decode_attention(case.query, case.keys, case.values, out, case.batch, splits=splits, **settings)
    return out


def by_reference(case: Any, **settings: Any) -> Tensor:
    wide = case.wide()
    return reference.paged_attention(wide.query, wide.keys, wide.values, wide.batch, **settings)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 20, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_batch(
    path: str, make_case: Any, dtype: torch.dtype, window: int | None, softcap: float | None
) -> None:
    case = make_case(DECODES + CHUNKS, dtype=dtype)
    settings: dict[str, Any] = {"scale": 0.125, "window": window, "softcap": softcap}
    got = kernels.paged_attention(case.query, case.keys, case.values, case.batch, **settings)
    assert_near(got, by_reference(case, **settings), dtype)
    assert not got[1].any()  # the row that holds nothing


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (6, 2), (8, 8), (14, 2)])
@pytest.mark.parametrize("dim", [16, 80, 256])
def test_mixed_batch_shapes(path: str, make_case: Any, heads: int, kv_heads: int, dim: int) -> None:
    case = make_case(DECODES + CHUNKS, heads=heads, kv_heads=kv_heads, dim=dim, block_size=5)
    got = kernels.paged_attention(
        case.query, case.keys, case.values, case.batch, scale=dim**-0.5, window=30
    )
    assert_near(got, by_reference(case, scale=dim**-0.5, window=30), torch.float32)


def test_sinks_take_their_share(make_case: Any) -> None:
    """As one token more that every query sees: its value is nothing."""
    case = make_case(DECODES + CHUNKS, heads=4, kv_heads=2).wide()
    sinks = torch.tensor([0.5, -1.0, 2.0, -torch.inf], dtype=torch.float64)
    values = torch.ones_like(case.values)

    def attended(of: Tensor, **settings: Any) -> Tensor:
        return kernels.paged_attention(case.query, case.keys, of, case.batch, scale=0.3, **settings)

    share = attended(values, sinks=sinks)[..., :1]  # of all other tokens together
    assert_near(attended(case.values, sinks=sinks), attended(case.values) * share, torch.float64)
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
    assert part.read(keys).data_ptr() == keys.data_ptr()
    got = kernels.paged_attention(case.query, keys, values, batch, scale=0.1)
    assert_near(got, by_reference(case, scale=0.1), torch.float32)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 200, 300])
def test_long_rows_are_read_in_spans(
    path: str, make_case: Any, window: int | None, softcap: float | None
) -> None:
    rows = [(256, 1), (257, 1), (700, 1), (300, 100), (520, 9)]
    case = make_case(rows, heads=3, kv_heads=1, dim=32, dtype=torch.bfloat16)
    settings: dict[str, Any] = {"scale": 0.2, "window": window, "softcap": softcap}
    got = kernels.paged_attention(case.query, case.keys, case.values, case.batch, **settings)
    assert_near(got, by_reference(case, **settings), torch.bfloat16)


def test_queries_may_lie_among_keys_and_values(path: str, make_case: Any) -> None:
    """Attention takes the queries where the projection left them."""
    case = make_case(DECODES + CHUNKS)
    wide = torch.full((len(case.query), 9, 64), float("nan"))
    wide[:, :4] = case.query
    got = kernels.paged_attention(wide[:, :4], case.keys, case.values, case.batch, scale=0.1)
    assert_near(got, by_reference(case, scale=0.1), torch.float32)


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


@pytest.mark.parametrize(
    ("splits", "window", "softcap"),
    [
        (1, None, None),
        (3, None, None),  # 301 slots are 5 tiles: the last share is shorter
        (8, None, 2.0),  # more shares than tiles: some are empty
        (None, None, None),
        (1, 1, None),
        (2, 100, 2.0),
        (None, 100, None),
    ],
)
def test_triton_decode(
    make_case: Any, splits: int | None, window: int | None, softcap: float | None
) -> None:
    case = make_case(DECODES)
    settings: dict[str, Any] = {"scale": 0.125, "window": window, "softcap": softcap}
    got = by_triton(case, splits, **settings)
    assert_near(got, by_reference(case, **settings), torch.float32)
    assert not got[1].any()


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (20, 1)])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_triton_decode_shapes(make_case: Any, heads: int, kv_heads: int, dim: int) -> None:
    case = make_case([(77, 1), (140, 1)], heads=heads, kv_heads=kv_heads, dim=dim, block_size=24)
    assert_near(
        by_triton(case, scale=dim**-0.5), by_reference(case, scale=dim**-0.5), torch.float32
    )


# Triton 3.9's interpreter multiplies bfloat16 as if its bits were integers: on a GPU only.
HALVES = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
def test_triton_decode_in_half_precision(make_case: Any, dtype: torch.dtype) -> None:
    case = make_case(DECODES, dtype=dtype)
    assert_near(by_triton(case, scale=0.125), by_reference(case, scale=0.125), dtype)


def test_triton_decode_survives_huge_scores(make_case: Any) -> None:
    """tanh by exponentials must not turn an overflow into NaN, nor exp2 a large maximum."""
    case = make_case([(90, 1), (1, 1)])
    settings: dict[str, Any] = {"scale": 1e4, "softcap": 30.0}
    assert_near(by_triton(case, **settings), by_reference(case, **settings), torch.float32)


def test_triton_decode_reaches_pages_beyond_32_bits(make_case: Any, device: torch.device) -> None:
    """A page whose first value lies past 2^31 (virtual memory: only what is touched exists)."""
    page = (1 << 31) // (16 * 64) + 5
    case = make_case([(20, 1)], heads=2, kv_heads=1, dtype=torch.float16, spare_pages=0)
    moved = torch.tensor([[page, 1]], dtype=torch.int32, device=device)
    far = []
    for cache in (case.keys, case.values):
        large = torch.empty((1, page + 1, 16, 64), dtype=torch.float16, device=device)
        large[:, moved[0].long()] = cache[:, case.batch.block_tables[0, :2].long()]
        far.append(large)
    batch = kernels.PagedBatch(
        query_starts=(0, 1),
        seq_lens=(20,),
        num_decodes=1,
        block_tables=moved,
        lengths=case.batch.lengths,
        slots=case.batch.slots,
    )
    out = torch.empty_like(case.query)
    decode_attention(case.query, far[0], far[1], out, batch, scale=0.125)
    assert_near(out, by_reference(case, scale=0.125), torch.float16)


def test_triton_and_eager_share_a_mixed_batch(
    make_case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does: decode rows in Triton, chunks eagerly, one output."""
    monkeypatch.setattr(dispatch, "has_triton", lambda x: True)
    calls: list[int] = []
    eagerly = eager.paged_attention

    def watched(*args: Any, first_row: int, **settings: Any) -> None:
        calls.append(first_row)
        eagerly(*args, first_row=first_row, **settings)

    monkeypatch.setattr(eager, "paged_attention", watched)
    case = make_case(DECODES + CHUNKS)
    got = kernels.paged_attention(case.query, case.keys, case.values, case.batch, scale=0.125)
    assert_near(got, by_reference(case, scale=0.125), torch.float32)
    assert calls == [len(DECODES)]


def test_triton_decode_names_what_it_cannot_take(make_case: Any) -> None:
    case = make_case([(5, 1)], heads=4, kv_heads=2)
    out = torch.empty_like(case.query)
    strided = case.keys.transpose(2, 3)
    with pytest.raises(ValueError, match="keys: head_dim must be contiguous"):
        decode_attention(case.query, strided, case.values, out, case.batch, scale=1.0)
    with pytest.raises(ValueError, match="3 query heads cannot share 2 KV heads"):
        decode_attention(
            case.query[:, :3], case.keys, case.values, out[:, :3], case.batch, scale=1.0
        )
