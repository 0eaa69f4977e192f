"""The parts of a checkpoint's config.json that the models read, typed and checked.

Read directly rather than through transformers: its import costs seconds, and its defaults would
hide a key that a checkpoint lacks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forebay_engine.errors import StartRefused


class ModelError(StartRefused):
    """A checkpoint that cannot be served; the message says which file and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary angles: ``rope_type`` with its base and, for the scaled types, their settings."""

    theta: float
    kind: str = "default"
    #: Of a head's dimensions, those that are rotated: its first ones.
    partial: float = 1.0
    factor: float = 1.0
    #: Of cosines and sines (yarn, longrope).
    attention_factor: float = 1.0
    #: Positions of the training before the context was stretched.
    original_max_position: int = 8192
    #: llama3: wavelengths beyond original/low are divided by ``factor``, below original/high kept.
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    #: yarn: what turns more often than ``beta_fast`` in the original context is kept, what turns
    #: less often than ``beta_slow`` divided by ``factor``.
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    #: longrope: divisors of each frequency, for contexts within the original one and beyond it.
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What must be known of a decoder to run it, whoever computes its layers."""

    architecture: str
    #: Stored without its output layer, as embedding models are.
    headless: bool
    vocab_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    #: Longest sequence that is served. Angles that depend on a sequence's length take this one:
    #: a cached key must be right for whoever reads it.
    served_length: int
    #: Of each layer: attends to the last ``sliding_window`` positions only.
    sliding: tuple[bool, ...]
    sliding_window: int | None
    #: As stored: ``float32``, ``bfloat16``, ``float16``.
    dtype: str
    eos_token_ids: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersShape(ModelShape):
    """A decoder that transformers computes."""

    #: transformers' own configuration.
    config: Any = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(ModelShape):
    """The whole of it, in the names of Hugging Face's config.json where one exists."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    norm_eps: float
    tie_word_embeddings: bool
    rope: Rope
    #: Of sliding layers, where they have their own (Gemma 3).
    rope_local: Rope
    hidden_act: str
    attention_bias: bool
    mlp_bias: bool
    query_pre_attn_scalar: float
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    #: All of config.json, for what only one family has.
    data: Mapping[str, Any] = field(compare=False, repr=False)


#: Decoders stored without their output layer, as embedding models are.
HEADLESS = {
    "Gemma2Model": "Gemma2ForCausalLM",
    "Gemma3TextModel": "Gemma3ForCausalLM",
    "LlamaModel": "LlamaForCausalLM",
    "MistralModel": "MistralForCausalLM",
    "Phi3Model": "Phi3ForCausalLM",
    "Qwen2Model": "Qwen2ForCausalLM",
    "Qwen3Model": "Qwen3ForCausalLM",
}
#: What a family's files may leave out, since transformers has it as the class's default.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "Gemma2ForCausalLM": {
        "tie_word_embeddings": True,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "Gemma3ForCausalLM": {
        "tie_word_embeddings": True,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
    "GPT2LMHeadModel": {"tie_word_embeddings": True, "n_inner": None},
    "OPTForCausalLM": {"tie_word_embeddings": True, "layer_norm_eps": 1e-5},
}

#: Keys of families that are older than the usual names.
_RENAMED = {
    "GPT2LMHeadModel": {
        "n_embd": "hidden_size",
        "n_inner": "intermediate_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "layer_norm_epsilon": "rms_norm_eps",
        "activation_function": "hidden_act",
    },
    "OPTForCausalLM": {
        "ffn_dim": "intermediate_size",
        "layer_norm_eps": "rms_norm_eps",
        "activation_function": "hidden_act",
    },
}


def read_config(folder: Path) -> ModelConfig:
    """The model configuration in ``folder``; ModelError when it is missing or not understood."""
    data = _json(folder / "config.json")
    try:
        return _parse(data, read_ends(folder, data.get("eos_token_id")))
    except KeyError as error:
        raise ModelError(f"{folder / 'config.json'}: the key {error} is missing") from error


def read_architecture(folder: Path) -> str:
    """The class that the checkpoint was saved from, ``none`` if it does not say."""
    return str((_json(folder / "config.json").get("architectures") or ["none"])[0])


def read_ends(folder: Path, eos: int | list[int] | None) -> frozenset[int]:
    """The tokens that end a text: of generation_config.json, or else ``eos`` of config.json."""
    generation = folder / "generation_config.json"
    found = _json(generation).get("eos_token_id") if generation.exists() else None
    found = eos if found is None else found
    return frozenset([found] if isinstance(found, int) else found or ())


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{path} does not exist: give a folder with config.json and safetensors, "
            "or fetch the demo model with `forebay model pull gemma-3-270m`"
        ) from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    return data


def _parse(data: dict[str, Any], ends: frozenset[int]) -> ModelConfig:
    _refuse_unsupported(data)
    named = (data.get("architectures") or ["none"])[0]
    architecture = HEADLESS.get(named, named)
    data = {**_DEFAULTS.get(architecture, {}), **data}
    for old, new in _RENAMED.get(architecture, {}).items():
        data[new] = data[old]
    heads = data["num_attention_heads"]
    head_dim = data.get("head_dim") or data["hidden_size"] // heads
    full, local = _ropes(data)
    longest = max(data["max_position_embeddings"], _stretched(full))
    return ModelConfig(
        architecture=architecture,
        headless=named in HEADLESS,
        vocab_size=data["vocab_size"],
        hidden_size=data["hidden_size"],
        intermediate_size=data["intermediate_size"] or 4 * data["hidden_size"],
        num_layers=data["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=data.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        norm_eps=data["rms_norm_eps"],
        max_position_embeddings=longest,
        served_length=longest,
        tie_word_embeddings=data.get("tie_word_embeddings", False),
        sliding=_sliding_layers(data, architecture),
        sliding_window=data.get("sliding_window"),
        rope=full,
        rope_local=local,
        hidden_act=data.get("hidden_activation") or data.get("hidden_act", "silu"),
        attention_bias=data.get("attention_bias", False),
        mlp_bias=data.get("mlp_bias", False),
        query_pre_attn_scalar=data.get("query_pre_attn_scalar") or head_dim,
        attn_logit_softcapping=data.get("attn_logit_softcapping"),
        final_logit_softcapping=data.get("final_logit_softcapping"),
        dtype=_stored_type(data),
        eos_token_ids=ends,
        data=data,
    )


def _stored_type(data: dict[str, Any]) -> str:
    found = data.get("dtype") or data.get("torch_dtype") or "float32"
    if found == "float16" and data.get("quantization_config"):
        # Weights of 4 or 8 bits have nothing that bfloat16 would lose, and kernels that take it.
        return "bfloat16"
    return str(found)


def _refuse_unsupported(data: dict[str, Any]) -> None:
    """What would otherwise be served wrongly without a word."""
    if data.get("use_bidirectional_attention"):
        raise ModelError("config.json: bidirectional attention cannot generate text")


def _sliding_layers(data: dict[str, Any], architecture: str) -> tuple[bool, ...]:
    """Which layers slide: named one by one, by Gemma's pattern, Qwen's upper ones, or all."""
    layers: int = data["num_hidden_layers"]
    qwen = architecture.startswith("Qwen")
    if not data.get("sliding_window") or (qwen and not data.get("use_sliding_window")):
        return (False,) * layers
    if data.get("layer_types"):
        return tuple(kind == "sliding_attention" for kind in data["layer_types"])
    if every := data.get("sliding_window_pattern"):  # every so many layers one that sees all
        return tuple(bool((i + 1) % every) for i in range(layers))
    first = 0 if architecture == "Qwen3MoeForCausalLM" else data.get("max_window_layers", 0)
    return tuple(i >= first for i in range(layers))


def _ropes(data: dict[str, Any]) -> tuple[Rope, Rope]:
    """Angles of full and of sliding layers, from the new ``rope_parameters`` or the old keys."""
    new = data.get("rope_parameters")
    if new and "full_attention" in new:
        return _rope(new["full_attention"], data), _rope(new["sliding_attention"], data)
    if new:
        return (rope := _rope(new, data)), rope
    theta = {"rope_theta": data.get("rope_theta", 10_000.0)}
    full = _rope({**theta, **(data.get("rope_scaling") or {})}, data)
    local = data.get("rope_local_base_freq")
    return full, full if local is None else Rope(theta=local)


def _rope(rope: dict[str, Any], data: dict[str, Any]) -> Rope:
    """``rope`` with its type's settings; config.json as a whole has those that have moved."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if "short_factor" in rope:  # «su» and «yarn» in Phi-3's first files
        kind = "longrope"
    read = _SCALED.get(kind)
    if read is None:
        raise ModelError(
            f"config.json: rope_type {kind!r} is not supported (these are: {', '.join(_SCALED)})"
        )
    partial = rope.get("partial_rotary_factor") or data.get("partial_rotary_factor") or 1.0
    return Rope(theta=rope["rope_theta"], partial=partial, **read(rope, data))


