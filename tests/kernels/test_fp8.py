"""Products with FP8 weights, and what the kernels compile to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from forebay_kernels import reference
from forebay_kernels.gpu import fp8
from forebay_kernels.gpu.fp8 import pack_fp8
from forebay_kernels.gpu.tuning import choose
from forebay_kernels.matrix import Fp8

pytestmark = pytest.mark.usefixtures("exact_conversions")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(out: int, into: int, group: int, device: torch.device) -> Fp8:
    groups = -(-into // group)
    weight = (random(out, into, seed=out) * 100).to(torch.float8_e4m3fn)
    return Fp8(weight.to(device), random(out, groups, seed=into).abs().to(device) / 100, group)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


#: Outputs, inputs and group: sizes that fill no tile, a shorter last group, one scale a channel.
SHAPES = [(40, 96, 96), (70, 130, 130), (48, 200, 64), (33, 257, 128)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("tokens", "biased"), [(1, False), (16, True)])
def test_few_tokens_are_multiplied_as_they_are(
    shape: tuple[int, int, int], tokens: int, biased: bool, device: torch.device
) -> None:
    """The only errors are those of float32's sums: tokens are not rounded."""
    weights = matrix(*shape, device)
    bias = random(shape[0]).to(device) if biased else None
    x = random(tokens, shape[1]).to(device)
    packed = pack_fp8(weights, bias)
    assert packed is not None
    want = x.double() @ weights.dequantize().double().T
    if bias is not None:
        want += bias.double()
    assert error(packed(x), want) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("tokens", "biased"), [(17, True), (130, False)])
def test_many_tokens_are_rounded_once(
    shape: tuple[int, int, int], tokens: int, biased: bool, device: torch.device
) -> None:
    """The product is that of the rounded tokens, by groups of the weights' size."""
    weights = matrix(*shape, device)
    bias = random(shape[0]).to(device) if biased else None
    x = random(tokens, shape[1]).to(device)
    packed = pack_fp8(weights, bias)
    assert packed is not None
    got = packed(x)
    group = packed.group
    rounded = reference.fp8.dequantize_fp8(*map(_wide, reference.quantize_fp8(x, group)), group)
    want = rounded @ weights.dequantize().double().T
    if bias is not None:
        want += bias.double()
    # Where the kernel's scale differs in its last bit a value may be rounded the other way.
    assert error(got, want) < 2e-3
    # And near to the product of tokens that are not.
    exact = x.double() @ weights.dequantize().double().T
    assert error(got - (0.0 if bias is None else bias), exact) < 0.04


def _wide(x: Tensor) -> Tensor:
    return x.double()


