"""The parts of a checkpoint's config.json that the models read, typed and checked.

Read directly rather than through transformers: its import costs seconds, and its defaults would
hide a key that a checkpoint lacks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
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
    factor: float = 1.0
    #: llama3: wavelengths beyond original/low are divided by ``factor``, below original/high kept.
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder's shape, in the names of Hugging Face's config.json where one exists."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    #: Of each layer: attends to the last ``sliding_window`` positions only.
    sliding: tuple[bool, ...]
    sliding_window: int | None
    rope: Rope
    #: Of sliding layers, where they have their own (Gemma 3).
    rope_local: Rope
    hidden_act: str
    attention_bias: bool
    mlp_bias: bool
    query_pre_attn_scalar: float
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    #: As stored: ``float32``, ``bfloat16``, ``float16``.
    dtype: str
    eos_token_ids: frozenset[int]


def read_config(folder: Path) -> ModelConfig:
    """The model configuration in ``folder``; ModelError when it is missing or not understood."""
    data = _json(folder / "config.json")
    generation = folder / "generation_config.json"
    eos = _json(generation).get("eos_token_id") if generation.exists() else None
    try:
        return _parse(data, data.get("eos_token_id") if eos is None else eos)
    except KeyError as error:
        raise ModelError(f"{folder / 'config.json'}: the key {error} is missing") from error


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


def _parse(data: dict[str, Any], eos: int | list[int] | None) -> ModelConfig:
    _refuse_unsupported(data)
    architecture = (data.get("architectures") or ["none"])[0]
    heads = data["num_attention_heads"]
    head_dim = data.get("head_dim") or data["hidden_size"] // heads
    full, local = _ropes(data)
    return ModelConfig(
        architecture=architecture,
        vocab_size=data["vocab_size"],
        hidden_size=data["hidden_size"],
        intermediate_size=data["intermediate_size"],
        num_layers=data["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=data.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rms_norm_eps=data["rms_norm_eps"],
        max_position_embeddings=data["max_position_embeddings"],
        # transformers leaves out what equals its class's default: Gemma ties, the others do not.
        tie_word_embeddings=data.get("tie_word_embeddings", architecture.startswith("Gemma")),
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
        dtype=data.get("dtype") or data.get("torch_dtype") or "float32",
        eos_token_ids=frozenset([eos] if isinstance(eos, int) else eos or ()),
    )


def _refuse_unsupported(data: dict[str, Any]) -> None:
    """What would otherwise be served wrongly without a word."""
    if data.get("quantization_config"):
        method = data["quantization_config"].get("quant_method", "unknown")
        raise ModelError(
            f"config.json: the weights are quantised ({method}); give the unquantised checkpoint"
        )
    if data.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("config.json: partial_rotary_factor is not supported")
    if data.get("use_bidirectional_attention"):
        raise ModelError("config.json: bidirectional attention cannot generate text")


def _sliding_layers(data: dict[str, Any], architecture: str) -> tuple[bool, ...]:
    """Which layers slide: named one by one, by Gemma's pattern, Qwen's upper ones, or all."""
    layers: int = data["num_hidden_layers"]
    gemma, qwen = architecture.startswith("Gemma"), architecture.startswith("Qwen")
    if not data.get("sliding_window") or (qwen and not data.get("use_sliding_window")):
        return (False,) * layers
    if data.get("layer_types"):
        return tuple(kind == "sliding_attention" for kind in data["layer_types"])
    if gemma:
        every: int = data.get("sliding_window_pattern", 6)
        return tuple(bool((i + 1) % every) for i in range(layers))
    return tuple(i >= data.get("max_window_layers", 0) for i in range(layers))


def _ropes(data: dict[str, Any]) -> tuple[Rope, Rope]:
    """Angles of full and of sliding layers, from the new ``rope_parameters`` or the old keys."""
    new = data.get("rope_parameters")
    if new and "full_attention" in new:
        return _rope(new["full_attention"]), _rope(new["sliding_attention"])
    if new:
        return _rope(new), _rope(new)
    gemma = data.get("model_type") == "gemma3_text"  # its defaults were left out of old files
    theta = data.get("rope_theta", 1_000_000.0 if gemma else 10_000.0)
    full = _rope({"rope_theta": theta, **(data.get("rope_scaling") or {})})
    return full, Rope(theta=data.get("rope_local_base_freq", 10_000.0)) if gemma else full


def _rope(data: dict[str, Any]) -> Rope:
    kind = data.get("rope_type") or data.get("type") or "default"
    if kind == "default":
        return Rope(theta=data["rope_theta"])
    if kind == "linear":
        return Rope(theta=data["rope_theta"], kind=kind, factor=data["factor"])
    if kind == "llama3":
        return Rope(
            theta=data["rope_theta"],
            kind=kind,
            factor=data["factor"],
            low_freq_factor=data["low_freq_factor"],
            high_freq_factor=data["high_freq_factor"],
            original_max_position=data["original_max_position_embeddings"],
        )
    raise ModelError(f"config.json: rope_type {kind!r} is not supported (default, linear, llama3)")
