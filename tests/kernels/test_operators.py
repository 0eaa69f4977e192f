"""The eager operators against the references, and the references against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

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
def test_rms_norm(shape: tuple[int, ...], unit_offset: bool, dtype: torch.dtype) -> None:
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
@pytest.mark.parametrize("name", ["silu_mul", "gelu_tanh_mul"])
def test_gates(name: str, dtype: torch.dtype) -> None:
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
