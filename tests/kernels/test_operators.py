"""The eager operators against the references, and the references against plain numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import forebay_kernels as kernels
from forebay_kernels import reference

#: Largest difference between an operator and its reference in float64, next to the reference's
#: largest value: rounding to the type, once or (gates) twice.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}

DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (5, 123), (3, 7, 80)])
def test_rms_norm(path: str, shape: tuple[int, ...], unit_offset: bool, dtype: torch.dtype) -> None:
    x, weight = (3 * random(*shape)).to(dtype), random(shape[-1], seed=1)
    before = x.clone()
    got = kernels.rms_norm(x, weight, 1e-6, unit_offset=unit_offset)
    want = reference.rms_norm(x.double(), weight.double(), 1e-6, unit_offset=unit_offset)
    assert_near(got, want, dtype)
    assert torch.equal(x, before)


def test_rms_norm_of_heads_has_a_weight_for_each() -> None:
    x, weight = random(4, 3, 16), random(3, 16, seed=1)
    got = kernels.rms_norm(x, weight, 1e-6)
    for head in range(3):
        want = reference.rms_norm(x[:, head].double(), weight[head].double(), 1e-6)
        assert_near(got[:, head], want, torch.float32)


def test_rms_norm_is_its_formula() -> None:
    x, weight = random(5, 33).double(), random(33, seed=1).double()
    a = x.numpy()
    want = a / np.sqrt((a**2).mean(-1, keepdims=True) + 0.5) * (1 + weight.numpy())
    got = reference.rms_norm(x, weight, 0.5, unit_offset=True)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope(dtype: torch.dtype) -> None:
    # A view of a larger tensor, as the runner's queries are of its q, k and v.
    x = random(9, 7, 24).to(dtype)[:, 1:6]
    angle = 10 * random(9, 12, seed=1)
    got = kernels.rope(x, angle.cos(), angle.sin())
    want = reference.rope(x.double(), angle.double().cos(), angle.double().sin())
    assert_near(got, want, dtype)


def test_rope_turns_pairs_of_the_two_halves() -> None:
    x = random(3, 2, 8).double()
    angle = random(3, 4, seed=1).double()
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * angle).unsqueeze(1)
    got = reference.rope(x, angle.cos(), angle.sin())
    torch.testing.assert_close(got, torch.cat((pairs.real, pairs.imag), -1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("width", [16, 37, 640])
def test_add_rms_norm(path: str, width: int, normed: bool, dtype: torch.dtype) -> None:
    x, added = random(70, width).to(dtype), random(70, width, seed=1).to(dtype)
    inner, outer = random(width, seed=2), random(width, seed=3)
    stream = x.clone()
    got = kernels.add_rms_norm(stream, added, inner if normed else None, outer, 1e-6)
    wide = added.double()
    sum_ = x.double() + (reference.rms_norm(wide, inner.double(), 1e-6) if normed else wide)
    assert_near(stream, sum_, dtype)
    assert_near(got, reference.rms_norm(sum_, outer.double(), 1e-6), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_argmax_is_the_first_of_the_largest(path: str, dtype: torch.dtype) -> None:
    x = -5.0 - random(3, 40_001).abs()
    x[0, [16_384, 16_390, 39_999]] = -1.0
    x[1, 40_000] = -1.0
    x[2] = -float("inf")
    found = kernels.argmax(x.to(dtype))
    assert found.tolist() == [16_384, 40_000, 0]
    # Rows of a wider tensor.
    assert kernels.argmax(x.to(dtype)[:, 16_385:]).tolist() == [5, 23_615, 0]


def qkv_case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Five tokens of 4 heads on 2, of which the second is not stored; caches of NaN."""
    qkv = random(5, 8, 24).to(dtype)
    keys, values = (torch.full((2, 4, 3, 24), float("nan"), dtype=dtype) for _ in range(2))
    return qkv, keys, values, torch.tensor([7, -1, 0, 11, 4])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("half", [0, 4, 12])
