"""The shape of a model as far as its KV cache depends on it, from config.json or from flags."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from forebay.capacity.line import CapacityError

__all__ = ["Latent", "ModelShape", "first_of", "read_config", "shape_of"]

#: Kinds of layers in `layer_types` that keep every token, and those that keep a window of them.
_FULL, _WINDOWED = {"full_attention"}, {"sliding_attention", "chunked_attention"}
#: Of families whose files may leave it out: every so many layers one sees everything.
_PATTERNS = {"gemma2": 2, "gemma3_text": 6}
_NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
}


class Latent(Struct, frozen=True):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    One compressed vector a token is kept instead of keys and values, and beside it the part of
    the key that carries the position.
    """

    rank: int
    rope_dim: int


class ModelShape(Struct, frozen=True):
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    #: Of each layer that keeps only its last tokens: how many. Shorter than ``layers`` by those
    #: that keep everything.
    windows: tuple[int, ...] = ()
    latent: Latent | None = None
    #: Longest sequence that the model was made for; None: not known.
    context: int | None = None

    @property
    def full_layers(self) -> int:
        return self.layers - len(self.windows)

    @property
    def elements_per_layer(self) -> int:
        """Numbers that one token leaves in one layer's cache."""
        if self.latent is not None:
            return self.latent.rank + self.latent.rope_dim
        return 2 * self.kv_heads * self.head_dim

    def without_windows(self) -> ModelShape:
        """As an engine holds it that frees nothing behind a window."""
        return ModelShape(
            self.layers, self.heads, self.kv_heads, self.head_dim, (), self.latent, self.context
        )


def read_config(place: Path) -> dict[str, Any]:
    """The part of a config.json that describes the text decoder.

    :raises CapacityError: there is none, or it is not one.
    """
    path = place / "config.json" if place.is_dir() else place
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CapacityError(
            f"MODEL: {path} can't be read ({error.strerror}); give a config.json, a folder with "
            "one, the name of a pulled model, or the shape by --layers, --heads and --head-dim"
        ) from error
    except ValueError as error:
        raise CapacityError(f"MODEL: {path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CapacityError(f"MODEL: {path} holds no JSON object")
    text = data.get("text_config")  # of models that also see or hear
    return {**data, **text} if isinstance(text, dict) else data


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """:raises CapacityError: a key is missing, or a layer is of a kind that is not known."""
    layers, heads = first_of(config, *_NAMES["layers"]), first_of(config, *_NAMES["heads"])
    latent = None
    if config.get("kv_lora_rank"):
        latent = Latent(config["kv_lora_rank"], first_of(config, "qk_rope_head_dim"))
    return ModelShape(
        layers=layers,
        heads=heads,
        kv_heads=_kv_heads(config, heads),
        head_dim=config.get("head_dim") or first_of(config, *_NAMES["hidden"]) // heads,
        windows=_windows(config, layers),
        latent=latent,
        context=config.get("max_position_embeddings") or config.get("n_positions"),
    )


def first_of(config: Mapping[str, Any], *names: str) -> int:
    """The value under the first of these names that there is.

    :raises CapacityError: there is none, or it is not a positive number.
    """
    for name in names:
        value = config.get(name)
        if value is not None:
            if not isinstance(value, int) or value < 1:
                raise CapacityError(f"config.json: {name} is {value!r}, not a positive number")
            return value
    raise CapacityError(
        f"config.json: the key {names[0]} is missing; "
        "give the shape by --layers, --heads, --kv-heads and --head-dim"
    )


def _kv_heads(config: Mapping[str, Any], heads: int) -> int:
    for name in ("num_key_value_heads", "num_kv_heads"):
        if config.get(name) is not None:
            return first_of(config, name)
    return 1 if config.get("multi_query") else heads


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Lengths of the windows, one for each layer that has one."""
    kinds: Sequence[str] | None = config.get("layer_types")
    if kinds is not None:
        for number, kind in enumerate(kinds):
            if kind not in _FULL | _WINDOWED:
                raise CapacityError(
                    f"config.json: layer_types[{number}] is {kind!r}, whose memory does not grow "
                    "as a KV cache does; give --layers with the number of attention layers"
                )
        windowed = sum(kind in _WINDOWED for kind in kinds)
    else:
        windowed = _windowed(config, layers)
    if not windowed:
        return ()
    return (first_of(config, "sliding_window", "attention_chunk_size"),) * windowed


def _windowed(config: Mapping[str, Any], layers: int) -> int:
    """How many layers slide where they are not named one by one."""
    kind = str(config.get("model_type", ""))
    # Qwen's files name a window even where it is switched off.
    off = config.get("use_sliding_window") is False or (
        kind.startswith("qwen") and not config.get("use_sliding_window")
    )
    if off or not config.get("sliding_window"):
        return 0
    if every := config.get("sliding_window_pattern") or _PATTERNS.get(kind):
        return layers - layers // int(every)
    return max(0, layers - int(config.get("max_window_layers") or 0))