@pytest.mark.parametrize("biased", [False, True])
def test_torch_multiplies_many_tokens_with_scales_of_channels(
    biased: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``_scaled_mm`` asks for on a GPU; on a CPU it takes more."""
    weights = matrix(48, 96, 96, device)
    bias = random(48).to(device, torch.bfloat16) if biased else None
    x = random(20, 96).to(device, torch.bfloat16)
    calls = []
    scaled_mm = torch._scaled_mm

    def checked(a: Tensor, b: Tensor, **rest: Any) -> Tensor:
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        assert all(size % 16 == 0 for size in b.shape)
        assert rest["scale_a"].shape == (20, 1)
        assert rest["scale_b"].shape == (1, 48)
        assert all(rest[s].is_contiguous() for s in ("scale_a", "scale_b"))
        assert {a.dtype, b.dtype} == {torch.float8_e4m3fn}
        calls.append(rest)
        return scaled_mm(a, b, **rest)

    monkeypatch.setattr(torch, "_scaled_mm", checked)
    packed = pack_fp8(weights, bias)
    assert packed is not None
    got = packed(x)
    want = x.double() @ weights.dequantize().double().T
    if bias is not None:
        want += bias.double()
    assert len(calls) == 1
    assert got.dtype == torch.bfloat16
    assert error(got, want) < 0.04


def test_tokens_may_come_rounded(device: torch.device) -> None:
    """What a norm has rounded is the same as what the product would have rounded."""
    weights = matrix(48, 96, 96, device)
    x = random(20, 96).to(device, torch.bfloat16)
    packed = pack_fp8(weights)
    assert packed is not None
    assert packed.rounds(x)
    assert not packed.rounds(x[:16])
    values, scale = fp8.quantize_fp8(x, packed.group)
    assert torch.equal(packed.quantized(values, scale, x.dtype), packed(x))


def test_rows_beside_a_token_do_not_touch_it(device: torch.device) -> None:
    """A padded row may hold anything; memory behind the last token is not read."""
    weights = matrix(40, 64, 64, device)
    packed = pack_fp8(weights)
    assert packed is not None
    for count in (5, 20):
        room = torch.full((64, 64), float("nan"), device=device)
        room[:count] = random(count, 64).to(device)
        alone = packed(room[:count].clone())
        assert torch.equal(packed(room[:count]), alone)
        room[1, 3:] = float("nan")
        others = [i for i in range(count) if i != 1]
        assert torch.equal(packed(room[:count])[others], alone[others])


def test_other_groups_are_left_to_others(device: torch.device) -> None:
    assert pack_fp8(matrix(16, 96, 48, device)) is None
    assert pack_fp8(matrix(16, 96, 16, device)) is None
    packed = pack_fp8(matrix(16, 96, 96, device))
    assert packed is not None
    assert packed(torch.empty(0, 96, device=device)).shape == (0, 16)
    with pytest.raises(ValueError, match=r"\[2, 95\], but it takes \[tokens, 96\]"):
        packed(torch.ones(2, 95, device=device))


PRODUCT_TYPES = {
    **dict.fromkeys(("x_scale", "weight_scale", "bias"), "*fp32"),
    "weight": "*fp8e4nv",
    "out": "*bf16",
}
NORM_TYPES = {
    **dict.fromkeys(("x", "added"), "*bf16"),
    **dict.fromkeys(("inner", "outer", "scale"), "*fp32"),
    "values": "*fp8e4nv",
    "eps": "fp32",
}


def product_job(tokens: int, out: int, into: int, groups: int, *, rounded: bool) -> dict[str, Any]:
    used = choose("fp8_product", torch.device("cpu"), tokens=tokens, out=out)
    return {
        "kernel": "forebay_kernels.gpu.fp8:_product_kernel",
        "types": {**PRODUCT_TYPES, "x": "*fp8e4nv" if rounded else "*bf16"},
        "constants": {
            "INTO": into, "OUT": out, "GROUPS": groups, "GROUP": into // groups, "BIAS": False,
            "ROUNDED": rounded, "TILE_TOKENS": used["tile_tokens"], "TILE_OUT": used["tile_out"],
            "TILE_IN": min(used["tile_in"], into // groups), "TALL": used["tall"],
            "PRECISION": "tf32",
        },
        "aligned": ["x_row"],
        "warps": used["warps"],
        "stages": used["stages"],
    }  # fmt: skip


def norm_job(kernel: str, width: int, groups: int, **flags: bool) -> dict[str, Any]:
    return {
        "kernel": f"forebay_kernels.gpu.quantize_fp8:{kernel}",
        "types": NORM_TYPES,
        "constants": {
            "WIDTH": width, "GROUP": width // groups, "GROUPS": groups,
            "GROUP_PADDED": 1 << (width // groups - 1).bit_length(),
            "GROUPS_PADDED": 1 << (groups - 1).bit_length(), **flags,
        },
        "aligned": ["x_row", "added_row"],
        "warps": choose("quantize_fp8", torch.device("cpu"), width=width)["warps"],
    }  # fmt: skip


def test_the_kernels_compile_for_hopper(compile_for_hopper: Any) -> None:
    """At the shapes of Llama-3.1-8B: a scale a channel, and blocks of 128."""
    few, few_blocks, some, many, norm, gate, gelu = compile_for_hopper(
        product_job(16, 6144, 4096, 1, rounded=False),
        product_job(16, 4096, 14336, 112, rounded=False),
        product_job(64, 6144, 4096, 32, rounded=True),
        product_job(4096, 6144, 4096, 32, rounded=True),
        norm_job("_norm_quantize_kernel", 4096, 1, ADDED=True, INNER=False),
        norm_job("_quantize_kernel", 14336, 1, GATED=True, GELU=False),
        norm_job("_quantize_kernel", 14336, 1, GATED=True, GELU=True),
    )
    for one in (few, few_blocks, some, many, norm, gate, gelu):
        assert one.spilled_bytes == 0
        assert one.shared_bytes <= 232448
    for one in (few, few_blocks):
        # Widened in registers, by the instruction that there is for it, and loaded 16 bytes each.
        assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16" in one.ptx
        assert "cvt.rn.f16x2.e4m3x2" in one.ptx
        assert "cvt.bf16.f16" not in one.ptx  # which is slower than the memory
        assert "cp.async.cg.shared.global" in one.ptx
        # Two blocks or more fit a multiprocessor.
        assert 2 * one.shared_bytes <= 232448
        assert one.registers <= 128
    for one in (some, many):
        assert "wgmma.mma_async.sync.aligned.m64n" in one.ptx
        assert "e4m3.e4m3" in one.ptx
    for one in (norm, gate, gelu):
        assert "ld.global.v4" in one.ptx
        assert "cvt.rn.satfinite.e4m3x2.f32" in one.ptx
    assert max(gate.registers, gelu.registers) <= 128  # 16 warps: more would not fit
