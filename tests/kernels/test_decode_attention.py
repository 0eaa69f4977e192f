"""Decode attention in Triton against the reference in float64, and as Hopper compiles it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import forebay_kernels as kernels
from forebay_kernels import dispatch, eager
from forebay_kernels.gpu import decode_attention as module
from forebay_kernels.gpu import decode_parts
from forebay_kernels.gpu.decode_attention import decode_attention

#: (tokens held, tokens run): lengths 0 and 1, page edges at 16, and rows long enough to be split.
DECODES = [(1, 1), (0, 1), (16, 1), (90, 1)]
#: Fewer heads than the default: the interpreter takes 20 ms a program.
HEADS = {"heads": 3, "kv_heads": 1}

# Triton 3.9's interpreter multiplies bfloat16 as if its bits were integers: on a GPU only.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``few_programs(n)``: so many share the work, in tiles of 16; the interpreter is slow.

    Limits are so low that rows and parts take several turns.
    """

    def use(programs: int, rows_at_once: int = 4) -> None:
        chosen = {"tile": 16, "warps": 4, "stages": 2, "programs": programs}
        monkeypatch.setattr(module, "choose", lambda *args, **shape: chosen)
        monkeypatch.setattr(module, "_ROWS", rows_at_once)
        monkeypatch.setattr(module, "MOST_PARTS", 4)
        monkeypatch.setattr(decode_parts, "_JOINED", 128)  # two parts of 64 values

    use(8)
    return use


def attended(case: Any, **settings: Any) -> Tensor:
    out = torch.full_like(case.query, float("nan"))
    decode_attention(case.query, case.keys, case.values, out, case.batch, **settings, **case.scales)
    return out


@pytest.mark.parametrize(
    ("programs", "window", "softcap"),
    [
        (2, None, None),  # no row is split
        (8, None, 2.0),
        (20, 50, None),  # more programs than tiles: some have no part
        (4, 1, 2.0),
    ],
)
def test_settings(
    make_case: Any, few_programs: Any, programs: int, window: int | None, softcap: float | None
) -> None:
    few_programs(programs)
    case = make_case(DECODES, **HEADS)
    settings: dict[str, Any] = {"scale": 0.125, "window": window, "softcap": softcap}
    got = attended(case, **settings)
    case.assert_near(got, **settings)
    assert not got[1].any()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [(1, 1, 80, 24), (6, 2, 128, 16), (20, 1, 64, 5), (2, 2, 256, 64), (4, 1, 20, 16)],
)
def test_shapes(make_case: Any, heads: int, kv_heads: int, dim: int, block_size: int) -> None:
    case = make_case([(77, 1)], heads=heads, kv_heads=kv_heads, dim=dim, block_size=block_size)
    case.assert_near(attended(case, scale=dim**-0.5), scale=dim**-0.5)


@pytest.mark.parametrize("block_size", [16, 32])  # several pages a tile, and several tiles a page
def test_half_precision(make_case: Any, block_size: int) -> None:
    case = make_case(DECODES, **HEADS, dtype=HALF, block_size=block_size)
    case.assert_near(attended(case, scale=0.125), scale=0.125)


@pytest.mark.parametrize(
    ("dim", "softcap", "block_size"), [(64, None, 16), (80, 2.0, 24), (128, None, 32)]
)
def test_fp8_cache(make_case: Any, dim: int, softcap: float | None, block_size: int) -> None:
    case = make_case(DECODES, **HEADS, dim=dim, dtype=HALF, block_size=block_size).in_fp8()
    settings: dict[str, Any] = {"scale": 0.125, "softcap": softcap}
    case.assert_near(attended(case, **settings), **settings)


def test_fp8_numbers_are_all_read(make_case: Any) -> None:
    """Every finite bit pattern, subnormals and both zeros too, as the value of one held token."""
    case = make_case([(1, 1)], heads=1, kv_heads=1, dim=256, dtype=HALF, spare_pages=0).in_fp8()
    bits = torch.arange(256, dtype=torch.uint8)
    bits[bits & 0x7F == 0x7F] = 0  # NaN
    case.values.view(torch.uint8)[0, 0, 0] = bits.to(case.values.device)
    scales = {name: torch.ones_like(scale) for name, scale in case.scales.items()}
    out = torch.empty_like(case.query)
    decode_attention(case.query, case.keys, case.values, out, case.batch, scale=1.0, **scales)
    assert torch.equal(out[0, 0].float(), case.values[0, 0, 0].float())


@pytest.mark.parametrize("programs", [1, 8])
def test_sinks(make_case: Any, few_programs: Any, programs: int) -> None:
    """Whether a row is split or not they count once, and a sink of -inf not at all."""
    few_programs(programs)
    case = make_case(DECODES, **HEADS)
    sinks = torch.tensor([0.5, 2.0, -torch.inf], device=case.query.device)
    got = attended(case, scale=0.125, sinks=sinks)
    case.assert_near(got, scale=0.125, sinks=sinks)
    assert not got[1].any()


