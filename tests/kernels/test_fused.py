"""The Triton kernels between the matrix products, against the references in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import forebay_kernels as kernels
from forebay_kernels import dispatch, eager, reference
from forebay_kernels.cpu import operators as compiled
from forebay_kernels.gpu import activations, embedding, norms, qkv
from forebay_kernels.gpu.tuning import choose

#: Relative error of the result: one rounding to the type, and float32's sums. Triton's interpreter
#: cuts off what does not fit bfloat16, where a GPU rounds.
TOLERANCE = {
    torch.float32: 1e-6,
    torch.float16: 4e-4,
    torch.bfloat16: 2.5e-3 if torch.cuda.is_available() else 5e-3,
}
#: Rounding to E4M3's 3 bits of mantissa; the interpreter cuts off here too.
FP8_TOLERANCE = 0.04 if torch.cuda.is_available() else 0.08
DTYPES = list(TOLERANCE)

FP8 = torch.float8_e4m3fn
NAN = float("nan")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Outputs begin as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    error = float((got.double() - want.double()).norm() / want.double().norm())
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 16384), (3, 2, 123), (5, 640), (2, 4104), (3, 1)])
def test_rms_norm(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (3 * random(device, *shape)).to(dtype)
    weight = random(device, shape[-1], seed=1)
    got = norms.rms_norm(x, weight, 1e-5)
    assert (got.shape, got.dtype) == (x.shape, dtype)
    assert_near(got, reference.rms_norm(x.double(), weight.double(), 1e-5), TOLERANCE[dtype])


def test_rms_norm_takes_rows_at_a_distance(device: torch.device) -> None:
    wide, weight = random(device, 4, 100), random(device, 60, seed=1)
    got = norms.rms_norm(wide[1:, 8:68], weight, 1e-6)
    assert_near(got, reference.rms_norm(wide[1:, 8:68].double(), weight.double(), 1e-6), 1e-6)
    assert norms.rms_norm(wide[:0, :60], weight, 1e-6).shape == (0, 60)


@pytest.mark.parametrize("dtype", DTYPES)
def test_select_rms_norm(device: torch.device, dtype: torch.dtype) -> None:
    """Rows that are not wanted are NaN, the first too, which padding might stand for."""
    hidden = random(device, 7, 200).to(dtype)
    hidden[[0, 2, 6]] = NAN
    weight = random(device, 200, seed=1)
    at = torch.tensor([5, -1, 1, 3, 3, -7, 4], device=device)
    got = norms.select_rms_norm(hidden, at, weight, 1e-6)
    want = reference.select_rms_norm(hidden.double(), at, weight.double(), 1e-6)
    assert got.dtype == dtype
    assert_near(got, want, TOLERANCE[dtype])
    assert not got[[1, 5]].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("width", [37, 1152, 5376])
def test_add_rms_norm(device: torch.device, width: int, inner: bool, dtype: torch.dtype) -> None:
    x = random(device, 3, width).to(dtype)
    added = (5 * random(device, 3, width, seed=1)).to(dtype)
    weights = random(device, 2, width, seed=2)
    stream, wide = x.clone(), x.double()
    before = weights[0] if inner else None
    got = norms.add_rms_norm(stream, added, before, weights[1], 1e-6)
    first = weights[0].double() if inner else None
    want = reference.add_rms_norm(wide, added.double(), first, weights[1].double(), 1e-6)
    assert got.dtype == dtype
    assert_near(stream, wide, TOLERANCE[dtype])
    # The norm is of the stream as it was rounded.
    assert_near(
        got, reference.rms_norm(stream.double(), weights[1].double(), 1e-6), TOLERANCE[dtype]
    )
    assert_near(got, want, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["silu_mul", "gelu_tanh_mul"])
@pytest.mark.parametrize("shape", [(2, 2, 246), (1, 4100)])
def test_gates(device: torch.device, shape: tuple[int, ...], name: str, dtype: torch.dtype) -> None:
    x = (3 * random(device, *shape)).to(dtype)
    got = getattr(activations, name)(x)
    assert (got.shape, got.dtype) == ((*shape[:-1], shape[-1] // 2), dtype)
    assert_near(got, getattr(reference, name)(x.double()), TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["silu_mul", "gelu_tanh_mul"])
def test_gates_of_huge_values_are_their_limits(device: torch.device, name: str) -> None:
    x = torch.tensor([[-3e4, -100.0, -1e-30, 0.0, 100.0, 3e4] + [2.0] * 6], device=device)
    want = getattr(reference, name)(x.double())
    torch.testing.assert_close(getattr(activations, name)(x).double(), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, 25.25])
def test_embedding_is_exact(device: torch.device, scale: float | None, dtype: torch.dtype) -> None:
    """As Gemma's is: rows times a scale of the weights' type, rounded once."""
    weight = random(device, 9, 1100).to(dtype)
    ids = torch.tensor([3, 8, 0, 3], device=device)
    want = weight[ids]
    if scale is not None:
        want = want * torch.tensor(scale, dtype=dtype, device=device)
    found = embedding.embedding(ids, weight, scale)
    if scale is not None and dtype == torch.bfloat16 and device.type == "cpu":
        assert_near(found, want, 2 * TOLERANCE[dtype])  # the interpreter cuts it off
    else:
        assert torch.equal(found, want)


def test_embedding_of_ids_that_are_not_there_is_zero(device: torch.device) -> None:
    weight = random(device, 5, 20)
    found = embedding.embedding(torch.tensor([-1, 5, 1 << 40, 4], device=device), weight, None)
    assert not found[:3].any()
    assert torch.equal(found[3], weight[4])


@pytest.mark.parametrize(("half", "factor"), [(64, 1.0), (48, 1.19)])
def test_rotary_angles(device: torch.device, half: int, factor: float) -> None:
    positions = torch.tensor([0, 1, 77, 131071, 1_000_003], device=device)
    frequency = 5e5 ** -(torch.arange(half, device=device) / half)
    angle = (positions.float().unsqueeze(1) * frequency).double()
    for got, want in zip(
        embedding.rotary_angles(positions, frequency, factor),
        (angle.cos(), angle.sin()),
        strict=True,
    ):
        torch.testing.assert_close(got.double(), factor * want, atol=3e-7, rtol=0)


def heads_case(
    device: torch.device, dim: int, dtype: torch.dtype, *, heads: int = 6, kv_heads: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Five tokens, of which two are padding (NaN), and caches of NaN in pages of 3."""
    wide = random(device, 5, heads + 2 * kv_heads + 1, dim).to(dtype)
    wide[[1, 4]] = NAN
    caches = torch.full((2, kv_heads, 4, 3, dim), NAN, dtype=dtype, device=device)
    slots = torch.tensor([7, -1, 0, 11, -5], device=device)
    # Tokens may lie at a distance, and the caches beside each other.
    return wide[:, 1:], caches[0], caches[1], slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "half"), [(24, None), (128, 64), (24, 4), (96, 36)])
