"""What `forebay kv` reckons is what transformers builds and what the engine allocates and holds."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from forebay.capacity.cache import per_token, sequence_bytes
from forebay.capacity.shape import read_config, shape_of
from forebay.capacity.weights import count
from forebay_engine.cache import KVCache
from forebay_engine.cache_size import cache_groups
from forebay_engine.config import EngineConfig
from forebay_engine.hf_config import read_config as engine_config
from forebay_engine.runner import Runner
from forebay_engine.scheduler import Scheduler
from forebay_engine.sequence import SamplingParams, Sequence
from forebay_engine.step import Sampled, StepResult

SIZES = {"vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6}
GROUPED = {**SIZES, "intermediate_size": 80, "num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "llama, biases": ("LlamaConfig", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {**GROUPED, "head_dim": 16}),
    "qwen2": ("Qwen2Config", {**GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 16}),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 16}),
    "phi3": ("Phi3Config", {**GROUPED, "pad_token_id": 0}),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {**GROUPED, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 24}
        | {"num_experts_per_tok": 2, "decoder_sparse_step": 2},
    ),
    "gpt2": ("GPT2Config", {"n_layer": 3, "n_head": 6, "n_embd": 48, "vocab_size": 300}),
    "opt": ("OPTConfig", {**SIZES, "ffn_dim": 80, "word_embed_proj_dim": 48}),
    "opt, narrow": (
        "OPTConfig",
        {**SIZES, "ffn_dim": 80, "word_embed_proj_dim": 24, "do_layer_norm_before": False},
    ),
    "deepseek-v2": (
        "DeepseekV2Config",
        {**SIZES, "intermediate_size": 80, "moe_intermediate_size": 24, "n_routed_experts": 4}
        | {"n_shared_experts": 2, "first_k_dense_replace": 1, "q_lora_rank": None}
        | {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10},
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        {**SIZES, "intermediate_size": 80, "moe_intermediate_size": 24, "n_routed_experts": 4}
        | {"n_shared_experts": 1, "first_k_dense_replace": 2, "q_lora_rank": 20, "n_group": 2}
        | {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_that_transformers_builds(family: str, tmp_path: Path) -> None:
    name, settings = FAMILIES[family]
    transformers: Any = import_module("transformers")
    config = getattr(transformers, name)(**settings)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    # Buffers hold nothing that is learnt, but for the experts' balance of DeepSeek-V3.
    learnt = sum(parameter.numel() for parameter in model.parameters())
    learnt += sum(b.numel() for n, b in model.named_buffers() if n.endswith("correction_bias"))
    weights = count(read_config(tmp_path))
    assert weights.parameters == learnt
    assert not weights.assumed


def test_the_engine_allocates_as_much_for_a_slot(demo_model: Path) -> None:
    config = EngineConfig(model=str(demo_model), num_blocks=5, block_size=32, threads=1)
    shape = shape_of(read_config(demo_model))
    runner = Runner(config)
    allocated = sum(t.nbytes for cache in runner._caches for t in (cache.keys, cache.values))
    assert allocated == 5 * 32 * per_token(shape, 16) == 5 * 32 * 18_432


def test_the_engine_holds_as_much_for_a_sequence(demo_model: Path) -> None:
    """Behind the prompt's end it keeps one page more in each layer with a window."""
    config = EngineConfig(model=str(demo_model), max_model_len=4096)
    model = engine_config(demo_model)
    cache = KVCache(cache_groups(config, model, itemsize=2, kv_bytes=512 << 20), config.block_size)
    scheduler = Scheduler(cache, max_step_tokens=512, max_sequences=1, max_model_len=4096)
    prompt = list(range(3000))
    scheduler.add(Sequence(0, prompt, SamplingParams(max_tokens=200, ignore_eos=True)))
    shape = shape_of(json.loads((demo_model / "config.json").read_text()))
    page = config.block_size * shape.elements_per_layer * 2
    layers = [shape.full_layers, len(shape.windows)]
    surplus = set()
    while plan := scheduler.plan():
        (row,) = plan.rows
        if row.count == 1:
            held = sum(
                layers_of * pool.in_use * page
                for layers_of, pool in zip(layers, cache.pools, strict=True)
            )
            reckoned = sequence_bytes(shape, 16, row.start + 1, config.block_size)
            surplus.add((held - reckoned) / (layers[1] * page))
        scheduler.apply(StepResult((Sampled(0, 5),) if row.sample else ()))
    assert max(surplus) == 1.0
    assert min(surplus) >= 0.0
