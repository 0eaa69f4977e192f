"""Recorded calls, made again over other contents, give what they would give now."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from forebay_kernels.cpu import PackedLinear, Tape, operators, pack, recording
from forebay_kernels.cpu.tape import empty
from forebay_kernels.matrix import Dense, Int8

WIDTH = 48


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(out: int, into: int, *, rounded: bool = False) -> PackedLinear:
    weight = random(out, into, seed=out)
    layer = pack(
        Int8((20 * weight).to(torch.int8), torch.full((out,), 0.05)) if rounded else Dense(weight)
    )
    assert layer is not None
    return layer


UP, DOWN, ROUNDED = packed(2 * 64, WIDTH), packed(WIDTH, 64), packed(WIDTH, WIDTH, rounded=True)
NORM = 1.0 + 0.1 * random(WIDTH, seed=9)


def parts(x: Tensor) -> Tensor:
    """Every operator without a cache, some results of which are views and some die at once."""
    normed = operators.rms_norm(x, NORM, 1e-6)
    for _ in range(3):
        gated = operators.silu_mul(UP(normed).view(len(x), -1))
        normed = operators.add_rms_norm(x, DOWN(gated), None, NORM, 1e-6)
        normed = operators.add_rms_norm(x, ROUNDED(normed), NORM, NORM, 1e-6)
    return normed


def test_a_replay_is_the_same_calls_on_other_inputs() -> None:
    x = random(5, WIDTH)
    tape, own = Tape(x), x.clone()
    with recording(tape):
        out = parts(x)
    assert torch.equal(out, parts(own))
    assert torch.equal(x, own)
    assert tape.complete
    assert len(tape) == 1 + 3 * 6
    for seed in range(1, 4):
        new = random(5, WIDTH, seed=seed)
        x.copy_(new)
        tape.replay()
        assert torch.equal(out, parts(new))
        assert torch.equal(x, new)


def test_what_calls_take_is_told_by_their_names() -> None:
    tape, new = Tape(x := random(2, WIDTH)), random(2, WIDTH, seed=1)
    with recording(tape):
        out = UP(operators.rms_norm(x, NORM, 1e-6))
    x.copy_(new)
    found = tape.timed_replay()
    assert [name for name, _ in found] == ["norm", "linear"]
    assert all(0.0 < seconds < 1.0 for _, seconds in found)
    assert torch.equal(out, UP(operators.rms_norm(new, NORM, 1e-6)))


def test_what_else_is_computed_is_noticed() -> None:
    x = random(2, WIDTH)
    for between in (lambda y: y + 0.0, lambda y: y[:, torch.arange(WIDTH)], torch.relu):
        tape = Tape(x)
        with recording(tape):
            operators.rms_norm(between(operators.rms_norm(x, NORM, 1e-6)), NORM, 1e-6)
        assert not tape.complete
    tape = Tape()
    with recording(tape):
        operators.rms_norm(x, NORM, 1e-6)
    assert not tape.complete


def test_memory_is_used_again_when_nobody_holds_a_view_of_it() -> None:
    tape = Tape()
    with recording(tape):
        first = empty((4, 6), torch.bfloat16)
        view = first[1:].view(-1)[3:]
        where = first.data_ptr()
        del first
        second = empty((6, 4), torch.bfloat16)
        assert second.data_ptr() != where
        del view
        assert empty((24,), torch.int16).data_ptr() == where
        assert empty((23,), torch.int16).data_ptr() != where
    assert empty((24,), torch.int16).data_ptr() != where


def test_a_tape_keeps_what_its_calls_point_to() -> None:
    tape = Tape(x := random(3, WIDTH))
    with recording(tape):
        out = UP(operators.rms_norm(x, NORM, 1e-6))
    junk = [torch.full((3, WIDTH), 7.0) for _ in range(50)]  # would land where results were
    tape.replay()
    assert torch.equal(out, UP(operators.rms_norm(x, NORM, 1e-6)))
    assert all((each == 7.0).all() for each in junk)


def test_other_threads_are_not_recorded() -> None:
    x = random(2, WIDTH)
    tape = Tape(x)
    with recording(tape):
        other = threading.Thread(target=lambda: operators.rms_norm(x.clone(), NORM, 1e-6))
        other.start()
        other.join()
        assert len(tape) == 0
        operators.rms_norm(x, NORM, 1e-6)
    operators.rms_norm(x, NORM, 1e-6)
    assert len(tape) == 1
    assert tape.complete