@pytest.mark.parametrize("seed", range(4))
def test_any_lengths_are_shared_out(make_case: Any, few_programs: Any, seed: int) -> None:
    """No part is missing (it would be NaN), whatever the lengths; one program for each row more."""
    random = torch.Generator().manual_seed(seed)
    few_programs(1 + seed * 3, rows_at_once=2)
    lengths = torch.randint(0, 40, (5,), generator=random)
    lengths[seed] = 200
    window = 100 if seed % 2 else None
    rows = [(length, 1) for length in lengths.tolist()]
    case = make_case(rows, heads=1, kv_heads=1, dim=16)
    got = attended(case, scale=0.25, window=window)
    case.assert_near(got, scale=0.25, window=window)


def test_a_launch_serves_all_lengths_up_to_its_bounds(make_case: Any) -> None:
    """As in a captured graph: the host knows bounds, the device lengths; padded rows have none."""
    case = make_case([(40, 1), (70, 1), (0, 1), (0, 1)], **HEADS)
    bounds = kernels.PagedBatch(
        query_starts=case.batch.query_starts,
        seq_lens=(4096,) * 4,
        replayed=True,
        num_decodes=4,
        block_tables=case.batch.block_tables,
        lengths=case.batch.lengths,
        slots=case.batch.slots,
    )
    out = torch.full((6, *case.query.shape[1:]), float("nan"), device=case.query.device)
    decode_attention(case.query, case.keys, case.values, out, bounds, scale=0.125)
    case.assert_near(out[:4], scale=0.125)
    assert not out[2:4].any()
    assert out[4:].isnan().all()  # beyond the rows nothing is written


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
def test_a_captured_graph_replays_with_other_lengths(make_case: Any, fp8: bool) -> None:
    case = make_case([(300, 1), (200, 1), (100, 1)], dtype=HALF)
    case = case.in_fp8() if fp8 else case
    out = torch.empty_like(case.query)

    def run() -> None:
        decode_attention(
            case.query, case.keys, case.values, out, case.batch, scale=0.125, **case.scales
        )

    run()  # compiled outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for lengths in ((300, 200, 100), (1, 0, 77), (290, 16, 0)):
        case.batch.lengths.copy_(torch.tensor(lengths))
        out.fill_(float("nan"))
        graph.replay()
        replace(case, batch=replace(case.batch, seq_lens=lengths)).assert_near(out, scale=0.125)


