"""Prefill attention in Triton against the reference in float64, and what it compiles to."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from forebay_kernels.gpu import prefill_plan
from forebay_kernels.gpu.prefill_attention import prefill_attention
from forebay_kernels.gpu.prefill_plan import Plan, plan_prefill
from forebay_kernels.gpu.tuning import choose

#: Triton 3.9's interpreter multiplies bfloat16 as if its bits were integers: on a GPU only.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16

DECODES = [(9, 1), (0, 1)]
#: (tokens held, tokens run): whole prompts, chunks behind a prefix, guesses, a lone token, and rows
#: long enough for the loop without masks.
CHUNKS = [(5, 5), (40, 7), (300, 70), (33, 16), (150, 1), (270, 4), (64, 48)]


def attended(case: Any, **settings: Any) -> Tensor:
    out = torch.full_like(case.query, float("nan"))
    prefill_attention(case.query, case.keys, case.values, out, case.batch, **settings)
    return out


def check(case: Any, got: Tensor, **settings: Any) -> None:
    """``got`` is right from the first token behind the decode rows on, and untouched before."""
    first = case.batch.query_starts[case.batch.num_decodes]
    case.assert_near(got, first, **settings)
    assert got[:first].isnan().all()


@pytest.mark.parametrize(
    ("dtype", "window", "softcap"),
    [
        (torch.float32, None, None),
        (HALF, None, 2.0),
        (HALF, 1, None),
        (torch.float32, 20, 2.0),
        (HALF, 150, None),  # wider than any chunk; the loop without masks lies between two edges
    ],
)
def test_mixed_batch(
    make_case: Any, dtype: torch.dtype, window: int | None, softcap: float | None
) -> None:
    case = make_case(DECODES + CHUNKS, dtype=dtype)
    settings: dict[str, Any] = {"scale": 0.125, "window": window, "softcap": softcap}
    check(case, attended(case, **settings), **settings)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"),
    [(1, 1, 64, 128), (6, 2, 80, 24), (14, 2, 128, 8), (5, 5, 96, 64), (10, 1, 256, 32)],
)
def test_shapes(make_case: Any, heads: int, kv_heads: int, dim: int, block_size: int) -> None:
    case = make_case(
        [(9, 1), (160, 20), (170, 13)],
        heads=heads, kv_heads=kv_heads, dim=dim, block_size=block_size, dtype=torch.float16,
    )  # fmt: skip
    settings: dict[str, Any] = {"scale": dim**-0.5, "window": 130}
    check(case, attended(case, **settings), **settings)


def test_rows_too_long_for_one_program_are_shared(
    make_case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of the rows, one after another and one apart: joined, the others written at once."""
    monkeypatch.setattr(prefill_plan, "_LEAST_TILES", 1)
    rows = [(9, 1), (400, 3), (390, 8), (60, 17), (410, 4), (20, 20)]
    case = make_case(rows, heads=3, kv_heads=1, dim=16, dtype=torch.float16)
    sinks = torch.tensor([0.5, -torch.inf, 2.0], device=case.query.device)
    for settings in ({"scale": 0.2}, {"scale": 0.2, "sinks": sinks, "window": 350}):
        check(case, attended(case, **settings), **settings)
        (plan,) = (found for found in case.batch.memo.values() if isinstance(found, Plan))
        assert [(run.tokens, run.place) for run in plan.runs] == [(11, 0), (4, 12)]
        assert plan.splits > 1
        case.batch.memo.clear()


@pytest.mark.parametrize("longest", [64, 192])
def test_replayed_rows_are_launched_by_their_shape(make_case: Any, longest: int) -> None:
    """As a graph does: the lengths are on the device alone, and padded rows give zeros."""
    case = make_case([(30, 1), (60, 5), (5, 5), (0, 5), (33, 5)], dtype=torch.float16)
    replayed = dataclasses.replace(case.batch, seq_lens=(longest,) * 5, replayed=True)
    out = torch.full_like(case.query, float("nan"))
    settings: dict[str, Any] = {"scale": 0.125, "sinks": torch.ones(4, device=out.device)}
    prefill_attention(case.query, case.keys, case.values, out, replayed, **settings)
    check(case, out, **settings)
    assert not out[11:16].any()
    (plan,) = replayed.memo.values()
    assert plan.items is None
    assert plan.splits == longest // 64


