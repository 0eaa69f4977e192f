"""Every family against transformers, on tiny random checkpoints in float32 and the demo model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import forebay_kernels as kernels
from decoding import (
    GREEDY,
    Decoding,
    Tensors,
    assert_greedy,
    prompts,
    reference_logprobs,
    reference_model,
    restored,
    rewritten,
    tiny_runner,
)
from forebay_engine.hf_config import ModelError, read_config
from forebay_engine.layers import GatedMlp
from forebay_engine.linear import Linear
from forebay_engine.models.moe import Experts
from forebay_engine.sequence import SamplingParams
from forebay_kernels.gpu import moe as gpu_moe
from forebay_kernels.matrix import Dense

Checkpoint = Callable[[str], Path]

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gemma2", "phi3"]
FAMILIES += ["gpt2", "opt", "opt-350m"]
MIXTURES = ["mixtral", "qwen3-moe", "qwen3-moe-2"]
#: Where the cut of the work matters in its own way; the others share their code.
CUT = ["llama", "mistral", "qwen3", "gemma3"]


@pytest.mark.parametrize("family", FAMILIES + MIXTURES)
def test_logprobs_equal_transformers(family: str, tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint(family)
    model = reference_model(folder, torch.float32)
    everything = SamplingParams(temperature=0.0, logprobs=384)
    mixed = Decoding(tiny_runner(folder), prompts(1, 9, 40, 70), everything)
    mixed.step({0: 1, 1: 9, 2: 40, 3: 70})
    drawn = mixed.step({0: 1, 1: 1, 2: 1, 3: 1})
    for i, sampled in drawn.items():
        want = reference_logprobs(model, mixed.tokens[i][:-1])
        got = torch.zeros(384)
        for token, logprob in sampled.top:
            got[token] = logprob
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
        assert sampled.token_id == int(want.argmax())
        assert sampled.logprob == pytest.approx(float(want.max()), abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES + MIXTURES)
def test_greedy_answers_equal_transformers(family: str, tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint(family)
    model = reference_model(folder, torch.float32)
    asked = prompts(5, 31)
    assert_greedy(model, asked, Decoding(tiny_runner(folder), asked, GREEDY).finish(48))


@pytest.mark.parametrize("chunk", [1, 7, 8, 33])
@pytest.mark.parametrize("family", CUT)
def test_the_cut_of_the_work_does_not_change_answers(
    family: str, chunk: int, tiny_checkpoint: Checkpoint
) -> None:
    runner = tiny_runner(tiny_checkpoint(family))
    asked = prompts(3, 20, 45, 64, 12)
    drawn = SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.1, seed=11)
    for sampling in (GREEDY, drawn):
        alone = [Decoding(runner, [prompt], sampling).finish(12)[0] for prompt in asked]
        # Short prompts are answered while long ones are still read: the steps are mixed.
        assert Decoding(runner, asked, sampling).finish(12, chunk) == alone


def test_phi3_beyond_its_original_context_takes_the_long_factors(
    tiny_checkpoint: Checkpoint,
) -> None:
    folder = tiny_checkpoint("phi3")
    asked = prompts(520, 600)
    model = reference_model(folder, torch.float32)
    runner = tiny_runner(folder, num_blocks=160, max_model_len=1024)
    assert runner.max_model_len == 1024
    assert_greedy(model, asked, Decoding(runner, asked, GREEDY).finish(8, chunk=200))


@pytest.mark.parametrize("block_size", [1, 5, 16, 64])
def test_the_page_size_does_not_change_answers(
    block_size: int, tiny_checkpoint: Checkpoint
) -> None:
    folder = tiny_checkpoint("gemma3")
    asked = prompts(30, 7)
    want = Decoding(tiny_runner(folder), asked, GREEDY).finish(10)
    runner = tiny_runner(folder, block_size=block_size, num_blocks=512 // block_size)
    assert Decoding(runner, asked, GREEDY).finish(10) == want


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_stays_near_float32(family: str, tiny_checkpoint: Checkpoint) -> None:
    """Rounding moves probabilities a little. (A random router it moves to other experts.)"""
    everything = SamplingParams(temperature=0.0, logprobs=384)
    found = []
    for dtype in ("float32", "bfloat16"):
        run = Decoding(tiny_runner(tiny_checkpoint(family), dtype=dtype), prompts(40), everything)
        found.append(dict(run.step({0: 40})[0].top))
    wide, narrow = (torch.tensor([f[t] for t in range(384)]).exp() for f in found)
    assert 0 < float((wide - narrow).abs().sum()) < 0.25  # total variation: at most 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "impl"),
    [("bfloat16", "native"), ("float32", "native"), ("float32", "transformers")],
)
def test_demo_model_answers_as_transformers_does(dtype: str, impl: str, demo_model: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    asked = [tokenizer.encode("The capital of France is").ids]
    runner = tiny_runner(demo_model, dtype=dtype, model_impl=impl)
    answers = Decoding(runner, asked, GREEDY).finish(32)
    # Logits between 16 and 32 are 0.125 apart in bfloat16, and each side rounds its own.
    slack = 0.25 if dtype == "bfloat16" else 0.0
    assert_greedy(reference_model(demo_model, getattr(torch, dtype)), asked, answers, slack)


def test_gpt2_as_it_was_first_stored_is_the_same(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Without the prefix, and with every layer's causal mask."""

    def first(tensors: Tensors) -> Tensors:
        bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 512, 512).tril() for i in range(3)}
        return bare | masks | {"h.0.attn.masked_bias": torch.tensor(-1e4)}

    folder = tiny_checkpoint("gpt2")
    want = Decoding(tiny_runner(folder), prompts(9), GREEDY).finish(8)
    first_stored = restored(folder, tmp_path / "first", first)
    assert Decoding(tiny_runner(first_stored), prompts(9), GREEDY).finish(8) == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalised", [True, False])
