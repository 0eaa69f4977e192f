"""GPT-2: Radford et al. 2019, «Language Models are Unsupervised Multitask Learners».

Learned positions, norms with bias, and matrices stored as ``[in, out]``.
"""

from __future__ import annotations

from torch import Tensor

import forebay_kernels as kernels
from forebay_engine.head import WithHead, head
from forebay_engine.hf_config import ModelConfig
from forebay_engine.layers import (
    Attention,
    LayerCache,
    Mlp,
    PreNormLayer,
    layer_norm,
    linear,
)
from forebay_engine.linear import Linear
from forebay_engine.weights import Weights


class Gpt2(WithHead):
    """A GPT-2 decoder."""

    replayable: bool = True

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        # The first checkpoints were saved without the head around them.
        self._prefix = "" if "wte.weight" in weights else "transformer."
        size = config.hidden_size
        self._embedding = weights.take(f"{self._prefix}wte.weight", config.vocab_size, size)
        self._positions = weights.take(
            f"{self._prefix}wpe.weight", config.max_position_embeddings, size
        )
        self._layers = [self._layer(config, weights, i) for i in range(config.num_layers)]
        self._norm = layer_norm(config, weights, f"{self._prefix}ln_f")
        self._head = head(config, weights, self._embedding)

    def _layer(self, config: ModelConfig, weights: Weights, index: int) -> PreNormLayer:
        prefix = f"{self._prefix}h.{index}"
        weights.skip([f"{prefix}.attn.bias", f"{prefix}.attn.masked_bias"])  # causal masks
        size, inner = config.hidden_size, config.intermediate_size

        def layer(name: str, out: int, into: int) -> Linear:
            return linear(weights, f"{prefix}.{name}", out, into, bias=True, transposed=True)

        return PreNormLayer(
            layer_norm(config, weights, f"{prefix}.ln_1"),
            Attention(
                config,
                layer("attn.c_attn", 3 * size, size),
                layer("attn.c_proj", size, size),
                layer=index,
                scale=_scale(config, index),
            ),
            layer_norm(config, weights, f"{prefix}.ln_2"),
            Mlp(
                layer("mlp.c_fc", inner, size), layer("mlp.c_proj", size, inner), config.hidden_act
            ),
        )

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        caches: list[LayerCache],
        batch: kernels.PagedBatch,
    ) -> Tensor:
        x = kernels.embedding(token_ids, self._embedding)
        x = x + kernels.embedding(positions, self._positions)
        for layer, cache in zip(self._layers, caches, strict=True):
            x = layer(x, None, cache, batch)
        return self._norm(x)


def _scale(config: ModelConfig, index: int) -> float:
    scale = config.head_dim**-0.5 if config.data.get("scale_attn_weights", True) else 1.0
    by_layer = config.data.get("scale_attn_by_inverse_layer_idx", False)
    return scale / (index + 1) if by_layer else scale
