"""Folders of models with the shapes of real ones and random weights: speed knows no difference.

The tokenizer has a word for each token of the vocabulary, so that texts are put together as ever.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

_COMMON = {
    "hidden_act": "silu",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
    "initializer_range": 0.02,
}
#: As their config.json on the model hub says, in November 2026.
QWEN3_06B: dict[str, Any] = {
    **_COMMON,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
}
LLAMA_8B: dict[str, Any] = {
    **_COMMON,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
#: What the same code does in a second on a processor, to prove the benchmark.
TINY: dict[str, Any] = {
    **QWEN3_06B,
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}


def write(folder: Path, config: dict[str, Any], device: torch.device) -> Path:
    """Write the model, one file a layer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    words = {f"w{number}": number for number in range(config["vocab_size"])}
    Tokenizer(WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    weight_map: dict[str, str] = {}
    random = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, config["torch_dtype"])
    for number, tensors in enumerate(_layers(config)):
        name = f"model-{number:03}.safetensors"
        made = {key: _tensor(size, dtype, random).cpu() for key, size in tensors.items()}
        save_file(made, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def _tensor(size: tuple[int, ...], dtype: torch.dtype, random: torch.Generator) -> Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=dtype, device=random.device)
    return (0.02 * torch.randn(size, generator=random, device=random.device)).to(dtype)


def _layers(config: dict[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    hidden, inner, dim = (config[name] for name in ("hidden_size", "intermediate_size", "head_dim"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    ends: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        ends["lm_head.weight"] = (config["vocab_size"], hidden)
    layers: list[dict[str, tuple[int, ...]]] = [ends]
    for number in range(config["num_hidden_layers"]):
        parts: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (heads * dim, hidden),
            "self_attn.k_proj": (kv_heads * dim, hidden),
            "self_attn.v_proj": (kv_heads * dim, hidden),
            "self_attn.o_proj": (hidden, heads * dim),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        if config["model_type"] == "qwen3":
            parts |= {"self_attn.q_norm": (dim,), "self_attn.k_norm": (dim,)}
        layers.append({f"model.layers.{number}.{name}.weight": s for name, s in parts.items()})
    return layers
