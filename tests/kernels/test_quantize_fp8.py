"""Rounding to FP8, alone and behind norms and gates: each value within half a step of e4m3."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

import forebay_kernels as kernels
from forebay_kernels import dispatch, reference
from forebay_kernels.gpu import norms
from forebay_kernels.gpu import quantize_fp8 as gpu

Pair = tuple[Tensor, Tensor]

pytestmark = pytest.mark.usefixtures("exact_conversions")

#: Tokens, width and group: one token, widths that are no powers of two, a shorter last group.
SHAPES = [(1, 16, None), (3, 80, None), (5, 257, None), (2, 300, 128), (3, 256, 128)]
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6


def random(*shape: int, seed: int = 0) -> Tensor:
    """Of sizes that differ a lot from token to token."""
    source = torch.Generator().manual_seed(seed)
    each = torch.exp2(torch.randint(-8, 9, (shape[0], 1), generator=source).float())
    return torch.randn(shape, generator=source) * each


def near(got: Pair, want: Tensor, group: int | None) -> None:
    """Values and scales are those of ``want [tokens, width]`` float64, rounded once."""
    values, scale = got
    groups = -(-want.shape[1] // (group or want.shape[1]))
    assert values.dtype == torch.float8_e4m3fn
    assert values.shape == want.shape
    assert scale.shape == (len(want), groups)
    assert not values.float().isnan().any()
    wide = reference.fp8.dequantize_fp8(values, scale.double(), group)
    each = scale.double().repeat_interleave(group or want.shape[1], 1)[:, : want.shape[1]]
    # Half a step: 1/16 of a value with three bits of mantissa, 2^-10 below the smallest normal one.
    allowed = torch.maximum(want.abs() / 16, each * 2.0**-10) * 1.001
    assert ((wide - want).abs() <= allowed).all()
    # And the scale is as small as it can be: the largest value of each group uses the whole range.
    torch.testing.assert_close(
        scale.double(), reference.quantize_fp8(want, group)[1].double(), rtol=1e-3, atol=0.0
    )


@pytest.mark.parametrize("quantize", [reference.quantize_fp8, gpu.quantize_fp8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_rounded_to_e4m3(
    quantize: Callable[..., Pair],
    shape: tuple[int, int, int | None],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    tokens, width, group = shape
    x = random(tokens, width).to(device, dtype)
    near(quantize(x, group), x.double(), group)


@pytest.mark.parametrize("quantize", [reference.quantize_fp8, gpu.quantize_fp8])
def test_no_value_becomes_nan_and_zeros_stay(
    quantize: Callable[..., Pair], device: torch.device
) -> None:
    x = torch.zeros(5, 48, device=device)
    x[1, 3], x[1, 7] = float("inf"), -1.0  # beyond the range: the largest value that there is
    x[2], x[3] = torch.finfo(torch.float32).max, 1e-38
    x[4, 0] = -3.0
    values, scale = quantize(x)
    assert torch.isfinite(values.float()).all()
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert values[0].float().tolist() == [0.0] * 48
    assert values[1, 3] == 448.0
    assert (values[2].float() == 448.0).all()
    assert values[4].float().tolist() == [-448.0] + [0.0] * 47


@pytest.mark.parametrize("norm", [reference.rms_norm_fp8, gpu.rms_norm_fp8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_is_rounded_once(
    norm: Callable[..., Pair],
    shape: tuple[int, int, int | None],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    tokens, width, group = shape
    x, weight = random(tokens, width).to(device, dtype), random(1, width, seed=1)[0].to(device)
    kept = x.clone()
    near(norm(x, weight, EPS, group), reference.rms_norm(x.double(), weight.double(), EPS), group)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("norm", [reference.add_rms_norm_fp8, gpu.add_rms_norm_fp8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sandwich", [False, True])
def test_the_sum_is_kept_and_its_norm_is_rounded(
    norm: Callable[..., Pair],
    shape: tuple[int, int, int | None],
    dtype: torch.dtype,
    sandwich: bool,
    device: torch.device,
) -> None:
    tokens, width, group = shape
    x, added = (random(tokens, width, seed=s).to(device, dtype) for s in (0, 1))
    outer, inner = (random(1, width, seed=s)[0].to(device) for s in (2, 3))
    more = added.double()
    if sandwich:
        more = reference.rms_norm(more, inner.double(), EPS)
    want = x.double() + more
    got = norm(x, added, inner if sandwich else None, outer, EPS, group)
    # Only the sum is rounded, as by the operator that leaves its norm as it is.
    each = torch.finfo(dtype).eps * want.abs() + 4 * torch.finfo(torch.float32).eps * more.abs()
    assert ((x.double() - want).abs() <= each).all()
    near(got, reference.rms_norm(x.double(), outer.double(), EPS), group)


@pytest.mark.parametrize("gate", ["silu_mul", "gelu_tanh_mul"])
@pytest.mark.parametrize("by", [reference, gpu])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_is_rounded_once(
    gate: str,
    by: ModuleType,
    shape: tuple[int, int, int | None],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    tokens, width, group = shape
    x = random(tokens, 2 * width).to(device, dtype)
    near(getattr(by, f"{gate}_fp8")(x, group), getattr(reference, gate)(x.double()), group)


@pytest.mark.parametrize("sandwich", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_stream_is_that_of_a_norm_that_is_not_rounded(
    sandwich: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """So that the number of tokens, by which one or the other is chosen, changes no stream."""
    x, added = (random(3, 80, seed=s).to(device, dtype) for s in (0, 1))
    outer, inner = (random(1, 80, seed=s)[0].to(device) for s in (2, 3))
    other, between = x.clone(), inner if sandwich else None
    gpu.add_rms_norm_fp8(x, added, between, outer, EPS)
    norms.add_rms_norm(other, added, between, outer, EPS)
    assert torch.equal(x, other)


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "silu_mul", "gelu_tanh_mul"])
def test_each_has_one_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels compute on a GPU, else the reference."""
    x, weight = torch.ones(3, 64), torch.ones(64)
    own = {"rms_norm": (weight, EPS), "add_rms_norm": (x, None, weight, EPS)}.get(name, ())
    for triton, module in ((False, reference), (True, gpu)):
        monkeypatch.setattr(dispatch, "has_triton", lambda _, triton=triton: triton)
        monkeypatch.setattr(module, f"{name}_fp8", lambda *given, by=module: (by, *given))
        assert getattr(kernels, f"{name}_fp8")(x, *own, 32) == (module, x, *own, 32)


def test_rows_of_a_wider_tensor_are_read_in_place(device: torch.device) -> None:
    whole = random(4, 96).to(device)
    part = whole[:, 16:64]
    for one, other in zip(gpu.quantize_fp8(part), gpu.quantize_fp8(part.contiguous()), strict=True):
        assert torch.equal(one.float(), other.float())
    with pytest.raises(ValueError, match=r"x: .* contiguous rows"):
        gpu.quantize_fp8(whole.T)


def test_no_tokens_give_no_values(device: torch.device) -> None:
    values, scale = gpu.quantize_fp8(torch.empty(0, 32, device=device))
    assert values.shape == (0, 32)
    assert scale.shape == (0, 1)
