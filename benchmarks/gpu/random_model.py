"""Folders of models with the shapes of real ones and random weights: speed knows no difference.

The tokenizer has a word for each token of the vocabulary, so that texts are put together as ever.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor


def write(folder: Path, config: dict[str, Any], device: torch.device) -> Path:
    """Write the model, one file a layer; the folder is there once it is whole."""
    whole, folder = folder, folder.with_name(f"{folder.name}.{os.getpid()}")
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
    return folder.rename(whole)


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
