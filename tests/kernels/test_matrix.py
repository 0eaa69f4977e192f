"""Every layout of a matrix against its formula, value by value in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from forebay_kernels.matrix import (
    Dense,
    Fp8,
    GroupedInt8,
    Int4,
    Int8,
    Matrix,
    Reordered,
    concatenate,
    linear,
    linear_w8a8,
    pack_int4,
    quantize_tokens,
    unpack_int4,
)

OUT, IN, GROUP = 6, 16, 8


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def dense(seed: int) -> Dense:
    return Dense(random(OUT, IN, seed=seed))


def int8(seed: int) -> Int8:
    return Int8(integers(-128, 128, OUT, IN, seed=seed).to(torch.int8), random(OUT, seed=seed))


def grouped(seed: int, *, zero: bool = True) -> GroupedInt8:
    weight = integers(-128, 128, OUT, IN, seed=seed).to(torch.int8)
    zeros = random(OUT, IN // GROUP, seed=seed + 1) if zero else None
    return GroupedInt8(weight, random(OUT, IN // GROUP, seed=seed), zeros, GROUP)


def int4(seed: int) -> Int4:
    packed = integers(0, 256, OUT, IN // 2, seed=seed).to(torch.uint8)
    groups = (OUT, IN // GROUP)
    return Int4(packed, random(*groups, seed=seed), random(*groups, seed=seed + 1), GROUP)


def codebook(seed: int) -> Int4:
    packed = integers(0, 256, OUT, IN // 2, seed=seed).to(torch.uint8)
    return Int4(packed, random(OUT, IN // GROUP, seed=seed), None, GROUP, random(16))


def fp8(seed: int) -> Fp8:
    """With a last group that is shorter: 16 columns in groups of 6."""
    return Fp8(random(OUT, IN, seed=seed).to(torch.float8_e4m3fn), random(OUT, 3, seed=seed), 6)


def reordered(seed: int) -> Reordered:
    return Reordered(int4(seed), torch.randperm(IN, generator=torch.Generator().manual_seed(9)))


LAYOUTS = [dense, int8, grouped, int4, codebook, fp8, reordered]


def value(matrix: Matrix, o: int, i: int) -> float:
    """One value of the matrix by the formula in its docstring."""
    match matrix:
        case Dense(weight):
            return float(weight[o, i])
        case Int8(weight, scale):
            return int(weight[o, i]) * float(scale[o])
        case GroupedInt8(weight, scale, zero, group):
            less = 0.0 if zero is None else float(zero[o, i // group])
            return (int(weight[o, i]) - less) * float(scale[o, i // group])
        case Int4(packed, scale, zero, group, book):
            byte = int(packed[o, i // 2])
            q = byte // 16 if i % 2 else byte % 16
            level = q - float(zero[o, i // group]) if zero is not None else float(book[q])  # type: ignore[index] # one of both is there
            return level * float(scale[o, i // group])
        case Fp8(weight, scale, group):
            return float(weight[o, i].float()) * float(scale[o, i // group])
        case Reordered(inner, order):
            return value(inner, o, order.tolist().index(i))
    raise AssertionError(matrix)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_what_its_formula_says(layout: type) -> None:
    matrix = layout(3)
    want = torch.tensor(
        [[value(matrix, o, i) for i in range(IN)] for o in range(OUT)], dtype=torch.float64
    )
    got = matrix.dequantize()
    assert matrix.shape == (OUT, IN) == tuple(got.shape)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_the_dequantised_matrix(layout: type, dtype: torch.dtype) -> None:
    matrix, x, bias = layout(5), random(4, IN).to(dtype), random(OUT).to(dtype)
    got = linear(x, matrix, bias)
    want = x.double() @ matrix.dequantize().double().T + bias.double()
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_joined_matrices_keep_layout_and_values(layout: type) -> None:
    parts = [layout(seed) for seed in (1, 2, 3)]
    joined = concatenate(parts, torch.float32)
    assert type(joined) is type(parts[0])
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_parts_with_and_without_zeros_are_joined() -> None:
    parts = [grouped(1), grouped(2, zero=False)]
    joined = concatenate(parts, torch.float32)
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))
    none = concatenate([grouped(1, zero=False), grouped(2, zero=False)], torch.float32)
    assert isinstance(none, GroupedInt8)
    assert none.zero is None


@pytest.mark.parametrize(
    "parts",
    [
        [int8(1), dense(2)],
        [int4(1), codebook(2)],
        [grouped(1), GroupedInt8(grouped(2).weight, random(OUT, 4), None, 4)],
        [fp8(1), Fp8(fp8(2).weight, random(OUT, 1), IN)],
        [reordered(1), Reordered(int4(2), torch.arange(IN))],
    ],
)
def test_parts_of_unlike_layout_become_dense(parts: list[Matrix]) -> None:
    joined = concatenate(parts, torch.float32)
    assert isinstance(joined, Dense)
    assert torch.equal(joined.weight, torch.cat([part.dequantize() for part in parts]))


def test_parts_of_unlike_input_are_refused() -> None:
    with pytest.raises(ValueError, match=r"several sizes: \[16, 4\]"):
        concatenate([dense(1), Dense(random(2, 4))], torch.float32)


@given(st.data())
def test_unpacking_undoes_packing(data: st.DataObject) -> None:
    rows, half = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    values = torch.from_numpy(
        data.draw(arrays("uint8", (rows, 2 * half), elements=st.integers(0, 15)))
    )
    packed = pack_int4(values)
    assert packed.shape == (rows, half)
    assert torch.equal(unpack_int4(packed), values)


def test_tokens_are_rounded_to_int8_each_by_its_own_scale() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -127.0], [0.0, 0.0, 0.0, 0.0], [-2.54, 1.0, 0.0, 0.02]])
    rounded, scale = quantize_tokens(x)
    assert rounded.tolist() == [[127, 0, 2, -127], [0, 0, 0, 0], [-127, 50, 0, 1]]
    torch.testing.assert_close(scale, torch.tensor([1.0, 0.0, 0.02]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_in_integers_is_near_the_exact_one(dtype: torch.dtype) -> None:
    random_weight = integers(-127, 128, 32, 256).to(torch.int8)
    matrix = Int8(random_weight, random(32).abs() / 127)
    x = random(8, 256, seed=1).to(dtype)
    got, want = linear_w8a8(x, matrix), x.double() @ matrix.dequantize().double().T
    assert got.dtype == dtype
    assert (got.double() - want).norm() <= 0.01 * want.norm()
    # And exactly the sum of products of what was rounded.
    rounded, scale = quantize_tokens(x)
    exact = (rounded.long() @ matrix.weight.long().T).float() * scale[:, None] * matrix.scale
    assert torch.equal(got, exact.to(dtype))


def test_a_matrix_moves_with_all_that_it_is_made_of() -> None:
    matrix = Reordered(grouped(1), torch.randperm(IN))
    assert matrix.device == torch.device("cpu")
    moved = matrix.to(torch.device("meta"))
    assert isinstance(moved, Reordered)
    assert isinstance(moved.matrix, GroupedInt8)
    parts = (moved.order, moved.matrix.weight, moved.matrix.scale, moved.matrix.zero)
    assert all(part is not None and part.is_meta for part in parts)
    assert moved.device == torch.device("meta")
    assert moved.matrix.group == GROUP
    assert int4(1).to(torch.device("meta")).shape == (OUT, IN)