def test_experts_are_weighted_by_the_router(normalised: bool, dtype: torch.dtype) -> None:
    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    torch.manual_seed(5)
    router, x = 2 * matrix(5, 12), matrix(7, 12)
    up, down = matrix(5, 16, 12), matrix(5, 12, 8)
    parts = [[Linear(Dense(weight)) for weight in pair] for pair in zip(up, down, strict=True)]
    experts = [GatedMlp(*pair, "silu") for pair in parts]
    found = Experts(Linear(Dense(router)), experts, top_k=2, normalised=normalised)(x)
    for token, row in zip(x.double(), found.double(), strict=True):
        likely = (router.double() @ token).softmax(0)
        best = likely.topk(2)
        total = best.values.sum() if normalised else 1.0
        want = torch.zeros(12, dtype=torch.float64)
        for weight, e in zip(best.values, best.indices, strict=True):
            gate, value = (up[e].double() @ token).chunk(2)
            want += weight / total * (down[e].double() @ (torch.nn.functional.silu(gate) * value))
        exact = dtype is torch.float32
        assert float((row - want).norm() / want.norm()) < (1e-5 if exact else 0.03)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_experts_stored_as_one_are_the_same(
    family: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(family)
    shutil.copytree(folder, tmp_path / "one")
    model = reference_model(folder, torch.float32)
    model.save_pretrained(tmp_path / "one", save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(
        tmp_path / "one" / "model.safetensors"
    )
    for quantization in ("none", "int8"):
        found = [
            Decoding(tiny_runner(path, quantization=quantization), prompts(9, 30), GREEDY).finish(8)
            for path in (folder, tmp_path / "one")
        ]
        assert found[0] == found[1]


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_the_kernels_for_experts_give_the_same_tokens(
    family: str, tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = tiny_checkpoint(family), prompts(3, 6)
    want = Decoding(tiny_runner(folder), asked, GREEDY).finish(2)
    monkeypatch.setattr(kernels, "pack_experts", gpu_moe.pack_experts)
    monkeypatch.setattr(kernels, "route", gpu_moe.route)
    assert Decoding(tiny_runner(folder), asked, GREEDY).finish(2) == want


def test_float16_is_served_in_float32(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    def halved(tensors: Tensors) -> Tensors:
        return {name: tensor.half() for name, tensor in tensors.items()}

    folder = restored(tiny_checkpoint("mistral"), tmp_path / "half", halved)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    model = reference_model(folder, torch.float32)
    asked = prompts(9)
    assert_greedy(model, asked, Decoding(tiny_runner(folder), asked, GREEDY).finish(16))


def test_old_config_keys_mean_the_same(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    new = read_config(tiny_checkpoint("llama"))
    scaling = json.loads((tiny_checkpoint("llama") / "config.json").read_text())["rope_parameters"]
    theta = scaling.pop("rope_theta")
    old = {"rope_theta": theta, "rope_scaling": scaling, "torch_dtype": "float32"}
    folder = rewritten(
        tiny_checkpoint("llama"), tmp_path / "old", old, ["rope_parameters", "dtype"]
    )
    assert read_config(folder) == new


def test_old_phi3_config_keys_mean_the_same(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    scaling = json.loads((tiny_checkpoint("phi3") / "config.json").read_text())["rope_parameters"]
    factors = {name: scaling[name] for name in ("short_factor", "long_factor")}
    old = {
        "rope_theta": scaling["rope_theta"],
        "partial_rotary_factor": scaling["partial_rotary_factor"],
        "original_max_position_embeddings": 512,
        "rope_scaling": {"type": "su", **factors},
    }
    folder = rewritten(tiny_checkpoint("phi3"), tmp_path / "old", old, ["rope_parameters"])
    assert read_config(folder) == read_config(tiny_checkpoint("phi3"))


def test_what_gemma_2_files_leave_out_is_known(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    left_out = ["tie_word_embeddings", "attn_logit_softcapping", "final_logit_softcapping"]
    left_out.append("layer_types")
    folder = rewritten(tiny_checkpoint("gemma2"), tmp_path / "less", {}, left_out)
    found = read_config(folder)
    assert found.sliding == (True, False, True)
    assert found.tie_word_embeddings
    assert (found.attn_logit_softcapping, found.final_logit_softcapping) == (50.0, 30.0)


def test_old_gemma_config_keys_mean_the_same(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    old = {
        "rope_theta": 100_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "sliding_window_pattern": 2,
    }
    folder = rewritten(
        tiny_checkpoint("gemma3"), tmp_path / "old", old, ["rope_parameters", "layer_types"]
    )
    assert read_config(folder) == read_config(tiny_checkpoint("gemma3"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' can't be served"),
        ({"rope_parameters": {"rope_type": "axial"}}, "rope_type 'axial'.*linear, dynamic, yarn"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0}},
            "key 'factor' is missing",
        ),
        ({"quantization_config": {"quant_method": "hqq"}}, "quant_method .hqq. is not supported"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"vocab_size": 400}, r"embed_tokens.weight has the shape \[384, 64\].*\[400, 64\]"),
        ({"num_hidden_layers": 4}, "layers.3.* is missing"),
        ({"num_hidden_layers": 2}, "9 tensors have no place: model.layers.2"),
    ],
)
def test_what_cannot_be_served_is_named(
    change: dict[str, Any], message: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = rewritten(tiny_checkpoint("llama"), tmp_path / "changed", change)
    with pytest.raises(ModelError, match=message):
        tiny_runner(folder)


def test_a_missing_config_key_is_named(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = rewritten(tiny_checkpoint("llama"), tmp_path / "less", {}, ["rms_norm_eps"])
    with pytest.raises(ModelError, match=r"config.json: the key 'rms_norm_eps' is missing"):
        tiny_runner(folder)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config.json does not exist.*forebay model pull"):
        tiny_runner(tmp_path)