@pytest.mark.parametrize("normed", [False, True])
def test_prepare_qkv(
    device: torch.device, normed: bool, dim: int, half: int | None, dtype: torch.dtype
) -> None:
    x, keys, values, slots = heads_case(device, dim, dtype)
    weight = random(device, 8, dim, seed=1) if normed else None
    angle = 10 * random(device, 5, 2 * (half or 1), seed=2)[:, : half or 1]
    angles = (angle.cos(), angle.sin()) if half else None
    want, wide_keys, wide_values = by_reference(x, weight, angles, keys, values, slots)
    before = x.clone()
    qkv.prepare_qkv(x, 2, weight, 1e-6, angles, keys, values, slots, None, None)
    stored = [0, 2, 3]
    assert_near(x[stored, :6], want[stored], TOLERANCE[dtype])
    assert torch.equal(x[stored, 6:], before[stored, 6:])
    for cache, wanted in ((keys, wide_keys), (values, wide_values)):
        held = ~wanted.isnan()
        assert torch.equal(~cache.isnan(), held)  # nothing but the slots
        assert_near(cache[held], wanted[held], TOLERANCE[dtype])


def by_reference(
    x: Tensor,
    weight: Tensor | None,
    angles: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = keys.double(), values.double()
    found = reference.prepare_qkv(
        x.double(),
        len(keys),
        None if weight is None else weight.double(),
        1e-6,
        None if angles is None else (angles[0].double(), angles[1].double()),
        *wide,
        slots,
    )
    return found, *wide


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (17, 9), (5, 1)])
def test_prepare_qkv_of_any_number_of_heads(
    device: torch.device, heads: int, kv_heads: int
) -> None:
    x, keys, values, slots = heads_case(device, 80, torch.float32, heads=heads, kv_heads=kv_heads)
    weight = random(device, heads + kv_heads, 80, seed=1)
    angle = random(device, 5, 40, seed=2)
    angles = angle.cos(), angle.sin()
    want, wide_keys, wide_values = by_reference(x, weight, angles, keys, values, slots)
    qkv.prepare_qkv(x, kv_heads, weight, 1e-6, angles, keys, values, slots, None, None)
    assert_near(x[[0, 2, 3], :heads], want[[0, 2, 3]], 1e-6)
    torch.testing.assert_close(keys.double(), wide_keys, atol=1e-5, rtol=0, equal_nan=True)
    torch.testing.assert_close(values.double(), wide_values, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("place", ["triton", "cpu", "triton store", "cpu store"])
def test_fp8_cache_holds_values_over_scales(device: torch.device, place: str) -> None:
    """Too large a value becomes the largest, never NaN."""
    where = device if "triton" in place else torch.device("cpu")
    x, _, _, slots = heads_case(where, 24, torch.bfloat16)
    x[0, 7, 3], x[0, 9, 4], x[2, 8, 5] = 3e4, -3e4, float("inf")
    caches = [torch.full((2, 4, 3, 24), 1.5, device=where).to(FP8) for _ in range(2)]
    want = [cache.double() for cache in caches]
    scales = torch.tensor([[0.02, 0.7], [1.0, 0.01]], device=where)
    angle = random(where, 5, 4, seed=2)
    angles = angle.cos(), angle.sin()
    if "store" in place:
        wide = [torch.empty(2, 4, 3, 24, dtype=FP8, device=where).copy_(c) for c in caches]
        reference.kv_store(x[:, 6:8], x[:, 8:], *wide, slots, *scales)
        want = [cache.double() for cache in wide]
        store = qkv.kv_store if "triton" in place else kernels.kv_store
        store(x[:, 6:8], x[:, 8:], *caches, slots, *scales)
    else:
        reference.prepare_qkv(
            x.double(),
            2,
            None,
            0.0,
            (angles[0].double(), angles[1].double()),
            *want,
            slots,
        )
        for cache, scale in zip(want, scales, strict=True):
            written = cache != 1.5
            cache[written] = (cache / scale.double().view(2, 1, 1, 1)).clamp(-448, 448)[written]
        prepare = qkv.prepare_qkv if "triton" in place else kernels.prepare_qkv
        prepare(x, 2, None, 0.0, angles, *caches, slots, *scales)
    for cache, wanted in zip(caches, want, strict=True):
        found = cache.double()
        assert not found.isnan().any()
        assert_near(found, wanted, FP8_TOLERANCE)
        assert int((found == 1.5).sum()) >= 2 * 9 * 24  # the other slots
    assert float(caches[0].double().max()) == 448.0
    assert float(caches[1].double().min()) == -448.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_store(device: torch.device, dtype: torch.dtype) -> None:
    x, keys, values, slots = heads_case(device, 20, dtype, heads=1, kv_heads=3)
    want = keys.clone(), values.clone()
    reference.kv_store(x[:, 1:4], x[:, 4:], *want, slots)
    qkv.kv_store(x[:, 1:4], x[:, 4:], keys, values, slots, None, None)
    for got, wanted in zip((keys, values), want, strict=True):
        torch.testing.assert_close(got, wanted, atol=0, rtol=0, equal_nan=True)


def test_slots_may_lie_beyond_32_bits(device: torch.device) -> None:
    """A page whose first value is past 2^31, of the second head too (of virtual memory)."""
    page = (1 << 31) // (16 * 64) + 5
    x = random(device, 1, 4, 64).half()
    slots = torch.tensor([page * 16 + 3], device=device)
    torch.use_deterministic_algorithms(False)  # which would touch all of it
    cache = torch.empty((1, page + 1, 16, 64), dtype=torch.float16, device=device)
    for name in ("prepare", "store"):
        cache[0, page].fill_(NAN)
        keys, values = cache, cache[:, :, 8:]
        if name == "prepare":
            qkv.prepare_qkv(x, 1, None, 0.0, None, keys[:, :, :8], values, slots // 2, None, None)
        else:
            qkv.kv_store(x[:, 2:3], x[:, 3:], keys[:, :, :8], values, slots // 2, None, None)
        offset = int(slots // 2) % 8
        far = int(slots // 2) // 8
        assert torch.equal(cache[0, far, offset], x[0, 2])
        assert torch.equal(cache[0, far, 8 + offset], x[0, 3])


def test_wrong_inputs_are_named(device: torch.device) -> None:
    x, keys, values, slots = heads_case(device, 24, torch.float32)
    weight = random(device, 20)
    with pytest.raises(ValueError, match=r"weight: must be \[24\] float32"):
        norms.rms_norm(x[:, 0], weight, 1e-6)
    with pytest.raises(ValueError, match="at: must be int64"):
        norms.select_rms_norm(random(device, 3, 20), slots.int(), weight, 1e-6)
    with pytest.raises(ValueError, match="added: must be contiguous"):
        norms.add_rms_norm(random(device, 3, 20), random(device, 20, 3).T, None, weight, 1e-6)
    with pytest.raises(ValueError, match="x: must be contiguous"):
        activations.silu_mul(random(device, 3, 8)[:, :6])
    with pytest.raises(ValueError, match="qkv: the heads of a token must be contiguous"):
        qkv.prepare_qkv(x[:, ::2], 1, None, 0.0, None, keys, values, slots, None, None)
    with pytest.raises(ValueError, match="slots: must be int64"):
        qkv.prepare_qkv(x, 2, None, 0.0, None, keys, values, slots.int(), None, None)
    with pytest.raises(ValueError, match=r"norm: must be \[8, 24\]"):
        qkv.prepare_qkv(x, 2, weight, 0.0, None, keys, values, slots, None, None)
    with pytest.raises(ValueError, match="key_scale: a cache of FP8 needs one"):
        kernels.prepare_qkv(x, 2, None, 0.0, None, keys.to(FP8), values.to(FP8), slots)
    with pytest.raises(ValueError, match="value_scale: a cache of FP8 needs one, any other has"):
        kernels.kv_store(x[:, :2], x[:, 2:4], keys, values, slots, None, weight[:2])


def test_a_gpu_takes_these_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operator by its one name, while nothing else may compute it."""
    monkeypatch.setattr(dispatch, "has_triton", lambda x: True)

    def wrong(*args: Any, **settings: Any) -> None:
        raise AssertionError("not by Triton")

    for name in ("rms_norm", "embedding", "rotary_angles", "silu_mul", "gelu_tanh_mul"):
        monkeypatch.setattr(eager, name, wrong)
    for module in (eager, compiled):
        monkeypatch.setattr(module, "prepare_qkv", wrong)
    for name in ("rms_norm", "add_rms_norm", "silu_mul", "gelu_tanh_mul"):
        monkeypatch.setattr(compiled, name, wrong)
    monkeypatch.setattr(eager, "kv_store", wrong)

    x, weight = random(device, 4, 32), random(device, 32, seed=1)
    ids = torch.tensor([2, 0], device=device)
    same = [
        ("rms_norm", (x, weight, 1e-6)),
        ("select_rms_norm", (x, ids, weight, 1e-6)),
        ("embedding", (ids, x, 2.0)),
        ("silu_mul", (x,)),
        ("gelu_tanh_mul", (x,)),
    ]
    for name, inputs in same:
        assert_near(getattr(kernels, name)(*inputs), getattr(reference, name)(*inputs), 1e-6)
    assert_near(
        kernels.rotary_angles(ids, weight, 1.0)[1], torch.sin(ids.unsqueeze(1) * weight), 1e-6
    )
    want = reference.add_rms_norm(x.clone(), x, weight, weight, 1e-6)
    assert_near(kernels.add_rms_norm(x.clone(), x, weight, weight, 1e-6), want, 1e-6)
    heads, keys, values, slots = heads_case(device, 24, torch.float32)
    want = heads[:, :6].clone()
    found = kernels.prepare_qkv(heads, 2, None, 0.0, None, keys, values, slots)
    torch.testing.assert_close(found, want, atol=0, rtol=0, equal_nan=True)
    keys.fill_(NAN)
    kernels.kv_store(heads[:, 6:8], heads[:, 8:], keys, values, slots)
    assert torch.equal(keys[:, 2, 1], heads[0, 6:8])


#: Width of a norm, and whether what is added is normed too.
NORMS = [(1024, False), (4096, False), (5376, True), (16384, True)]
#: Heads, KV heads, their size and the rotated half; normed; into FP8. Of Qwen 3, Llama 3, Gemma 3
#: and Phi-4.
HEADS = [
    (16, 8, 128, 64, True, False),
    (32, 8, 128, 64, False, True),
    (4, 1, 256, 128, True, False),
    (24, 8, 128, 48, False, False),
]


def launch_norms() -> None:
    for width, inner in NORMS:
        x, weight = torch.empty(2, width, dtype=torch.bfloat16), torch.empty(width)
        norms.add_rms_norm(x, x, weight if inner else None, weight, 1e-6)


def launch_heads() -> None:
    for heads, kv_heads, dim, half, normed, fp8 in HEADS:
        x = torch.empty(3, heads + 2 * kv_heads, dim, dtype=torch.bfloat16)
        cache = torch.empty(kv_heads, 4, 16, dim, dtype=FP8 if fp8 else torch.bfloat16)
        norm = torch.empty(heads + kv_heads, dim) if normed else None
        scales = (torch.ones(kv_heads),) * 2 if fp8 else (None, None)
        angles = (torch.empty(3, half),) * 2
        slots = torch.zeros(3, dtype=torch.int64)
        qkv.prepare_qkv(x, kv_heads, norm, 1e-6, angles, cache, cache, slots, *scales)


def launch_others() -> None:
    x, at = torch.empty(80, 4096, dtype=torch.bfloat16), torch.zeros(80, dtype=torch.int64)
    norms.select_rms_norm(x, at, torch.empty(4096), 1e-6)
    activations.gelu_tanh_mul(x)
    embedding.embedding(at, x, 25.25)
    cache = torch.empty(8, 4, 16, 128, dtype=torch.bfloat16)
    heads = x.view(80, 32, 128)
    qkv.kv_store(heads[:, :8], heads[:, 8:16], cache, cache, at, None, None)
    embedding.rotary_angles(at, torch.empty(64), 1.0)


def test_they_compile_for_hopper(compile_for_hopper: Any) -> None:
    """Without spills, by vectors of 128 bits, each value loaded once; heads without a barrier."""
    names = ("launch_norms", "launch_heads", "launch_others")
    found = compile_for_hopper(
        *({"launch": f"{__file__}:{name}", "arguments": {}} for name in names)
    )
    assert [one.spilled_bytes for one in found] == [0] * (len(NORMS) + len(HEADS) + 5)
    for (width, inner), one in zip(NORMS, found, strict=False):
        threads = 32 * choose("rms_norm", torch.device("cpu"), width=width)["warps"]
        each = (1 << (width - 1).bit_length()) // threads  # values a thread
        loads = each * (2 * 2 + 4 * (1 + inner)) // 16  # x, added; weights
        assert one.ptx.count("ld.global.v4.b32") == loads
        assert one.ptx.count("st.global.v4.b32") == 2 * each * 2 // 16
    heads, others = found[len(NORMS) : -5], found[-5:]
    for one in [*heads, *others[:-1]]:
        assert "ld.global.v4.b32" in one.ptx
        assert "st.global.v4.b32" in one.ptx
        assert not any(f"{way}.global.b16" in one.ptx for way in ("ld", "st"))
    for one in heads:
        assert one.shared_bytes == 0
        assert "bar.sync" not in one.ptx
    assert "cvt.rn.satfinite.e4m3x2" in heads[1].ptx
    # Not the approximation, which is wrong at the positions of a long context.
    assert "cos.approx" not in others[-1].ptx