def test_pages_before_a_window_are_not_read(make_case: Any) -> None:
    """They may have been given to others: a table may hold anything there."""
    case = make_case([(90, 1), (50, 1)], **HEADS)
    tables = case.batch.block_tables.clone()
    tables[0, : (90 - 20) // 16] = tables[1, : (50 - 20) // 16] = 1 << 30
    freed = replace(case, batch=replace(case.batch, block_tables=tables))
    got = attended(freed, scale=0.125, window=20)
    case.assert_near(got, scale=0.125, window=20)


def test_huge_scores(make_case: Any) -> None:
    """tanh by exponentials must not turn an overflow into NaN, nor exp2 a large maximum."""
    case = make_case([(90, 1), (1, 1)])
    settings: dict[str, Any] = {"scale": 1e4, "softcap": 30.0}
    case.assert_near(attended(case, **settings), **settings)


@pytest.mark.parametrize("fp8", [False, True])
def test_pages_beyond_32_bits(make_case: Any, device: torch.device, fp8: bool) -> None:
    """A page whose first value lies past 2^31 (virtual memory: only what is touched exists)."""
    page = (1 << 31) // (16 * 64) + 5
    case = make_case([(20, 1)], heads=2, kv_heads=1, dtype=torch.float16, spare_pages=0)
    case = case.in_fp8() if fp8 else case
    moved = torch.tensor([[page, 1]], dtype=torch.int32, device=device)
    far = []
    for cache in (case.keys, case.values):
        large = torch.empty((1, page + 1, 16, 64), dtype=cache.dtype, device=device)
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
    decode_attention(case.query, *far, out, batch, scale=0.125, **case.scales)
    case.assert_near(out, scale=0.125)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_mixed_batch_takes_two_kernels(
    make_case: Any, monkeypatch: pytest.MonkeyPatch, fp8: bool
) -> None:
    """What a GPU does: decode rows in one, all others in another, and nothing eagerly."""
    monkeypatch.setattr(dispatch, "has_triton", lambda x: True)
    monkeypatch.setattr(eager, "paged_attention", None)
    case = make_case([*DECODES, (5, 5), (40, 7)], **HEADS, dtype=HALF)
    case = case.in_fp8() if fp8 else case
    settings: dict[str, Any] = {"scale": 0.125, "sinks": torch.ones(3, device=case.query.device)}
    for batch_case in (case, make_case(DECODES, **HEADS, dtype=HALF)):
        got = kernels.paged_attention(
            batch_case.query,
            batch_case.keys,
            batch_case.values,
            batch_case.batch,
            **settings,
            **batch_case.scales,
        )
        batch_case.assert_near(got, **settings)


def test_it_names_what_it_cannot_take(make_case: Any) -> None:
    case = make_case([(5, 1)], heads=4, kv_heads=2)
    out = torch.empty_like(case.query)
    strided = case.keys.transpose(2, 3)
    with pytest.raises(ValueError, match="keys: head_dim must be contiguous"):
        decode_attention(case.query, strided, case.values, out, case.batch, scale=1.0)
    with pytest.raises(ValueError, match="values: strides must be those of keys"):
        decode_attention(case.query, case.keys, case.values[:, ::2], out, case.batch, scale=1.0)
    with pytest.raises(ValueError, match="3 query heads cannot share 2 KV heads"):
        decode_attention(
            case.query[:, :3], case.keys, case.values, out[:, :3], case.batch, scale=1.0
        )
    odd = make_case([(5, 1)], dim=15).in_fp8()
    with pytest.raises(ValueError, match="of an FP8 cache the strides must be even"):
        attended(odd, scale=1.0)


def launch(
    *, rows: int, heads: int, kv_heads: int, dim: int, page: int, fp8: bool, window: int, cap: bool
) -> None:
    """A step in the shapes of an engine: queries beside keys and values, tables with spare room."""
    cache_type = torch.float8_e4m3fn if fp8 else torch.bfloat16
    qkv = torch.empty((rows, heads + 2 * kv_heads, dim), dtype=torch.bfloat16)
    keys, values = (torch.empty((kv_heads, 9, page, dim), dtype=cache_type) for _ in range(2))
    scale = torch.ones(kv_heads) if fp8 else None
    batch = kernels.PagedBatch(
        query_starts=tuple(range(rows + 1)),
        seq_lens=(100,) * rows,
        num_decodes=rows,
        block_tables=torch.zeros((rows, 9 + rows), dtype=torch.int32),
        lengths=torch.full((rows,), 100, dtype=torch.int32),
        slots=torch.zeros(rows, dtype=torch.int64),
    )
    decode_attention(
        qkv[:, :heads],
        keys,
        values,
        torch.empty((rows, heads, dim), dtype=torch.bfloat16),
        batch,
        scale=dim**-0.5,
        window=window or None,
        softcap=50.0 if cap else None,
        sinks=torch.zeros(heads, dtype=torch.bfloat16) if cap else None,
        key_scale=scale,
        value_scale=scale,
    )


@pytest.mark.timeout(180)  # a dozen seconds of compiling where nobody else computes
def test_hopper_runs_it_from_registers_with_loads_of_16_bytes(compile_for_hopper: Any) -> None:
    names = ("rows", "heads", "kv_heads", "dim", "page", "fp8", "window", "cap")
    shapes = [
        (3, 32, 8, 128, 16, False, 0, False),  # Llama 3.1 8B
        (7, 32, 8, 128, 16, False, 0, False),
        (1, 32, 8, 128, 64, True, 0, False),
        (3, 16, 8, 128, 32, False, 0, False),  # Qwen3 0.6B
        (3, 4, 1, 256, 16, False, 512, False),  # Gemma 3 270M
        (3, 6, 2, 80, 24, False, 512, True),
    ]
    found = compile_for_hopper(
        *(
            {"launch": f"{__file__}:launch", "arguments": dict(zip(names, shape, strict=True))}
            for shape in shapes
        )
    )
    splits, joins = found[::2], found[1::2]
    assert len(splits) == len(joins) == len(shapes)
    assert splits[0] == splits[1]  # other rows: nothing is compiled again
    for one in found:
        assert one.spilled_bytes == 0
    for one in splits:
        assert "mma.sync" in one.ptx
        # Two blocks of four warps a multiprocessor: 227 KiB of memory and 65,536 registers are
        # shared, and each block takes 1 KiB for itself.
        assert 2 * (one.shared_bytes + 1024) <= 227 * 1024
        assert 2 * 128 * one.registers <= 65536
        copies = [line for line in one.ptx.splitlines() if "cp.async" in line and "shared" in line]
        # 32 KiB of keys and values a tile by 128 threads, for 3 tiles ahead of the loop and in it.
        assert len(copies) == 4 * 32 * 1024 // (16 * 128)
        assert all("cp.async.cg" in line and "0x10" in line for line in copies)
    for one in joins:
        assert "ld.global.v4" in one.ptx