def test_float8_caches_are_scaled(make_case: Any) -> None:
    case = make_case([(9, 1), (300, 20), (7, 7)], dtype=torch.float16).in_fp8()
    for settings in ({"scale": 0.1}, {"scale": 0.1, "softcap": 2.0}):
        check(case, attended(case, **settings, **case.scales), **settings)


def test_huge_scores(make_case: Any) -> None:
    """tanh by exponentials must not turn an overflow into NaN, nor exp2 a large maximum."""
    case = make_case([(90, 20)], dim=16)
    for softcap in (None, 30.0):
        settings: dict[str, Any] = {"scale": 1e4, "softcap": softcap}
        check(case, attended(case, **settings), **settings)


def test_pages_beyond_32_bits(make_case: Any, device: torch.device) -> None:
    """A page whose first value lies past 2^31 (virtual memory: only what is touched exists)."""
    page = (1 << 31) // (16 * 64) + 5
    case = make_case([(20, 3)], heads=2, kv_heads=1, dtype=torch.float16, spare_pages=0)
    moved = torch.tensor([[page, 1]], dtype=torch.int32, device=device)
    far = []
    for cache in (case.keys, case.values):
        large = torch.empty((1, page + 1, 16, 64), dtype=torch.float16, device=device)
        large[:, moved[0].long()] = cache[:, case.batch.block_tables[0, :2].long()]
        far.append(large)
    batch = dataclasses.replace(case.batch, block_tables=moved, memo={})
    out = torch.empty_like(case.query)
    prefill_attention(case.query, far[0], far[1], out, batch, scale=0.125)
    check(case, out, scale=0.125)


def plan_of(
    case: Any, window: int | None = None, rows: int = 128, tile: int = 128
) -> prefill_plan.Plan:
    return plan_prefill(case.batch, 8, 4, window, {"rows": rows, "tile": tile})


def test_the_heaviest_tiles_start_first(make_case: Any) -> None:
    case = make_case([(9, 1), (64, 64), (650, 33)])
    plan = plan_of(case)
    assert plan.items is not None
    #: row, first token, tokens, tile, share, not shared
    assert plan.items.tolist() == [
        [2, 65, 33, 0, 0, -1], [2, 65, 33, 1, 0, -1], [1, 1, 64, 0, 0, -1], [1, 1, 64, 1, 0, -1],
    ]  # fmt: skip
    assert plan_of(case) is plan
    windowed = plan_of(case, window=10)
    assert windowed.items is not None
    assert windowed.items[:, 0].tolist() == [2, 1, 1, 2]  # 608..648 spans two tiles of slots


def test_a_prompt_alone_shares_no_row_and_a_short_chunk_does(make_case: Any) -> None:
    assert plan_of(make_case([(1200, 1200)], dim=16)).runs == ()
    plan = plan_of(make_case([(2000, 30)], dim=16))
    assert plan.splits == 4
    assert plan.programs == 4


