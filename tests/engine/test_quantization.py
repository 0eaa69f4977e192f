"""Quantised checkpoints against decoders that are written here, in numpy, from the formats' words.

Each tiny checkpoint is written twice: in the format, and with the plain values that the decoder
here finds in it. The engine gives the same tokens for both, in float32.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from forebay_engine.config import EngineConfig
from forebay_engine.hf_config import ModelError, read_config
from forebay_engine.quantization import on_load
from forebay_engine.quantization.on_load import to_fp8, to_int4, to_int8
from forebay_engine.quantization.stored import unpack
from forebay_engine.runner import Runner
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import Row, StepPlan
from forebay_engine.weights import Weights
from forebay_kernels.matrix import Dense, Fp8, GroupedInt8, Int4, Int8, Reordered

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import checkpoints as written

sys.path.pop(0)

Array = np.ndarray[Any, np.dtype[Any]]
ENCODINGS = written.encodings(16)
RECORDINGS = Path(__file__).parents[1] / "recordings"
GREEDY = SamplingParams(temperature=0.0)


def nibbles(word: int, bits: int) -> list[int]:
    """The values in a word of 32 bits, lowest first."""
    return [(word & 0xFFFFFFFF) >> shift & (1 << bits) - 1 for shift in range(0, 32, bits)]


def rows_of(packed: Array, bits: int) -> Array:
    return np.array([[v for word in row for v in nibbles(int(word), bits)] for row in packed])


def decode_gptq(t: dict[str, Array], out: int, into: int, less: int) -> Array:
    bits = 32 * len(t["qweight"]) // into
    q = rows_of(t["qweight"].T, bits)  # [out, in]
    zero = rows_of(t["qzeros"], bits)  # [groups, out]
    zero = (zero + less) % (1 << bits)
    scale = t["scales"].astype(np.float32)
    group = t["g_idx"]
    return np.array(
        [[(q[o, i] - zero[group[i], o]) * scale[group[i], o] for i in range(into)]
         for o in range(out)]
    )  # fmt: skip


def decode_awq(t: dict[str, Array], out: int, into: int) -> Array:
    def columns(packed: Array) -> Array:
        found = np.zeros((len(packed), out), int)
        for n, row in enumerate(packed):
            for c, word in enumerate(row):
                for place, column in zip(
                    nibbles(int(word), 4), (0, 2, 4, 6, 1, 3, 5, 7), strict=True
                ):
                    found[n, 8 * c + column] = place
        return found

    q, zero = columns(t["qweight"]), columns(t["qzeros"])
    scale, group = t["scales"].astype(np.float32), into // len(t["scales"])
    return np.array(
        [[(q[i, o] - zero[i // group, o]) * scale[i // group, o] for i in range(into)]
         for o in range(out)]
    )  # fmt: skip


def decode_bnb4(t: dict[str, Array], out: int, into: int) -> Array:
    (kind,) = (k for k in t if "quant_state" in k)
    state = json.loads(bytes(t[kind]))
    assert state["shape"] == [out, into]
    absmax = t["weight.absmax"]
    if "weight.nested_absmax" in t:
        nested = t["weight.nested_absmax"]
        absmax = np.array(
            [t["weight.nested_quant_map"][code] * nested[b // state["nested_blocksize"]]
             + state["nested_offset"] for b, code in enumerate(absmax)]
        )  # fmt: skip
    codes = [part for byte in t["weight"].flatten() for part in (byte >> 4, byte & 15)]
    values = [
        t["weight.quant_map"][c] * absmax[n // state["blocksize"]] for n, c in enumerate(codes)
    ]
    return np.array(values).reshape(out, into)


def decode_fp8(t: dict[str, Array], out: int, into: int) -> Array:
    scale = t.get("weight_scale_inv", t.get("weight_scale"))
    assert scale is not None
    if "weight_scale_inv" in t:
        scale = np.array(
            [[scale[o // 128, i // 128] for i in range(into)] for o in range(out)]
        )  # fmt: skip
    return t["weight"] * scale


def decode_packed(t: dict[str, Array], out: int, into: int) -> Array:
    assert t["weight_shape"].tolist() == [out, into]
    bits = 32 * t["weight_packed"].shape[1] // into
    half = 1 << (bits - 1)
    signed = rows_of(t["weight_packed"], bits) - half
    scale = t["weight_scale"]
    zero = np.zeros_like(scale)
    if "weight_zero_point" in t:
        zero = rows_of(t["weight_zero_point"].T, bits).T - half
    group = into // scale.shape[1]
    return np.array(
        [[(signed[o, i] - zero[o, i // group]) * scale[o, i // group] for i in range(into)]
         for o in range(out)]
    )  # fmt: skip


def decode(name: str, t: dict[str, Array], out: int, into: int) -> Array:
    if name.startswith("gptq"):
        return decode_gptq(t, out, into, 0 if "v2" in name else 1)
    if name == "awq":
        return decode_awq(t, out, into)
    if name == "bitsandbytes int8":
        return t["weight"] * (t["SCB"] / 127.0)[:, None]
    if name.startswith("bitsandbytes"):
        return decode_bnb4(t, out, into)
    if "weight_packed" in t:
        return decode_packed(t, out, into)
    return decode_fp8(t, out, into)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def arrays(tensors: dict[str, Tensor]) -> dict[str, Array]:
    """As numpy, which has no FP8: its values are widened."""
    return {
        name: (t.float() if t.dtype == torch.float8_e4m3fn else t).numpy()
        for name, t in tensors.items()
    }


def layer(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Weights:
    """A checkpoint of one layer ``p``."""
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    save_file({f"p.{name}": t for name, t in tensors.items()}, folder / "model.safetensors")
    return Weights(folder, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_bitsandbytes_wrote_has_the_values_it_reads(kind: str, tmp_path: Path) -> None:
    """Recorded from bitsandbytes 0.50.2: nf4 with double quantisation, fp4 without."""
    recorded = load_file(RECORDINGS / "bitsandbytes-0.50.2.safetensors")
    values = recorded.pop(f"{kind}.values")
    own = {
        name.removeprefix(f"{kind}."): t for name, t in recorded.items() if name.startswith(kind)
    }
    with layer(tmp_path, {"quant_method": "bitsandbytes"}, own) as weights:
        matrix = weights.matrix("p", *values.shape)
        weights.finish()
    assert torch.equal(matrix.dequantize(), values)


LAYOUTS = {
    "gptq 4 bits, act-order": Reordered,
    "gptq 8 bits": GroupedInt8,
    "bitsandbytes int8": Int8,
    "compressed-tensors int8": Int8,
    "compressed-tensors w8a16": GroupedInt8,
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_layer_has_the_values_that_its_format_says(name: str, tmp_path: Path) -> None:
    config, encode = ENCODINGS[name]
    # Beyond a block of 128, and for bitsandbytes rows that end within a block of 64.
    out, into = (136, 144)
    tensors = encode(random(out, into))
    with layer(tmp_path, config, tensors) as weights:
        matrix = weights.matrix("p", out, into)
        weights.finish()
    assert type(matrix) is LAYOUTS.get(name, Fp8 if name.startswith("fp8") else Int4)
    want = decode(name, arrays(tensors), out, into)
    np.testing.assert_allclose(matrix.dequantize().numpy(), want, rtol=1e-5, atol=1e-6)
    # And near to what was encoded: neither side has mixed up rows, columns or signs.
    assert np.abs(want - random(out, into).numpy()).mean() < 0.15


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("gptq 4 bits, act-order", "qwen3"),
        ("gptq 8 bits", "qwen3"),
        ("awq", "qwen3"),
        ("bitsandbytes nf4, double", "qwen3"),
        ("fp8 blocks", "qwen3"),
        ("compressed-tensors int8", "qwen3"),
        # Of an expert gate and up in orders of their own, and in fewer outputs than a block.
        ("gptq 4 bits, act-order", "mixtral"),
        ("fp8 blocks", "qwen3-moe"),
    ],
)
def test_a_quantised_checkpoint_gives_the_tokens_of_its_values(
    name: str, family: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(family)
    config, encode = ENCODINGS[name]
    written.rewrite(source, tmp_path / "quantised", config, encode)

    def plain(weight: Tensor) -> dict[str, Tensor]:
        values = decode(name, arrays(encode(weight)), *weight.shape)
        return {"weight": torch.from_numpy(values).float()}

    written.rewrite(source, tmp_path / "plain", {}, plain)
    assert tokens(tmp_path / "quantised") == tokens(tmp_path / "plain")


def tokens(folder: Path, *, dtype: str = "float32", quantization: str = "none") -> list[int]:
    """Sixteen greedy tokens."""
    config = EngineConfig(
        model=str(folder),
        dtype=dtype,
        quantization=quantization,
        num_blocks=4,
        block_size=16,
        threads=1,
    )
    runner = Runner(config)
    tables = ((0, 1),) * len(runner.cache_groups)
    found: list[int] = []
    prompt = [2, 17, 200, 31, 90]
    for _ in range(16):
        ids, start = [*prompt, *found], len(prompt) + len(found) - 1 if found else 0
        row = Row(0, tuple(ids), start, len(ids) - start, tables, True, GREEDY, len(prompt))
        found.append(runner.execute(StepPlan((row,))).sampled[0].token_id)
    return found


@pytest.mark.parametrize("family", ["gemma3", "qwen2", "mixtral", "qwen3-moe"])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_on_load_gives_the_tokens_of_the_rounded_values(
    family: str, kind: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(family)
    quantise = {"int8": to_int8, "int4": to_int4, "fp8": to_fp8}[kind]
    # Where the head is tied to the embedding, which stays as it is, it is stored apart here.
    data = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": False}
    written.rewrite(source, tmp_path, {}, lambda w: {"weight": quantise(w).dequantize()})
    (tmp_path / "config.json").write_text(json.dumps(data))
    tensors = load_file(tmp_path / "model.safetensors")
    plain = load_file(source / "model.safetensors")
    head = plain.get("lm_head.weight", plain["model.embed_tokens.weight"])
    tensors["lm_head.weight"] = to_int8(head).dequantize()
    save_file(tensors, tmp_path / "model.safetensors")
    assert tokens(source, quantization=kind) == tokens(tmp_path)


def test_int8_is_within_half_a_step_of_each_channel() -> None:
    weight = random(5, 70)
    weight[3] = 0.0
    matrix = to_int8(weight)
    error = (matrix.dequantize() - weight).abs()
    assert (error <= weight.abs().amax(1, keepdim=True) / 127.0 * 0.5001).all()
    assert torch.equal(matrix.dequantize()[3], torch.zeros(70))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_within_half_a_step_of_each_channel(dtype: torch.dtype) -> None:
    weight = (random(5, 70) * torch.tensor([[1.0], [1e-20], [0.0], [1e20], [0.03]])).to(dtype)
    matrix = to_fp8(weight)
    wide, found = weight.double(), matrix.dequantize().double()
    assert isinstance(matrix, Fp8)
    assert matrix.scale.shape == (5, 1)
    # With three bits of mantissa 1/16 of a value, or 2^-10 of the scale below the smallest normal.
    step = torch.maximum(wide.abs() / 16, matrix.scale.double() * 2.0**-10)
    assert ((found - wide).abs() <= step * 1.0001).all()
    assert (found.abs().amax(1) >= 0.9999 * wide.abs().amax(1)).all()
    # The largest value of each channel is the largest that there is.
    assert matrix.weight.float().abs().amax(1).tolist() == [448.0, 448.0, 0.0, 448.0, 448.0]


def test_int4_is_better_than_the_whole_range_and_keeps_flat_groups() -> None:
    weight = random(8, 128)
    weight[0, :32], weight[1, :32] = 0.0, -1e-6
    matrix = to_int4(weight)
    assert isinstance(matrix, Int4)
    found = matrix.dequantize()
    assert torch.equal(found[:2, :32], weight[:2, :32])
    levels, scale, zero = written.to_groups(weight, 4, 32)
    wide = ((levels.reshape(8, 4, 32) - zero[..., None]) * scale[..., None]).flatten(1)
    assert (found - weight).norm() < (wide - weight).norm()


def test_int4_finds_a_grid_that_is_there() -> None:
    levels = torch.randint(0, 16, (6, 64), generator=torch.Generator().manual_seed(1)).float()
    levels[:, 0::32], levels[:, 1::32] = 0.0, 15.0
    weight = (levels - 5.3) * 0.017
    torch.testing.assert_close(to_int4(weight).dequantize(), weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (33, 17), (5, 3), (1, 1), (300, 129)])
def test_compiled_kernels_round_to_the_same_bits(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight[-1] *= 1e-30
    weight[0] = 0.0
    weight[1:2, :2] = torch.tensor([127.0, 2.5])[: shape[1]]  # a tie
    weight = weight.to(dtype)
    found = to_int8(weight)
    monkeypatch.setattr(on_load.cpu, "available", lambda x: False)
    wanted = to_int8(weight)
    assert torch.equal(found.weight, wanted.weight)
    assert torch.equal(found.scale, wanted.scale)


@pytest.mark.parametrize(("into", "kind"), [(40, Int4), (36, Int8)])
def test_int4_takes_smaller_groups_or_leaves_a_layer_to_int8(into: int, kind: type) -> None:
    assert type(to_int4(random(4, into))) is kind


def test_rows_do_not_depend_on_how_they_are_shared_out() -> None:
    weight = random(300, 256)  # more than one chunk
    whole = to_int4(weight)
    rows = to_int4(weight[130:140])
    assert torch.equal(whole.dequantize()[130:140], rows.dequantize())
    assert torch.equal(to_int8(weight).dequantize()[130:140], to_int8(weight[130:140]).dequantize())


@pytest.mark.parametrize("bits", [4, 8])
@settings(max_examples=50)
@given(data=st.data())
def test_unpacking_undoes_packing(bits: int, data: st.DataObject) -> None:
    count = 32 // bits
    one = st.integers(0, (1 << bits) - 1)
    rows = st.lists(one, min_size=3 * count, max_size=3 * count)
    values = torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=4)))
    assert torch.equal(unpack(written.pack(values, bits), bits).long(), values)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "aqlm"}, "quant_method 'aqlm' is not supported .*quantization: int8"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ version 'gemv'"),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            "format 'nvfp4-pack-quantized' is not supported",
        ),
    ],
)
def test_unknown_formats_are_refused_by_name(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message), layer(tmp_path, config, {"a": random(1)}):
        pass


REFUSED: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "three bits": (
        "gptq 4 bits",
        lambda t: t.update(qweight=torch.zeros(3 * 64 // 32, 32, dtype=torch.int32)),
        "GPTQ of 3 bits",
    ),
    "uneven groups": (
        "gptq 4 bits",
        lambda t: t.update(g_idx=torch.tensor([0] * 20 + [1] * 44, dtype=torch.int32)),
        "not of one size",
    ),
    "other shape": (
        "bitsandbytes nf4",
        lambda t: t.update(written.bnb4(random(32, 32))),
        r"is \[32, 32\], config.json asks for \[32, 64\]",
    ),
    "column-major int8": (
        "bitsandbytes int8",
        lambda t: t.update(weight_format=torch.tensor(1, dtype=torch.uint8)),
        "only bitsandbytes' row-major",
    ),
    "e5m2": (
        "fp8 per tensor",
        lambda t: t.update(weight=random(32, 64).to(torch.float8_e5m2)),
        "only float8_e4m3fn",
    ),
    "wrong scales": (
        "fp8 blocks",
        lambda t: t.update(weight_scale_inv=random(3, 3)),
        r"\[3, 3\] fit neither",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_together_is_named(case: str, tmp_path: Path) -> None:
    name, change, message = REFUSED[case]
    config, encode = ENCODINGS[name]
    tensors = encode(random(32, 64))
    change(tensors)
    with layer(tmp_path, config, tensors) as weights, pytest.raises(ModelError, match=message):
        weights.matrix("p", 32, 64)


def test_integers_without_a_word_of_them_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"p.weight": torch.ones(4, 4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    weights = Weights(tmp_path, torch.float32, torch.device("cpu"))
    with weights, pytest.raises(ModelError, match="does not say how they are quantised"):
        weights.matrix("p", 4, 4)


def test_gptq_may_have_biases_of_zero(tmp_path: Path) -> None:
    tensors = written.gptq(random(32, 64), group=16)
    for bias, fits in ((torch.zeros(32), True), (torch.ones(32), False)):
        with layer(tmp_path, {"quant_method": "gptq"}, {**tensors, "bias": bias}) as weights:
            weights.matrix("p", 32, 64)
            if fits:
                weights.finish()
            else:
                with pytest.raises(ModelError, match=r"p\.bias is not zero"):
                    weights.finish()


def test_scales_of_activations_and_cache_are_left_out(tmp_path: Path) -> None:
    extra = {"input_scale": random(1), "k_scale": random(1)}
    tensors = {**written.fp8(random(32, 64)), **extra}
    with layer(tmp_path, {"quant_method": "fp8"}, tensors) as weights:
        weights.matrix("p", 32, 64)
        weights.finish()


def test_a_layer_that_was_not_quantised_is_plain(tmp_path: Path) -> None:
    with layer(tmp_path, {"quant_method": "gptq"}, {"weight": random(8, 8)}) as weights:
        assert isinstance(weights.matrix("p", 8, 8), Dense)


@pytest.mark.parametrize(
    ("settings", "dtype"), [({}, "float16"), ({"quant_method": "gptq"}, "bfloat16")]
)
def test_quantised_checkpoints_in_float16_are_computed_in_bfloat16(
    settings: dict[str, Any],
    dtype: str,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    data = json.loads((tiny_checkpoint("qwen3") / "config.json").read_text())
    data |= {"dtype": "float16", "quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert read_config(tmp_path).dtype == dtype


def test_other_settings_of_quantization_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'int2' is not one of none, int8, int4, fp8"):
        Weights(tmp_path, torch.float32, torch.device("cpu"), "int2")
