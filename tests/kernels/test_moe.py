"""Mixtures of experts: routing, the sort of pairs by expert, and the products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from forebay_kernels import reference
from forebay_kernels.gpu import moe
from forebay_kernels.gpu.tuning import choose
from forebay_kernels.matrix import Dense, Fp8, Int8, Matrix

pytestmark = pytest.mark.usefixtures("exact_conversions")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 8, 2), (5, 60, 4), (3, 128, 8), (4, 5, 5)])
@pytest.mark.parametrize("normalised", [False, True])
def test_tokens_go_to_their_likeliest_experts(
    shape: tuple[int, int, int], normalised: bool, device: torch.device
) -> None:
    tokens, experts, top_k = shape
    logits = random(tokens, experts).to(device)
    weight, chosen = moe.route(logits, top_k, normalised=normalised)
    want = reference.route(logits.double(), top_k, normalised=normalised)
    assert torch.equal(chosen, want[1])
    torch.testing.assert_close(weight, want[0], rtol=1e-5, atol=0.0)
    if normalised:
        torch.testing.assert_close(weight.sum(1), torch.ones(tokens, device=device))


def test_of_equals_the_first_is_chosen_and_nan_chooses_experts_that_exist(
    device: torch.device,
) -> None:
    logits = torch.zeros(3, 6, device=device)
    logits[1, 4], logits[2] = 1.0, float("nan")
    for found in (moe.route, reference.route):
        _, chosen = found(logits[:2], 3, normalised=True)
        assert chosen.tolist() == [[0, 1, 2], [4, 0, 1]]
    weight, chosen = moe.route(logits, 3, normalised=True)
    assert torch.isfinite(weight).all()
    assert ((chosen >= 0) & (chosen < 6)).all()
    assert chosen[:2].tolist() == [[0, 1, 2], [4, 0, 1]]


CHOICES = {
    "one pair": torch.tensor([[3]]),
    "all on one expert": torch.full((40, 1), 2),
    "the last expert alone": torch.full((3, 1), 4),
    "at random": torch.randint(0, 5, (700, 2), generator=torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("case", CHOICES)
def test_pairs_are_sorted_by_expert_and_keep_their_order(case: str, device: torch.device) -> None:
    chosen = CHOICES[case].int().to(device)
    order, starts = moe.sort_pairs(chosen, 5)
    flat = chosen.flatten()
    assert torch.equal(order.long(), flat.argsort(stable=True))
    counts = torch.bincount(flat, minlength=5).cumsum(0)
    assert starts.tolist() == [0, *counts.tolist()]


#: Of matrices: plain, e4m3 with a scale for each channel, with scales of blocks with a shorter last
#: one, int8, and groups that are widened.
LAYOUTS = ["plain", "channels", "blocks", "int8", "other"]
#: Tokens, experts and top_k, which have tiles of every height, and experts without tokens.
BATCHES = [(1, 6, 2), (9, 6, 3), (70, 3, 2)]
HIDDEN, INNER = 80, 72


def matrices(layout: str, count: int, out: int, into: int, device: torch.device) -> list[Matrix]:
    weights = [random(out, into, seed=out + i).to(device) / into**0.5 for i in range(count)]
    if layout == "plain":
        return [Dense(weight) for weight in weights]
    if layout == "int8":
        scale = random(count, out, seed=into).abs().to(device) / 100 + 0.002
        return [Int8((w * 40).to(torch.int8), s) for w, s in zip(weights, scale, strict=True)]
    group = {"channels": into, "blocks": 64, "other": 48}[layout]
    groups = -(-into // group)
    scale = random(count, out, groups).abs().to(device) / 4 + 0.1
    return [
        Fp8((w * 3).to(torch.float8_e4m3fn), s, group) for w, s in zip(weights, scale, strict=True)
    ]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("batch", "dtype"),
    [
        (BATCHES[0], torch.float32),
        (BATCHES[1], torch.float32),
        (BATCHES[1], torch.float16),
        (BATCHES[2], torch.float16),
    ],
)
def test_each_token_is_the_sum_of_its_experts(
    layout: str, batch: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    tokens, count, top_k = batch
    gate_up = matrices(layout, count, 2 * INNER, HIDDEN, device)
    down = matrices(layout, count, HIDDEN, INNER, device)
    if layout == "plain":
        gate_up, down = ([Dense(m.dequantize().to(dtype)) for m in ms] for ms in (gate_up, down))
    x = random(tokens, HIDDEN).to(device, dtype)
    # An expert without tokens between others.
    logits = random(tokens, count).to(device)
    logits[:, 1] = -100.0
    weight, chosen = reference.route(logits, top_k, normalised=True)
    packed = moe.pack_experts(gate_up, down, dtype)
    stacked = [torch.stack([m.dequantize() for m in ms]).double() for ms in (gate_up, down)]
    want = reference.experts(x.double(), weight.double(), chosen, *stacked)
    got = packed(x, weight, chosen)
    assert got.dtype == dtype
    assert error(got, want) < (2e-6 if dtype == torch.float32 else 2e-3)


def test_all_tokens_on_one_expert(device: torch.device) -> None:
    packed = moe.pack_experts(
        matrices("plain", 4, 2 * INNER, HIDDEN, device),
        matrices("plain", 4, HIDDEN, INNER, device),
        torch.float32,
    )
    x = random(37, HIDDEN).to(device)
    weight = random(37, 1).to(device)
    chosen = torch.full((37, 1), 3, dtype=torch.int32, device=device)
    stacked = [
        torch.stack([m.dequantize() for m in matrices("plain", 4, out, into, device)]).double()
        for out, into in ((2 * INNER, HIDDEN), (HIDDEN, INNER))
    ]
    want = reference.experts(x.double(), weight.double(), chosen, *stacked)
    assert error(packed(x, weight, chosen), want) < 1e-6


def test_a_token_does_not_depend_on_those_beside_it(device: torch.device) -> None:
    """Nor on padded rows, which may hold NaN and be sent anywhere."""
    packed = moe.pack_experts(
        matrices("plain", 4, 2 * INNER, HIDDEN, device),
        matrices("plain", 4, HIDDEN, INNER, device),
        torch.float32,
    )
    x, logits = random(6, HIDDEN).to(device), random(6, 4, seed=1).to(device)
    alone = packed(x, *moe.route(logits, 2, normalised=True))
    x[4, 3:] = float("nan")
    logits[4] = float("nan")
    found = packed(x, *moe.route(logits, 2, normalised=True))
    others = [0, 1, 2, 3, 5]
    assert torch.equal(found[others], alone[others])


def test_no_tokens_and_wrong_ones(device: torch.device) -> None:
    packed = moe.pack_experts(
        matrices("plain", 2, 2 * INNER, HIDDEN, device),
        matrices("plain", 2, HIDDEN, INNER, device),
        torch.float32,
    )
    none = torch.empty(0, 2, device=device)
    assert packed(torch.empty(0, HIDDEN, device=device), none, none.int()).shape == (0, HIDDEN)
    with pytest.raises(ValueError, match=r"\[3, 81\], but it takes contiguous \[tokens, 80\]"):
        packed(torch.ones(3, 81, device=device), none, none.int())


#: Experts, top_k, hidden and inner.
MIXTRAL, QWEN3 = (8, 2, 4096, 14336), (128, 8, 2048, 768)


def product_job(
    model: tuple[int, int, int, int], tokens: int, *, gated: bool, groups: int = 0
) -> dict[str, Any]:
    experts, top_k, hidden, inner = model
    used = choose(
        "moe_product", torch.device("cpu"), rows=-(-tokens * top_k // experts), value_bytes=2
    )
    into = hidden if gated else inner
    return {
        "kernel": "forebay_kernels.gpu.moe:_product_kernel",
        "types": {
            **dict.fromkeys(("x", "out"), "*bf16"),
            **dict.fromkeys(("scale", "routed"), "*fp32"),
            **dict.fromkeys(("starts", "order"), "*i32"),
            "weight": "*fp8e4nv" if groups else "*bf16",
        },
        "constants": {
            "EXPERTS": experts, "TOP_K": top_k, "INTO": into,
            "OUT": inner if gated else hidden, "GATED": gated, "GROUPS": groups,
            "GROUP": into // max(groups, 1), "EXPERTS_PADDED": experts,
            "TILE_ROWS": used["tile_rows"], "TILE_OUT": used["tile_out"],
            "TILE_IN": used["tile_in"], "TALL": used["tall"], "PRECISION": "tf32",
        },
        "aligned": ["x_row"],
        "warps": used["warps"],
        "stages": used["stages"],
    }  # fmt: skip


def test_the_kernels_compile_for_hopper(compile_for_hopper: Any) -> None:
    route = {
        "kernel": "forebay_kernels.gpu.moe:_route_kernel",
        "types": {"logits": "*bf16", "weight": "*fp32", "chosen": "*i32"},
        "constants": {
            "EXPERTS": 128, "TOP_K": 8, "NORMALISED": True, "EXPERTS_PADDED": 128,
            "TOP_K_PADDED": 8,
        },
        "warps": 1,
    }  # fmt: skip
    sort = {
        "kernel": "forebay_kernels.gpu.moe:_sort_kernel",
        "types": dict.fromkeys(("chosen", "order", "starts"), "*i32"),
        "constants": {"EXPERTS": 128, "TILE": 1024},
    }
    few = [product_job(MIXTRAL, 1, gated=True), product_job(QWEN3, 64, gated=False, groups=6)]
    many = [product_job(MIXTRAL, 256, gated=True), product_job(MIXTRAL, 4096, gated=True)]
    found = compile_for_hopper(route, sort, *few, *many)
    for one in found:
        assert one.spilled_bytes == 0
        assert one.shared_bytes <= 232448
    for one in found[2 : 2 + len(few)]:
        assert "mma.sync.aligned.m16n8k16" in one.ptx
    for one in found[2 + len(few) :]:
        assert "wgmma.mma_async.sync.aligned.m64n" in one.ptx
    for one in found[2:]:
        assert "cp.async.cg.shared.global" in one.ptx