def test_what_it_cannot_take(make_case: Any) -> None:
    case = make_case([(5, 3)], heads=4, kv_heads=2)
    out = torch.empty_like(case.query)
    caches = case.keys, case.values
    with pytest.raises(ValueError, match="values: head_dim must be contiguous"):
        prefill_attention(
            case.query, case.keys, case.values.transpose(2, 3), out, case.batch, scale=1.0
        )
    with pytest.raises(ValueError, match="values: strides must be those of keys"):
        prefill_attention(case.query, case.keys, case.values[:, ::2], out, case.batch, scale=1.0)
    with pytest.raises(ValueError, match="3 query heads cannot share 2 KV heads"):
        prefill_attention(case.query[:, :3], *caches, out[:, :3], case.batch, scale=1.0)
    with pytest.raises(ValueError, match=r"scale: -1\.0 must be positive"):
        prefill_attention(case.query, *caches, out, case.batch, scale=-1.0)
    case = make_case([(5, 3), (5, 4)])
    with pytest.raises(ValueError, match=r"must have as many tokens each, not \[3, 4\]"):
        attended(
            dataclasses.replace(case, batch=dataclasses.replace(case.batch, replayed=True)),
            scale=1.0,
        )


def job(
    heads: int, kv_heads: int, dim: int, tokens: int, *, fp8: bool = False, **constants: Any
) -> dict[str, Any]:
    """The kernel with the table's settings, short rows shared, pages of 32."""
    group = heads // kv_heads
    chosen = choose(
        "prefill_attention",
        torch.device("cpu"),
        dim=dim,
        queries=tokens * group,
        bits=8 if fp8 else 16,
        softcap=0,
    )
    absent = dict.fromkeys(
        (
            "sinks",
            *(() if fp8 else ("key_scale", "value_scale")),
            *(() if tokens < 16 else ("partial", "highest", "total", "spans")),
        )
    )
    return {
        "kernel": "forebay_kernels.gpu.prefill_attention:_prefill_kernel",
        "types": {
            **dict.fromkeys(("query", "out"), "*bf16"),
            **dict.fromkeys(("keys", "values"), "*fp8e4nv" if fp8 else "*bf16"),
            **dict.fromkeys(("block_tables", "lengths", "items", "spans"), "*i32"),
            **dict.fromkeys(("partial", "highest", "total"), "*fp32"),
            **dict.fromkeys(("key_scale", "value_scale"), "*fp32"),
            **dict.fromkeys(("scale", "softcap"), "fp32"),
        },
        "constants": {
            "HEADS": heads, "GROUP": group, "DIM": dim, "DIM_PADDED": dim, "BLOCK_SIZE": 32,
            "PAGE": 32 * dim, "SLOT": dim,
            "WINDOW": 0, "SOFTCAP": False, "PRECISION": "tf32", "LOG2_E": 1.4427,
            **{name.upper(): chosen[name] for name in ("rows", "tile", "edge")},
            **absent, **constants,
        },
        "warps": chosen["warps"],
        "stages": chosen["stages"],
        "aligned": [
            "query_token", "query_head", "cache_head", "out_token", "out_head",
        ],
    }  # fmt: skip


def test_hopper_multiplies_from_shared_memory_and_spills_nothing(compile_for_hopper: Any) -> None:
    jobs = [
        job(32, 8, 128, 8192),  # Llama 3.1 8B
        job(32, 8, 128, 8192, fp8=True),
        job(4, 1, 256, 8192, WINDOW=512),  # Gemma 3 270M
        job(16, 8, 128, 5, items=None),  # Qwen3 0.6B, 4 guesses to verify
    ]
    for found, asked in zip(compile_for_hopper(*jobs), jobs, strict=True):
        assert found.spilled_bytes == 0
        assert found.shared_bytes <= 232448
        # Tiles of slots are copied 16 bytes a thread, and in the loop later ones are under way.
        copies = [line for line in found.ptx.splitlines() if re.search("cp.async.c[ag]", line)]
        assert copies
        assert all("cp.async.cg" in line and "0x10" in line for line in copies)
        ahead = re.findall(r"cp\.async\.wait_group\s+(\d+)", found.ptx)
        assert max(int(number) for number in ahead) == 2 * (asked["stages"] - 2)
        if asked["constants"]["ROWS"] >= 64:
            steps = re.findall(r"wgmma\.mma_async\.sync\.aligned\.\w+\.f32", found.ptx)
            assert steps
            assert "mma.sync" not in found.ptx
        else:
            assert "mma.sync" in found.ptx