@pytest.mark.parametrize("normed", [False, True])
def test_prepare_qkv(path: str, normed: bool, half: int, dtype: torch.dtype) -> None:
    qkv, keys, values, slots = qkv_case(dtype)
    weight, angle = random(6, 24, seed=1), 10 * random(5, half, seed=2)
    wide = qkv.double()
    rotated, value = wide[:, :6], wide[:, 6:]
    if normed:
        rotated = reference.rms_norm(rotated, weight.double(), 1e-6)
    if half:
        cos, sin = angle.double().cos(), angle.double().sin()
        turned = reference.rope(rotated[..., : 2 * half], cos, sin)
        rotated = torch.cat((turned, rotated[..., 2 * half :]), -1)
    angles = (angle.cos(), angle.sin()) if half else None
    norm = weight if normed else None
    found = kernels.prepare_qkv(qkv, 2, norm, 1e-6, angles, keys, values, slots)
    assert_near(found, rotated[:, :4], dtype)
    stored = slots >= 0
    for cache, want in ((keys, rotated[:, 4:]), (values, value)):
        flat = cache.flatten(1, 2).transpose(0, 1)
        assert_near(flat[slots[stored]], want[stored], dtype)
        others = torch.ones(12, dtype=torch.bool)
        others[slots[stored]] = False
        assert flat[others].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["silu_mul", "gelu_tanh_mul"])
def test_gates(path: str, name: str, dtype: torch.dtype) -> None:
    x = (4 * random(5, 246)).to(dtype)
    assert_near(getattr(kernels, name)(x), getattr(reference, name)(x.double()), dtype)


def test_gates_are_their_formulas() -> None:
    x = 3 * random(4, 10).double()
    gate, up = x[:, :5].numpy(), x[:, 5:].numpy()
    np.testing.assert_allclose(
        reference.silu_mul(x).numpy(), gate / (1 + np.exp(-gate)) * up, rtol=1e-12
    )
    inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
    np.testing.assert_allclose(
        reference.gelu_tanh_mul(x).numpy(), gate / 2 * (1 + np.tanh(inner)) * up, atol=1e-14
    )


@pytest.mark.parametrize("slots", [[5, 0, 11, 2], [5, -1, 11, -1], [-1, -1, -1, -1]])
def test_kv_store_writes_its_slots_and_nothing_else(slots: list[int]) -> None:
    key, value = random(4, 2, 8), random(4, 2, 8, seed=1)
    stores = []
    for store in (kernels.kv_store, reference.kv_store):
        caches = [torch.full((2, 3, 4, 8), -7.0) for _ in range(2)]
        store(key, value, caches[0], caches[1], torch.tensor(slots))
        stores.append(caches)
    for got, want in zip(*stores, strict=True):
        assert torch.equal(got, want)
    written = sum(slot >= 0 for slot in slots)
    assert int((stores[0][0] != -7.0).sum()) == written * 2 * 8
    for token, slot in enumerate(slots):
        if slot >= 0:
            assert torch.equal(stores[0][1][:, slot // 4, slot % 4], value[token])


class OlderTorch(TorchDispatchMode):
    """Makes NaN of what FP8 can't hold, as not all versions do."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") == torch.float8_e4m3fn:
            args = (args[0].masked_fill(args[0].abs() > 464.0, math.nan), *args[1:])
        return function(*args, **kwargs)


@pytest.mark.parametrize("store", [kernels.kv_store, reference.kv_store])
def test_kv_store_saturates_in_fp8(store: Any) -> None:
    """Quotients by each head's scale; what is too large is the largest number, never NaN."""
    keys, values = (torch.zeros((2, 3, 4, 6), dtype=torch.float8_e4m3fn) for _ in range(2))
    x = torch.tensor([1.0, -3.3, 448.0, 464.1, -1e30, math.inf]).expand(2, 2, 6).bfloat16()
    scales = {"key_scale": torch.tensor([1.0, 0.5]), "value_scale": torch.tensor([2.0, 4.0])}
    with OlderTorch():
        store(x, -x, keys, values, torch.tensor([-1, 5]), **scales)
    held = torch.zeros(3, 4, dtype=torch.bool)
    held[1, 1] = True
    for cache, x0, scale in ((keys, x, "key_scale"), (values, -x, "value_scale")):
        assert not cache.float()[:, ~held].any()
        for head in range(2):
            want = (x0[0, head].float() / scales[scale][head]).clamp(-448.0, 448.0)
            got = cache[head, 1, 1].float()
            torch.testing.assert_close(got, want, rtol=1 / 16, atol=2**-10)
            assert got.abs().max() == 448.0
