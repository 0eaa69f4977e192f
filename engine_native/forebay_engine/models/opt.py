"""OPT: https://arxiv.org/abs/2205.01068.

Learned positions, norms with bias, before each part or (in the 350m) after it, and embeddings that
may be narrower than the hidden states.
"""

from __future__ import annotations

from torch import Tensor

import forebay_kernels as kernels
from forebay_engine.head import WithHead, head
from forebay_engine.hf_config import ModelConfig
from forebay_engine.layers import (
    Attention,
    LayerCache,
    LayerNorm,
    Mlp,
    Part,
    PreNormLayer,
    layer_norm,
    linear,
    merged,
)
from forebay_engine.rotary import Angles
from forebay_engine.weights import Weights

#: The first rows of the position table are left over from padding.
_FIRST_POSITION = 2


class PostNormLayer:
    """Attention and MLP, each added to the residual stream, which is normed after both."""

    def __init__(
        self, attention_norm: Part, attention: Attention, mlp_norm: Part, mlp: Part
    ) -> None:
        self._attention_norm, self._attention = attention_norm, attention
        self._mlp_norm, self._mlp = mlp_norm, mlp

    def __call__(
        self, x: Tensor, angles: Angles | None, cache: LayerCache, batch: kernels.PagedBatch
    ) -> Tensor:
        x = self._attention_norm(x + self._attention(x, angles, cache, batch))
        return self._mlp_norm(x + self._mlp(x))


class Opt(WithHead):
    """An OPT decoder."""

    replayable: bool = True

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        prefix = "decoder" if "decoder.embed_tokens.weight" in weights else "model.decoder"
        size = config.hidden_size
        narrow = config.data.get("word_embed_proj_dim") or size
        norm_first = config.data.get("do_layer_norm_before", True)
        self._embedding = weights.take(f"{prefix}.embed_tokens.weight", config.vocab_size, narrow)
        rows = config.max_position_embeddings + _FIRST_POSITION
        self._positions = weights.take(f"{prefix}.embed_positions.weight", rows, size)
        make = PreNormLayer if norm_first else PostNormLayer
        self._layers = [
            make(*_parts(config, weights, f"{prefix}.layers.{i}", i))
            for i in range(config.num_layers)
        ]
        self._norm: LayerNorm | None = None
        if norm_first and not config.data.get("_remove_final_layer_norm", False):
            self._norm = _norm(config, weights, f"{prefix}.final_layer_norm")
        self._project_in = self._project_out = None
        if narrow != size:
            self._project_in = linear(weights, f"{prefix}.project_in", size, narrow, bias=False)
            self._project_out = linear(weights, f"{prefix}.project_out", narrow, size, bias=False)
        self._head = head(config, weights, self._embedding)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        caches: list[LayerCache],
        batch: kernels.PagedBatch,
    ) -> Tensor:
        x = kernels.embedding(token_ids, self._embedding)
        if self._project_in is not None:
            x = self._project_in(x)
        x = x + kernels.embedding(positions + _FIRST_POSITION, self._positions)
        for layer, cache in zip(self._layers, caches, strict=True):
            x = layer(x, None, cache, batch)
        if self._norm is not None:
            x = self._norm(x)
        return x if self._project_out is None else self._project_out(x)


def _parts(
    config: ModelConfig, weights: Weights, prefix: str, index: int
) -> tuple[Part, Attention, Part, Part]:
    """Of one layer: norm and attention, norm and MLP."""
    size, inner = config.hidden_size, config.intermediate_size
    bias = config.data.get("enable_bias", True)
    qkv = {f"{prefix}.self_attn.{name}_proj": size for name in "qkv"}
    attention = Attention(
        config,
        merged(weights, qkv, size, bias=bias),
        linear(weights, f"{prefix}.self_attn.out_proj", size, size, bias=bias),
        layer=index,
        scale=config.head_dim**-0.5,
    )
    mlp = Mlp(
        linear(weights, f"{prefix}.fc1", inner, size, bias=bias),
        linear(weights, f"{prefix}.fc2", size, inner, bias=bias),
        config.hidden_act,
    )
    norms = [
        _norm(config, weights, f"{prefix}.{name}_layer_norm") for name in ("self_attn", "final")
    ]
    return norms[0], attention, norms[1], mlp


def _norm(config: ModelConfig, weights: Weights, name: str) -> LayerNorm:
    if config.data.get("layer_norm_elementwise_affine", True):
        return layer_norm(config, weights, name)
    return LayerNorm(None, None, config.norm_eps)
