"""Weights are laid out in the background, and are there when they are needed."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from forebay_engine import linear
from forebay_engine.linear import Linear
from forebay_kernels.matrix import Dense


def test_the_first_product_waits_for_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    may_pack, product = threading.Event(), linear._product

    def slow(*args: Any) -> Any:
        assert may_pack.wait(10)
        return product(*args)

    monkeypatch.setattr(linear, "_product", slow)
    weight, x = torch.randn(7, 5), torch.randn(3, 5)
    layer = Linear(Dense(weight))
    found: list[torch.Tensor] = []
    asking = threading.Thread(target=lambda: found.append(layer(x)))
    asking.start()
    assert not found
    may_pack.set()
    asking.join()
    torch.testing.assert_close(found[0], x @ weight.T)


def test_what_fails_in_the_background_is_told_by_the_first_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*args: Any) -> Any:
        raise MemoryError("no room for the second copy")

    monkeypatch.setattr(linear, "_product", fails)
    layer = Linear(Dense(torch.randn(7, 5)))
    with pytest.raises(MemoryError, match="no room"):
        layer(torch.randn(3, 5))


def test_few_bytes_wait_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    may_pack, product = threading.Event(), linear._product
    monkeypatch.setattr(linear, "_product", lambda *a: may_pack.wait(10) and product(*a))
    monkeypatch.setattr(linear, "_backlog", linear.Backlog(8 * 4 * 4 * 4))
    made: list[Linear] = []

    def make() -> None:
        for _ in range(20):
            made.append(Linear(Dense(torch.eye(4))))

    making = threading.Thread(target=make)
    making.start()
    making.join(0.3)
    assert len(made) == 8
    may_pack.set()
    making.join()
    x = torch.randn(2, 4)
    assert all(torch.equal(layer(x), x) for layer in made)


def test_what_is_larger_than_the_backlog_comes_in_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_backlog", linear.Backlog(10))
    x = torch.randn(2, 4)
    for layer in [Linear(Dense(torch.eye(4))) for _ in range(3)]:
        assert torch.equal(layer(x), x)
