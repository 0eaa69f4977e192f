"""The compiled linear layers against float64, and what happens where they can't be compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forebay_kernels import cpu
from forebay_kernels.cpu import PackedLinear, compiler, pack
from forebay_kernels.cpu.library import library
from forebay_kernels.matrix import Dense, Fp8, GroupedInt8, Int4, Int8, Matrix

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3}

#: (out, in): whole panels, remains of both, a single column, less than a vector.
SHAPES = [(64, 64), (100, 62), (33, 640), (1, 17), (31, 3), (96, 33)]


@pytest.fixture(params=[1, 3])
def threads(request: Any) -> Any:
    cpu.set_threads(request.param)
    yield request.param
    cpu.set_threads(1)


def packed(matrix: Matrix, bias: Tensor | None = None) -> PackedLinear:
    layer = pack(matrix, bias)
    assert layer is not None
    return layer


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense(shape: tuple[int, int], dtype: torch.dtype, threads: int) -> None:
    weight, bias = random(*shape, seed=1).to(dtype), random(shape[0], seed=2).to(dtype)
    for number, biased in ((1, True), (2, False), (7, True), (12, False), (13, True), (40, True)):
        # A view of a wider tensor whose other columns are NaN.
        wide = torch.full((number, shape[1] + 3), float("nan")).to(dtype)
        x = wide[:, 1 : shape[1] + 1].copy_(random(number, shape[1]).to(dtype))
        got = packed(Dense(weight), bias if biased else None)(x)
        want = x.double() @ weight.double().T + (bias.double() if biased else 0.0)
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype, threads: int) -> None:
    layer = packed(Dense(random(200, 130, seed=1).to(dtype)))
    x = random(37, 130).to(dtype)
    together = layer(x)
    assert torch.equal(together, torch.cat([layer(row[None]) for row in x]))
    assert torch.equal(together[5:19], layer(x[5:19]))


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def quantized(kind: str, out: int, into: int, group: int) -> Matrix:
    size = (out, into // group)
    scale, zero = random(*size, seed=1).abs() / 64, random(*size, seed=2)
    if kind == "int8":
        return Int8(integers(-128, 128, out, into).to(torch.int8), scale[:, 0].contiguous())
    if kind.startswith("grouped"):
        weight = integers(-128, 128, out, into).to(torch.int8)
        return GroupedInt8(weight, scale, 9 * zero if kind == "grouped" else None, group)
    nibbles = integers(0, 256, out, into // 2).to(torch.uint8)
    if kind == "codebook":
        codes = torch.tensor([-127.0, *range(-84, 84, 12), 127.0]) / 127.0
        return Int4(nibbles, scale, None, group, codes)
    return Int4(nibbles, scale, 8 + zero, group)


KINDS = ["int8", "grouped", "grouped without zero", "int4", "codebook"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("out", "into", "group"), [(64, 256, 32), (33, 96, 8), (5, 640, 128)])
def test_quantized(
    kind: str, out: int, into: int, group: int, dtype: torch.dtype, threads: int
) -> None:
    matrix, bias = quantized(kind, out, into, group), random(out, seed=4)
    layer, wide = packed(matrix, bias), matrix.dequantize().double()
    for number in (1, 2, 3, 7, 8, 15, 40):
        # Each eight have a 127, so that rounding by groups changes nothing.
        x = integers(-127, 128, number, into // 8, 8, seed=number).float()
        x[..., 3] = 127.0
        x = x.flatten(1).to(dtype)
        got, want = layer(x), x.double() @ wide.T + bias.double()
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= 2 * TOLERANCE[dtype] * want.abs().max()
        assert torch.equal(got, torch.cat([layer(row[None]) for row in x]))


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_off_by_at_most_half_a_step_of_their_group(kind: str) -> None:
    matrix = quantized(kind, 40, 256, 64)
    wide, x = matrix.dequantize().double(), random(9, 256, seed=5) * random(9, 1).exp()
    x[3] = 0.0
    group = 128 if kind == "int8" else 64
    step = x.view(9, -1, group).abs().amax(-1) / 127
    most = (step / 2 + 1e-6).repeat_interleave(group, 1).double() @ wide.abs().T
    error = (packed(matrix)(x).double() - x.double() @ wide.T).abs()
    assert (error <= most).all()
    assert 0.02 * most[0].mean() < error[0].mean()
    assert not error[3].any()


def test_layouts_without_a_kernel_are_left() -> None:
    assert pack(Int8(integers(-128, 128, 8, 18).to(torch.int8), random(8))) is None
    assert pack(quantized("int4", 8, 12, 4)) is None
    weight = random(8, 16).to(torch.float8_e4m3fn)
    assert pack(Fp8(weight, random(8, 1), 16)) is None


def test_what_does_not_fit_is_named() -> None:
    layer = packed(Dense(random(8, 16)))
    with pytest.raises(
        ValueError, match=r"float32 \[2, 15\], but it takes torch.float32 \[.., 16\]"
    ):
        layer(random(2, 15))
    with pytest.raises(ValueError, match="bfloat16"):
        layer(random(2, 16).bfloat16())


def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def compile_(name: str, path: Path) -> None:
        calls.append(name)
        path.write_bytes(b"library")

    monkeypatch.setattr(compiler, "_compile", compile_)
    first, second = (compiler.compiled(tmp_path / "new") for _ in range(2))
    assert first == second
    assert len(calls) == 1
    monkeypatch.setattr(compiler, "_processor", lambda: "another")
    assert compiler.compiled(tmp_path / "new") != first


def test_without_a_compiler_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(compiler.CannotCompile, match="there is no C\\+\\+ compiler"):
        compiler.compiled(tmp_path)
    (tmp_path / "c++").write_text("#!/bin/sh\necho no such option >&2; exit 1\n")
    (tmp_path / "c++").chmod(0o755)
    with pytest.raises(compiler.CannotCompile, match="no such option"):
        compiler.compiled(tmp_path)
    assert not list(tmp_path.glob("*.so"))


def test_the_choice_is_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load = library.__wrapped__  # without what was found before
    monkeypatch.setenv("FOREBAY_CPU_KERNELS", "torch")
    assert load() is None
    assert not caplog.messages
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("FOREBAY_CPU_KERNELS", "auto")
    assert load() is None
    assert "no C++ compiler" in caplog.text
    monkeypatch.setenv("FOREBAY_CPU_KERNELS", "compiled")
    with pytest.raises(compiler.CannotCompile, match=r"compiled, but there is no C\+\+"):
        load()
    monkeypatch.setenv("FOREBAY_CPU_KERNELS", "fast")
    with pytest.raises(compiler.CannotCompile, match="one of auto, torch, compiled"):
        load()
