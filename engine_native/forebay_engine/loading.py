"""From a folder and a configuration to a model on its device, for every kind of runner."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from forebay_engine.cache import CacheGroup
from forebay_engine.cache_size import layer_windows
from forebay_engine.config import EngineConfig
from forebay_engine.draft_model import DraftModel, read_draft_shape
from forebay_engine.gguf import model_folder
from forebay_engine.hf_config import ModelConfig, ModelError, ModelShape, TransformersShape
from forebay_engine.layers import LayerCache, Scales
from forebay_engine.models import Model, build_model, read_shape
from forebay_engine.weights import Weights

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KV_DTYPES = {"fp8": torch.float8_e4m3fn}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is known of a model before its weights are read."""

    config: EngineConfig
    folder: Path
    device: torch.device
    shape: ModelConfig | TransformersShape
    dtype: torch.dtype
    kv_dtype: torch.dtype
    draft: ModelConfig | TransformersShape | None

    @classmethod
    def of(cls, config: EngineConfig, device: torch.device) -> Checkpoint:
        """:raises ModelError: the model can't be served in this way."""
        folder = model_folder(Path(config.model).expanduser())
        shape = read_shape(folder, config.model_impl)
        dtype = _dtype(config.dtype, shape, device)
        if config.kv_cache_dtype not in ("auto", *_KV_DTYPES):
            raise ModelError(f"kv_cache_dtype {config.kv_cache_dtype!r} is not one of auto, fp8")
        if config.max_model_len > shape.max_position_embeddings:
            raise ModelError(
                f"max_model_len: {config.max_model_len} is more than the model's "
                f"{shape.max_position_embeddings}"
            )
        kv_dtype = _KV_DTYPES.get(config.kv_cache_dtype, dtype)
        return cls(config, folder, device, shape, dtype, kv_dtype, read_draft_shape(config, shape))

    @property
    def longest(self) -> int:
        """The asked length or the model's, whatever the cache holds."""
        return self.config.max_model_len or self.shape.max_position_embeddings

    def max_model_len(self, groups: Items[CacheGroup]) -> int:
        """That length as far as the cache can hold one sequence of it."""
        asked, size = self.longest, self.config.block_size
        found = min(group.longest_sequence(asked, size) for group in groups)
        if found < asked:
            log.info("max_model_len: %d, all that the KV cache holds, not %d", found, asked)
        return found

    def load(
        self, served_length: int, progress: Callable[[float], None]
    ) -> tuple[Model, list[Scales]]:
        """Read the weights: the model, and of each layer the scales of its cache.

        :param progress: is told the share of the weights that has been read, 0 to 1.
        """
        quantization = self.config.quantization
        shape = replace(self.shape, served_length=served_length)
        with (
            Weights(self.folder, self.dtype, self.device, quantization, progress) as weights,
            torch.inference_mode(),
        ):
            scales = [_kv_scales(weights, shape, layer) for layer in range(shape.num_layers)]
            return build_model(shape, weights), scales

    def caches(self, groups: Items[CacheGroup], scales: Items[Scales]) -> list[LayerCache]:
        """Empty pages for each layer."""
        shape = self.shape
        pages = {group.window: group.num_blocks for group in groups}
        with torch.inference_mode():
            return [
                LayerCache.empty(
                    (shape.num_kv_heads, pages[window], self.config.block_size, shape.head_dim),
                    self.kv_dtype,
                    self.device,
                    own,
                )
                for window, own in zip(layer_windows(shape), scales, strict=True)
            ]

    def draft_model(self, served_length: int, groups: Items[CacheGroup]) -> DraftModel | None:
        """The draft model with its weights, if there is one."""
        if self.draft is None:
            return None
        return DraftModel(
            self.config,
            replace(self.draft, served_length=served_length),
            groups,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            device=self.device,
            eos_token_ids=self.shape.eos_token_ids,
        )


def _kv_scales(weights: Weights, shape: ModelShape, layer: int) -> Scales:
    """As the checkpoint says, or 1: FP8 reaches 448, and few keys and values come near it."""
    prefix = f"model.layers.{layer}.self_attn"
    found = []
    for part in "kv":
        names = (f"{prefix}.{part}_scale", f"{prefix}.{part}_proj.{part}_scale")
        scale = torch.ones(shape.num_kv_heads, device=weights.device)
        for name in names:
            if name in weights:
                stored = weights.take(name, dtype=torch.float32).flatten()
                if len(stored) not in (1, shape.num_kv_heads):
                    raise ModelError(
                        f"{weights.folder}: {name} has {len(stored)} values, where one or one for "
                        f"each of {shape.num_kv_heads} KV heads is understood"
                    )
                scale = stored.expand(shape.num_kv_heads).contiguous()
        found.append(scale)
    return found[0], found[1]


def _dtype(asked: str, shape: ModelShape, device: torch.device) -> torch.dtype:
    # float16 is slow on CPUs, and bfloat16 would drop its mantissa bits.
    known = [name for name in _DTYPES if name != "float16" or device.type == "cuda"]
    if asked == "auto":
        asked = "float32" if shape.dtype == "float16" and "float16" not in known else shape.dtype
    if asked not in known:
        raise ModelError(f"dtype {asked!r} is not one of auto, {', '.join(known)}")
    return _DTYPES[asked]
