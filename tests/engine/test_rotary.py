"""The angles of every rope type against transformers', and who is rotated by them."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from forebay_engine.hf_config import ModelConfig, read_config
from forebay_engine.rotary import Rotary

SCALED: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 256},
    "yarn sharp": {
        "factor": 8.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "truncate": False,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
    },
    "yarn given": {
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.25,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "longrope": {
        "short_factor": [1.0 + i / 10 for i in range(8)],
        "long_factor": [1.0 + i for i in range(8)],
        "original_max_position_embeddings": 256,
    },
    "longrope given": {
        "short_factor": [2.0] * 8,
        "long_factor": [3.0] * 8,
        "original_max_position_embeddings": 256,
        "factor": 3.0,
    },
}


def shape_with(parameters: dict[str, Any], folder: Path) -> ModelConfig:
    """A Llama of 512 positions and heads of 16 dimensions."""
    data = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_theta": 10_000.0, **parameters},
    }
    (folder / "config.json").write_text(json.dumps(data))
    return read_config(folder)


@pytest.mark.parametrize("length", [200, 512, 1500])
@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize("name", SCALED)
def test_angles_equal_transformers(name: str, partial: float, length: int, tmp_path: Path) -> None:
    """For a served length, those that transformers uses for a sequence of this length."""
    hf: Any = import_module("transformers.models.stablelm.modeling_stablelm")
    parameters = {
        "rope_type": name.split()[0],
        "rope_theta": 10_000.0,
        "partial_rotary_factor": partial,
        **SCALED[name],
    }
    for key in ("short_factor", "long_factor"):
        if key in parameters:
            parameters[key] = parameters[key][: int(8 * partial)]
    config = hf.StableLmConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=512,
        rope_parameters=dict(parameters),
    )
    positions = torch.tensor([[0, 1, 17, length - 1]])
    cos, sin = hf.StableLmRotaryEmbedding(config)(torch.zeros(1), positions)
    shape = replace(shape_with(parameters, tmp_path), served_length=length)
    found = Rotary(shape.rope, shape, torch.device("cpu"))(positions[0])
    half = cos.shape[-1] // 2
    assert half == int(8 * partial)
    torch.testing.assert_close(found.cos, cos[0, :, :half], atol=1e-4, rtol=0)
    torch.testing.assert_close(found.sin, sin[0, :, :half], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "reach"), [("yarn", 1024), ("dynamic", 2048), ("longrope", 512), ("linear", 512)]
)
def test_a_stretched_context_is_served_in_full(name: str, reach: int, tmp_path: Path) -> None:
    assert (
        shape_with({"rope_type": name, **SCALED[name]}, tmp_path).max_position_embeddings == reach
    )
