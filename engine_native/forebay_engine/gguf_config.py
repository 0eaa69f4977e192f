"""config.json from a GGUF file's metadata, for architectures whose tensors have a place here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from forebay_engine.gguf_tokenizer import END_OF_TURN
from forebay_engine.hf_config import ModelError

Meta = Mapping[str, Any]

# Gemma 3 files leave these out, because llama.cpp has them in its code.
_LOCAL_ROPE_THETA = 10_000.0
_FULL_ATTENTION_EVERY = 6
#: Layers of the Gemmas whose query scale is hidden_size / heads, not head_dim: 27B of 2 and of 3.
_SCALED_BY_HIDDEN = {"gemma2": 46, "gemma3": 62}

#: By general.architecture: name in config.json's ``architectures``.
ARCHITECTURES = {
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def model_config(
    meta: Meta,
    tensors: Mapping[str, tuple[int, ...]],
    factors: Mapping[str, list[float]],
) -> dict[str, Any]:
    """config.json's keys.

    ``tensors``: shapes by GGUF name. ``factors``: values of those called ``rope_*``, by which
    wavelengths are stretched (Llama 3.1, Phi-3).

    :raises ModelError: another architecture, or a key that is missing.
    """
    name = meta.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ModelError(
            f"a GGUF of {name!r} is not supported (these are: {', '.join(ARCHITECTURES)}); give "
            "the model's folder with safetensors"
        )
    own = {k.removeprefix(f"{name}."): v for k, v in meta.items() if k.startswith(f"{name}.")}
    if own.get("expert_count"):
        raise ModelError(
            f"a GGUF of {name!r} with experts is not supported; give the folder with safetensors"
        )
    try:
        config = _common(meta, own, tensors)
        if name == "gpt2":
            return config | _gpt2(own, tensors)
        special = _OWN[name](own) if name in _OWN else {}
        return config | _decoder(name, own, tensors, factors) | special
    except KeyError as error:
        raise ModelError(f"the GGUF's metadata lack {name}.{error.args[0]}") from error


def _common(meta: Meta, own: Meta, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    tokens = meta["tokenizer.ggml.tokens"]
    return {
        "architectures": [ARCHITECTURES[meta["general.architecture"]]],
        "transformers_version": "5.0.0",  # whose form of config.json this is
        "dtype": "bfloat16",
        "vocab_size": tensors["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _ends(meta, tokens),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }


def _ends(meta: Meta, tokens: list[str]) -> list[int]:
    """The end of a turn is one too; older files name the end of the text alone."""
    ids = [meta.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    for text in (END_OF_TURN, "<|eot_id|>", "<|im_end|>", "<|end|>"):
        if text in tokens:
            ids.append(tokens.index(text))
    return sorted({token for token in ids if token is not None})


def _decoder(
    name: str, own: Meta, tensors: Mapping[str, tuple[int, ...]], factors: Mapping[str, list[float]]
) -> dict[str, Any]:
    heads, hidden = own["attention.head_count"], own["embedding_length"]
    head_dim = own.get("attention.key_length", hidden // heads)
    return {
        "hidden_size": hidden,
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _short(own["attention.layer_norm_rms_epsilon"]),
        "max_position_embeddings": own["context_length"],
        "rope_parameters": _rope(own, factors, head_dim),
        "hidden_act": "silu",
        "attention_bias": name == "llama" and "blk.0.attn_q.bias" in tensors,
    }


def _rope(own: Meta, factors: Mapping[str, list[float]], head_dim: int) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": own.get("rope.freq_base", 10_000.0),
        "partial_rotary_factor": own.get("rope.dimension_count", head_dim) / head_dim,
    }
    kind = own.get("rope.scaling.type", "none")
    original = own.get("rope.scaling.original_context_length")
    if factors:
        every = factors.get("rope_freqs.weight")
        return rope | {
            "rope_type": "longrope",
            "short_factor": every or factors["rope_factors_short.weight"],
            "long_factor": every or factors["rope_factors_long.weight"],
            "original_max_position_embeddings": original or own["context_length"],
            # Llama 3.1's factors leave the size of attention alone.
            "attention_factor": 1.0 if every else own.get("rope.scaling.attn_factor"),
        }
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": own["rope.scaling.factor"]}
    if kind == "yarn":
        return rope | {
            "rope_type": "yarn",
            "factor": own["rope.scaling.factor"],
            "original_max_position_embeddings": original,
        }
    if kind not in ("none", "longrope"):
        raise ModelError(f"the GGUF's rope.scaling.type {kind!r} is not supported")
    return rope


def _gemma2(own: Meta) -> dict[str, Any]:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _query_scalar("gemma2", own),
        "sliding_window": own["attention.sliding_window"],
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": own["attn_logit_softcapping"],
        "final_logit_softcapping": own["final_logit_softcapping"],
    }


def _gemma3(own: Meta) -> dict[str, Any]:
    layers = own["block_count"]
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": own["rope.freq_base"]}
    if own.get("rope.scaling.factor", 1.0) != 1.0:
        full |= {"rope_type": "linear", "factor": own["rope.scaling.factor"]}
    return {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _query_scalar("gemma3", own),
        "sliding_window": own["attention.sliding_window"],
        "layer_types": [
            "sliding_attention" if i % _FULL_ATTENTION_EVERY else "full_attention"
            for i in range(1, layers + 1)
        ],
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": _LOCAL_ROPE_THETA},
        },
    }


def _query_scalar(name: str, own: Meta) -> int:
    if own["block_count"] == _SCALED_BY_HIDDEN[name]:
        return int(own["embedding_length"] // own["attention.head_count"])
    return int(own["attention.key_length"])


def _phi3(own: Meta) -> dict[str, Any]:
    return {"sliding_window": own.get("attention.sliding_window") or None}


_OWN: dict[str, Callable[[Meta], dict[str, Any]]] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
}


def _gpt2(own: Meta, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return {
        "n_embd": own["embedding_length"],
        "n_inner": own["feed_forward_length"],
        "n_layer": own["block_count"],
        "n_head": own["attention.head_count"],
        "n_positions": tensors["position_embd.weight"][0],
        "layer_norm_epsilon": _short(own["attention.layer_norm_epsilon"]),
        "activation_function": "gelu_new",
    }


def _short(epsilon: float) -> float:
    """Stored as float32: 9.99999997e-07 was 1e-06."""
    return float(f"{epsilon:.6g}")
