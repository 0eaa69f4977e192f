"""Products with weights of 4 and 8 bits on a GPU: layout, kernels, and their instructions."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from forebay_kernels.gpu import w4a16
from forebay_kernels.gpu.packed import PANEL, PackedMatrix, packed
from forebay_kernels.gpu.tuning import choose
from forebay_kernels.gpu.unpacking import unpacking
from forebay_kernels.gpu.w4a16 import MOST_TOKENS, PackedLinear, launch, layout
from forebay_kernels.matrix import GroupedInt8, Int4, Int8, Matrix, pack_int4

#: The interpreter multiplies bfloat16 wrongly.
DTYPES = [torch.float16, torch.bfloat16 if torch.cuda.is_available() else torch.float32]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
KINDS = ["int4", "middle", "codebook", "int8", "grouped", "grouped with zero"]
#: nf4's, https://arxiv.org/abs/2305.14314, appendix E.
NF4 = [
    -1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
    0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0,
]  # fmt: skip


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def quantized(kind: str, out: int, into: int, group: int, dtype: torch.dtype) -> Matrix:
    """With scales, zeros and codes that need no rounding, as checkpoints have them."""
    size = (out, into // group)
    scale = (random(*size, seed=1).abs() / 64).half().float()
    zero = integers(0, 16, *size, seed=2).float()
    if kind == "int8":
        return Int8(integers(-128, 128, out, into).to(torch.int8), scale[:, 0].contiguous())
    if kind.startswith("grouped"):
        weight = integers(-128, 128, out, into).to(torch.int8)
        return GroupedInt8(weight, scale, 9 * (zero - 8) if "zero" in kind else None, group)
    nibbles = integers(0, 256, out, into // 2).to(torch.uint8)
    if kind == "codebook":
        codes = torch.tensor(NF4).to(dtype).float()
        return Int4(nibbles, scale, None, group, codes)
    return Int4(nibbles, scale, torch.full_like(zero, 8.0) if kind == "middle" else zero, group)


def to_linear(
    matrix: Matrix, bias: Tensor | None, dtype: torch.dtype, device: torch.device
) -> PackedLinear:
    found = packed(matrix.to(device), dtype)
    assert found is not None
    return PackedLinear(found, None if bias is None else bias.to(device), dtype)


def values(matrix: PackedMatrix) -> Tensor:
    """``[out, in]`` float64, from the layout's words."""
    panels, tiles, _, lanes = matrix.words.shape
    count = 16 // matrix.bits
    q = torch.empty(panels, PANEL, tiles, count, lanes, dtype=torch.float64)
    for j in range(count):
        part = matrix.words.long() >> (matrix.bits * j) & ((1 << matrix.bits) - 1)
        if matrix.codes is not None:
            part = matrix.codes.double()[part]
        elif matrix.bits == 8:
            part = (part + 128) % 256 - 128
        q[:, :, :, j] = part.transpose(1, 2)
    out, into = matrix.shape
    wide = q.view(panels * PANEL, -1)[:out, :into]
    group = torch.arange(into) // (matrix.group or into)
    if matrix.zero is not None:
        zero = matrix.zero.double()[group, :out].T
        wide = wide - (zero - 16 if matrix.bits == 4 else zero)
    elif matrix.bits == 4 and matrix.codes is None:
        wide = wide - 8
    return wide * matrix.scale.double()[group, :out].T * matrix.factor


def by_one_program(kernel: str, device: torch.device, **shape: int) -> dict[str, int]:
    return choose(kernel, device, **shape) | {"splits": 1}


#: How many, and whether there is a bias, for each of ``DTYPES``.
TOKENS = [((3, False), (17, True)), ((1, True), (16, False), (33, True))]
#: Outputs and inputs that are no multiples of panels and tiles, every group, a single one of 20.
SHAPES = [(130, 192, 64), (33, 384, 128), (5, 96, 32), (40, 80, 16), (3, 20, 20), (9, 384, 192)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("out", "into", "group"), SHAPES)
def test_the_layout_keeps_every_value(
    kind: str, out: int, into: int, group: int, dtype: torch.dtype
) -> None:
    matrix = quantized(kind, out, into, group, dtype)
    found = packed(matrix, dtype)
    assert found is not None
    assert (values(found) - matrix.dequantize().double()).abs().max() < 1e-6
    assert found.nbytes >= found.words.nbytes + found.scale.nbytes