def _linear(rope: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "linear", "factor": rope["factor"]}


def _dynamic(rope: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    original = data["max_position_embeddings"]
    return {"kind": "dynamic", "factor": rope["factor"], "original_max_position": original}


def _llama3(rope: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "llama3",
        "factor": rope["factor"],
        "low_freq_factor": rope["low_freq_factor"],
        "high_freq_factor": rope["high_freq_factor"],
        "original_max_position": _original(rope, data),
    }


def _yarn(rope: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """The attention factor is of section 3.4 of https://arxiv.org/abs/2309.00071."""
    original = _original(rope, data)
    factor = rope.get("factor") or data["max_position_embeddings"] / original
    attention = rope.get("attention_factor")
    if attention is None:
        attention = _mscale(factor, 1.0)
        over, under = rope.get("mscale"), rope.get("mscale_all_dim")
        if over and under:  # DeepSeek's
            attention = _mscale(factor, over) / _mscale(factor, under)
    return {
        "kind": "yarn",
        "factor": factor,
        "attention_factor": attention,
        "original_max_position": original,
        "beta_fast": rope.get("beta_fast") or 32.0,
        "beta_slow": rope.get("beta_slow") or 1.0,
        "truncate": rope.get("truncate", True),
    }


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(rope: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """The attention factor is of section 3.3 of https://arxiv.org/abs/2402.13753."""
    original = _original(rope, data)
    factor = rope.get("factor") or data["max_position_embeddings"] / original
    attention = rope.get("attention_factor")
    if attention is None:
        stretched = max(math.log(factor), 0.0)
        attention = math.sqrt(1.0 + stretched / math.log(original))
    return {
        "kind": "longrope",
        "attention_factor": attention,
        "original_max_position": original,
        "short_factor": tuple(rope["short_factor"]),
        "long_factor": tuple(rope["long_factor"]),
    }


_SCALED = {
    "default": lambda rope, data: {},
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}


def _original(rope: dict[str, Any], data: dict[str, Any]) -> int:
    """Phi-3's files have it beside the other settings, and it counts more there."""
    for found in (data, rope):
        if found.get("original_max_position_embeddings"):
            return int(found["original_max_position_embeddings"])
    return int(data["max_position_embeddings"])


def _stretched(rope: Rope) -> int:
    """The context that these types reach, whatever max_position_embeddings says."""
    reaches = rope.kind in ("yarn", "dynamic")
    return int(rope.original_max_position * rope.factor) if reaches else 0
