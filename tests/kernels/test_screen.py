"""What a screen leaves of a product holds every draw, to the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from forebay_engine.noise import gumbel, position_key
from forebay_kernels import cpu
from forebay_kernels.cpu import DenseLinear, Screen, pack
from forebay_kernels.matrix import Dense


@pytest.fixture(params=[1, 3], autouse=True)
def threads(request: Any) -> Iterator[None]:
    cpu.set_threads(request.param)
    yield
    cpu.set_threads(1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def screened(weight: Tensor) -> tuple[DenseLinear, Screen]:
    product = pack(Dense(weight))
    assert isinstance(product, DenseLinear)
    return product, Screen(product, weight)


def drawn(logits: Tensor, ids: Tensor, temperature: float, key: int) -> int:
    """By the definition: the first of the largest sums."""
    if temperature == 0:
        return int(ids[logits.float().argmax()])
    return int(ids[(logits.float() / temperature + gumbel(key, ids)).argmax()])


def checked(
    product: DenseLinear, screen: Screen, x: Tensor, temperatures: list[float], seed: int = 0
) -> int:
    """The number of columns that are left, all draws of which are those of the whole product."""
    keys = [position_key(seed, row) for row in range(len(x))]
    found = screen.shortlist(x, temperatures, keys)
    assert found is not None
    logits, ids = found
    whole, everything = product(x), torch.arange(product.out)
    assert logits.dtype == x.dtype
    assert torch.equal(logits, whole[:, ids])
    assert torch.equal(ids, ids.unique())
    for row, (temperature, key) in enumerate(zip(temperatures, keys, strict=True)):
        want = drawn(whole[row], everything, temperature, key)
        assert drawn(logits[row], ids, temperature, key) == want
    return len(ids)


#: (out, in): a remainder of a panel, of a step of four, and of both.
SHAPES = [(3000, 64), (2048, 17), (1029, 130), (4096, 640)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "into"), SHAPES)
def test_draws_are_those_of_the_whole_product(out: int, into: int, dtype: torch.dtype) -> None:
    weight = random(out, into, seed=1).to(dtype)
    product, screen = screened(weight)
    for rows in (1, 2, 6, 7, 13):
        # Towards some column, as hidden states are; and a view of a wider tensor of NaN.
        wide = torch.full((rows, into + 3), float("nan")).to(dtype)
        x = wide[:, 1 : into + 1].copy_(
            weight[torch.arange(rows) % 5].float() + 0.3 * random(rows, into, seed=rows)
        )
        temperatures = [(0.0, 1.0, 0.3, 0.7)[row % 4] for row in range(rows)]
        assert 0 < checked(product, screen, x, temperatures) <= out // 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_nearer_to_each_other_than_rounding_are_told_apart(dtype: torch.dtype) -> None:
    """Each is one column and next to nothing: int8 takes them for equal or orders them wrongly."""
    one = random(1, 96, seed=3)
    weight = random(2000, 96, seed=4)
    places = torch.arange(7, 2000, 199)
    weight[places] = 3.0 * one + 0.01 * random(len(places), 96, seed=5)
    product, screen = screened(weight.to(dtype))
    for seed in range(40):
        x = (one + 0.1 * random(5, 96, seed=seed)).to(dtype)
        checked(product, screen, x, [0.0, 0.0, 1.0, 0.2, 0.0], seed)


def test_noise_decides_among_many() -> None:
    """Logits that hardly differ: of every thousand draws nearly all fall on different tokens."""
    weight = 0.05 * random(8192, 32, seed=1)
    product, screen = screened(weight)
    tokens = set()
    for seed in range(60):
        x = random(4, 32, seed=seed)
        assert checked(product, screen, x, [1.0, 1.0, 0.5, 2.0], seed) < 8192 // 4
        tokens.add(drawn(product(x)[0], torch.arange(8192), 1.0, position_key(seed, 0)))
    assert len(tokens) > 50


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_outliers_widen_the_bounds_of_their_columns_only(temperature: float) -> None:
    weight = random(4000, 128, seed=1)
    weight[::500, 5] = 300.0  # a scale so large that the rest of the column is rounded to 0
    product, screen = screened(weight)
    x = weight[[3, 77, 1234]] + 0.0
    x[:, 9] *= 100.0  # of inputs an outlier costs nothing
    left = checked(product, screen, x, [temperature] * 3)
    assert 8 * 32 <= left <= 20 * 32


@pytest.mark.parametrize("outlier", [0.0, 2.5e7])
def test_every_digit_of_the_inputs_counts(outlier: float) -> None:
    """Weights are exact, half of them in steps of 1/2; columns differ by a digit here and there.

    Inputs are exact in 15 bits; beside an outlier that meets no weight some 8 values are left.
    """
    numbers = torch.Generator().manual_seed(1)
    base = torch.randint(-60, 61, (64,), generator=numbers).float()
    weight = torch.randint(-6, 7, (4000, 64), generator=numbers).float()
    places = torch.arange(5, 4000, 399)
    weight[places] = base + torch.randint(-1, 2, (len(places), 64), generator=numbers)
    weight[:, 8], weight[:, 9] = 127.0, 0.0
    weight[places[::2], 8] = 63.5
    product, screen = screened(weight)
    for seed in range(50):
        numbers.manual_seed(seed)
        x = 100.0 * base + torch.randint(-5000, 5001, (1, 64), generator=numbers)
        x[:, 8], x[:, 9] = 0.0, outlier or 16256.0
        checked(product, screen, x, [0.0])


def test_ties_go_to_the_first() -> None:
    weight = random(1000, 64, seed=1)
    weight[[40, 500, 990]] = 5.0 * weight[7]
    _, screen = screened(weight)
    found = screen.shortlist(weight[7:8], [0.0], [0])
    assert found is not None
    logits, ids = found
    assert int(ids[logits[0].argmax()]) == 40
    assert {40, 500, 990} <= set(ids.tolist())


def test_logits_that_bfloat16_makes_equal_are_equal() -> None:
    """1000 and 1001 are both 1000 there, and the first is drawn; the screen sees the difference."""
    weight = torch.zeros(1000, 64)
    weight[40, :50] = weight[500, :50] = 20.0
    weight[500, 60] = 1.0
    weight[:, 63] = 127.0
    x = torch.ones(1, 64)
    x[0, 63] = 0.0
    _, screen = screened(weight.bfloat16())
    found = screen.shortlist(x.bfloat16(), [0.0], [0])
    assert found is not None
    logits, ids = found
    assert logits.amax() == 1000.0
    assert int(ids[logits[0].argmax()]) == 40


def test_a_screen_that_does_not_pay_rests_longer_each_time() -> None:
    weight = random(4096, 64, seed=1)
    _, screen = screened(weight)
    flat, good = torch.zeros(1, 64), weight[5:6]

    def asked(x: Tensor) -> bool:
        return screen.shortlist(x, [0.0], [0]) is not None

    assert asked(good)
    for pause in (1, 2, 4, 8, 16, 32, 64, 64):
        assert not asked(flat)
        assert not any(asked(good) for _ in range(pause))
    assert asked(good)
    assert not asked(flat)
    assert not asked(good)
    assert asked(good)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_screens_nothing_out(value: float) -> None:
    weight = random(4096, 64, seed=1)
    _, screen = screened(weight)
    x = weight[[5, 6]] + 0.0
    x[1, 3] = value
    assert screen.shortlist(x, [0.0, 0.0], [0, 0]) is None
    weight[1000, 7] = value
    _, screen = screened(weight)
    found = screen.shortlist(weight[[5]], [0.0], [0])
    assert found is not None
    assert 1000 in found[1]


def test_what_does_not_fit_is_refused() -> None:
    weight = random(64, 32)
    product, screen = screened(weight)
    with pytest.raises(
        ValueError, match=r"float32 \[2, 31\], but it takes torch.float32 \[.., 32\]"
    ):
        screen.shortlist(random(2, 31), [0.0] * 2, [0] * 2)
    with pytest.raises(ValueError, match=r"no screen for torch.float64 \[64, 32\] on cpu"):
        Screen(product, weight.double())
    with pytest.raises(ValueError, match="of 2 rows, 1 temperatures and 3 keys"):
        screen.shortlist(random(2, 32), [0.0], [0] * 3)