@pytest.mark.parametrize(
    ("dtype", "kind", "out", "into", "group"),
    [(DTYPES[0], kind, *shape) for kind in KINDS for shape in SHAPES]
    + [(DTYPES[1], kind, *shape) for kind in ("int4", "codebook") for shape in SHAPES[1:4]],
)
def test_products(
    dtype: torch.dtype,
    kind: str,
    out: int,
    into: int,
    group: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where there is a bias, by as many programs as there are tiles; else all by one."""
    matrix, bias = quantized(kind, out, into, group, dtype), random(out, seed=4).to(dtype)
    wide = matrix.dequantize().double()
    for tokens, biased in TOKENS[dtype == torch.float16]:
        monkeypatch.setattr(w4a16, "choose", choose if biased else by_one_program)
        layer = to_linear(matrix, bias if biased else None, dtype, device)
        # A view of a wider tensor whose other columns are NaN.
        rows = torch.full((tokens, into + 3), float("nan"), dtype=dtype)
        x = rows[:, 2 : into + 2].copy_(random(tokens, into, seed=tokens))
        got = layer(rows.to(device)[:, 2 : into + 2]).cpu()
        want = x.double() @ wide.T + (bias.double() if biased else 0.0)
        assert got.dtype == dtype
        assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_many_tokens_are_multiplied_with_dequantised_weights(
    kind: str, device: torch.device
) -> None:
    matrix = quantized(kind, 130, 192, 64, torch.float16)
    layer, x = to_linear(matrix, None, torch.float16, device), random(MOST_TOKENS + 1, 192).half()
    wide = matrix.dequantize().double()
    assert (layer.dequantize().cpu().double() - wide).norm() <= 1e-3 * wide.norm()
    want = x.double() @ wide.T
    assert (layer(x.to(device)).cpu().double() - want).norm() <= 1e-3 * want.norm()
    assert layer(x[:0].to(device)).shape == (0, 130)


def test_shares_of_the_inputs_are_added_up_in_their_order(device: torch.device) -> None:
    """More programs than panels: the last to arrive adds up, and leaves its counter at 0."""
    matrix = quantized("int4", 100, 1312, 32, torch.float16)
    layer, x = to_linear(matrix, None, torch.float16, device), random(9, 1312).half()
    grid, _ = launch(layer.matrix, 9)
    assert grid == (1, 1, 6)  # 11 tiles, 2 a share: the last is shorter
    got = [layer(x.to(device)).cpu() for _ in range(3)]
    want = x.double() @ matrix.dequantize().double().T
    assert (got[0].double() - want).norm() <= 1e-3 * want.norm()
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], got[2])
    assert not layer._arrived.any()


def test_a_panel_may_begin_beyond_32_bits(device: torch.device) -> None:
    """The third, twice a stride of 31 bits on (virtual memory: only what is touched exists)."""
    matrix = quantized("int4", 300, 128, 64, torch.float16)
    layer, x = to_linear(matrix, None, torch.float16, device), random(2, 128).half().to(device)
    want, words = layer(x), layer.matrix.words
    far = (1 << 30) + 128
    apart = torch.empty(2 * far + words[0].numel(), dtype=torch.int16, device=device)
    apart = apart.as_strided(words.shape, (far, *words.stride()[1:]))
    apart.copy_(words)
    object.__setattr__(layer.matrix, "words", apart)
    assert torch.equal(layer(x), want)


@pytest.mark.parametrize("largest", [1e-9, 3e-6, 1.0, 3e7])
def test_scales_outside_of_float16_keep_their_digits(largest: float) -> None:
    scale = random(64, 3, seed=1).abs() * largest
    matrix = Int4(integers(0, 256, 64, 48).to(torch.uint8), scale, torch.full_like(scale, 3.0), 32)
    found = packed(matrix, torch.float16)
    assert found is not None
    wide = matrix.dequantize().double()
    assert ((values(found) - wide).abs() <= 2**-11 * wide.abs()).all()


def test_rounded_zeros_and_scales_add_little_to_the_error_of_four_bits() -> None:
    """Zeros between the integers, as quantisation on load finds them, in bfloat16's eighths."""
    weight = random(256, 1024, seed=3).view(256, 32, 32) + 0.3 * random(256, 32, 1, seed=4)
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    scale = (high - low) / 15
    zero = -low / scale
    q = (weight / scale + zero).round().clamp(0, 15).flatten(1)
    matrix = Int4(pack_int4(q), scale.squeeze(-1), zero.squeeze(-1), 32)
    found = packed(matrix, torch.bfloat16)
    assert found is not None
    wide, x = weight.flatten(1).double(), random(64, 1024, seed=5).double() + 0.2
    error = (x @ (matrix.dequantize().double() - wide).T).norm()
    rounded = (x @ (values(found) - wide).T).norm()
    assert rounded < 1.05 * error


def test_what_has_no_such_layout_is_left() -> None:
    assert packed(quantized("int4", 8, 48, 8, torch.float16), torch.float16) is None
    assert packed(quantized("grouped", 8, 48, 24, torch.float16), torch.float16) is None


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    layer = to_linear(quantized("int4", 8, 64, 32, torch.float16), None, torch.float16, device)
    with pytest.raises(
        ValueError, match=r"float32 \[2, 64\], but it takes torch.float16 \[.., 64\]"
    ):
        layer(torch.zeros(2, 64))
    with pytest.raises(ValueError, match=r"\[2, 63\]"):
        layer(torch.zeros(2, 63, dtype=torch.float16))


class Registers(dict[str, Tensor]):
    """PTX's registers of 32 bits, for many threads at once; numbers are read as themselves."""

    def __missing__(self, name: str) -> Tensor:
        return torch.tensor([int(name, 0)])


def executed(ptx: str, words: Tensor, outputs: int) -> list[Tensor]:
    """What the instructions leave in ``$0`` and up: 32 bits each, for ``words`` alike."""
    all_bits = (1 << 32) - 1
    at = Registers({f"${outputs}": words})
    for line in re.findall(r"^(\w[\w.]+) (.*);$", ptx, re.MULTILINE):
        operation, (to, *names) = line[0].split(".")[0], line[1].split(", ")
        given = [at[name] for name in names]
        match operation:
            case "mov":
                at[to] = given[0]
            case "shl":
                at[to] = given[0] << given[1] & all_bits
            case "shr":
                at[to] = given[0] >> given[1]
            case "and":
                at[to] = given[0] & given[1]
            case "lop3":
                assert names[3] == "0xEA"
                at[to] = given[0] & given[1] | given[2]
            case "prmt":
                both = given[0] | given[1] << 32
                picks = [given[2] >> 4 * i & 15 for i in range(4)]
                assert all(int(pick.max()) < 8 for pick in picks)
                at[to] = sum(((both >> 8 * pick) & 255) << 8 * i for i, pick in enumerate(picks))
            case "fma":
                kind = torch.bfloat16 if "bf16x2" in line[0] else torch.float16
                a, b, c = (halves(value, kind).double() for value in given)
                result = (a * b + c).to(kind)
                assert torch.equal(result.double(), a * b + c)  # exact
                bits = result.view(torch.int16).long() & 0xFFFF
                at[to] = bits[0] | bits[1] << 16
            case _:
                raise AssertionError(line)
    return [at[f"${j}"] for j in range(outputs)]


def halves(registers: Tensor, dtype: torch.dtype) -> Tensor:
    """``[2, threads]``: the low and the high half."""
    both = torch.stack([registers & 0xFFFF, registers >> 16])
    return both.to(torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int4", "codebook", "int8"])
def test_the_instructions_bring_out_every_value(kind: str, dtype: torch.dtype) -> None:
    """By executing them, as the interpreter of Triton cannot."""
    codes = torch.tensor(NF4).to(dtype) if kind == "codebook" else None
    bits = 8 if kind == "int8" else 4
    lanes = torch.stack([torch.arange(1 << 16), torch.randperm(1 << 16)])
    found = executed(unpacking(bits, dtype, codes), lanes[0] | lanes[1] << 16, 16 // bits)
    for j, registers in enumerate(found):
        q = lanes >> (bits * j) & ((1 << bits) - 1)
        if codes is not None:
            want = codes[q]
        else:
            want = (q + 16 if bits == 4 else (q + 128) % 256 - 128).to(dtype)
        assert torch.equal(halves(registers, dtype), want)


#: Outputs and inputs of an 8B model's layers.
LAYERS = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]


def test_the_kernels_compile_for_hopper(compile_for_hopper: Any) -> None:
    jobs = {}
    for kind, tokens, layers in (
        ("int4", 1, LAYERS),
        ("int4", 16, LAYERS),
        ("int4", 64, LAYERS[2:]),
        ("codebook", 16, LAYERS[2:3]),
        ("int8", 16, LAYERS[2:]),
    ):
        for out, into in layers:
            found = described(kind, out, into)
            _, chosen = launch(found, tokens)
            jobs[str((kind, chosen))] = job(found, chosen)
    *products, whole = compile_for_hopper(*jobs.values(), dequantize_job())
    for name, one in zip(jobs, products, strict=True):
        assert one.spilled_bytes == 0, name
        assert one.shared_bytes <= 232448
        block = jobs[name]["constants"]["BLOCK_M"]
        assert ("wgmma.mma_async" if block == 64 else "mma.sync.aligned.m16n8k16") in one.ptx
        # Weights come 16 bytes at a time, and past the registers.
        assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", one.ptx)
        if block == 16:  # four blocks on a multiprocessor, three of a codebook
            blocks = 3 if "codebook" in name else 4
            assert blocks * 128 * (one.registers + -one.registers % 8) <= 65536, name
            assert blocks * (one.shared_bytes + 1024) <= 233472
    assert whole.spilled_bytes == 0
    assert "st.global.v4" in whole.ptx


#: Sizes and strides, which are multiples of 16 in such layers.
MULTIPLES = ["inputs", "outputs", "padded", "x_row", "out_row", "words_panel", "words_tile"]
MULTIPLES += ["words_row"]


def dequantize_job() -> dict[str, Any]:
    found = described("int4", *LAYERS[0])
    types = {"words": "*i16", "scale": "*fp16", "zero": "*bf16", "out": "*bf16", "factor": "fp32"}
    return {
        "kernel": "forebay_kernels.gpu.w4a16:_dequantize_kernel",
        "types": types,
        "constants": layout(found, torch.bfloat16)
        | {"codes": None, "PTX": unpacking(4, torch.bfloat16)},
        "aligned": MULTIPLES,
    }


def described(kind: str, out: int, into: int) -> PackedMatrix:
    """A matrix of this shape, without memory for its words."""
    small = packed(quantized(kind, 128, 256, 128, torch.bfloat16), torch.bfloat16)
    assert small is not None
    words = small.words[:1, :1].expand(out // PANEL, into // small.tile, -1, -1)
    return replace(small, words=words, shape=(out, into))


def job(matrix: PackedMatrix, chosen: dict[str, Any]) -> dict[str, Any]:
    constants = layout(matrix, torch.bfloat16) | {
        "bias": None,
        "PTX": unpacking(matrix.bits, torch.bfloat16, matrix.codes),
        "PRECISION": "tf32",
        **{name: value for name, value in chosen.items() if name.isupper()},
    }
    absent = [name for name in ("zero", "codes") if getattr(matrix, name) is None]
    constants |= dict.fromkeys(absent)
    if chosen["SPLITS"] == 1:
        constants |= {"partial": None, "arrived": None}
    pointers = {"x": "*bf16", "words": "*i16", "scale": "*fp16", "zero": "*bf16", "out": "*bf16"}
    pointers["codes"] = "*bf16"
    return {
        "kernel": "forebay_kernels.gpu.w4a16:_product_kernel",
        "types": {**pointers, "partial": "*fp32", "arrived": "*i32", "factor": "fp32"},
        "constants": constants,
        "aligned": MULTIPLES,
        "warps": chosen["num_warps"],
        "stages": chosen["num_stages"],
    }
