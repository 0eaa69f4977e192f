"""The Llama family: Llama 2 and 3, Mistral, Qwen 2 and 2.5, Qwen 3, Phi-3 and 4.

Llama: https://arxiv.org/abs/2302.13971; Mistral (sliding window): https://arxiv.org/abs/2310.06825;
Qwen 2 (biases on q, k, v): https://arxiv.org/abs/2407.10671; Qwen 3 (norms on q, k):
https://arxiv.org/abs/2505.09388; Phi-3 (matrices stored as one, longrope):
https://arxiv.org/abs/2404.14219.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

import forebay_kernels as kernels
from forebay_engine.head import WithHead, head
from forebay_engine.hf_config import ModelConfig
from forebay_engine.layers import (
    LayerCache,
    Part,
    ResidualLayer,
    RmsNorm,
    attention,
    gated_mlp,
)
from forebay_engine.rotary import Rotary
from forebay_engine.stack import Stack
from forebay_engine.weights import Weights


class Llama(WithHead):
    """A Llama decoder; the others of the family differ by these flags and by config.json."""

    replayable: bool = True
    qkv_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = False
    #: Queries, keys and values are stored as one matrix, and so are gate and up.
    fused: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self._embedding = weights.take("model.embed_tokens.weight", *shape)
        # Before the layers: it takes longest to lay out, and they are read meanwhile.
        self._head = head(config, weights, self._embedding)
        self._rotary = Rotary(config.rope, config, weights.device)
        layers = [self._layer(config, weights, i) for i in range(config.num_layers)]
        self._stack = Stack(layers, _norm(config, weights, "model.norm"))

    def _layer(self, config: ModelConfig, weights: Weights, index: int) -> ResidualLayer:
        prefix = f"model.layers.{index}"
        return ResidualLayer(
            _norm(config, weights, f"{prefix}.input_layernorm"),
            attention(
                config,
                weights,
                f"{prefix}.self_attn",
                layer=index,
                scale=config.head_dim**-0.5,
                qkv_bias=self.qkv_bias or config.attention_bias,
                out_bias=config.attention_bias,
                qk_norm=self.qk_norm,
                fused=self.fused,
            ),
            _norm(config, weights, f"{prefix}.post_attention_layernorm"),
            self._mlp(config, weights, index),
        )

    def _mlp(self, config: ModelConfig, weights: Weights, index: int) -> Part:
        return gated_mlp(config, weights, f"model.layers.{index}.mlp", fused=self.fused)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        caches: list[LayerCache],
        batch: kernels.PagedBatch,
    ) -> Tensor:
        x = kernels.embedding(token_ids, self._embedding)
        angles = [self._rotary(positions)] * len(caches)
        return self._stack(x, angles, caches, batch)


def _norm(config: ModelConfig, weights: Weights, name: str) -> RmsNorm:
    return RmsNorm(weights.take(f"{name}.weight", config.hidden_size), config.norm_eps)


class Qwen2(Llama):
    qkv_bias = True


class Qwen3(Llama):
    qk_norm = True


class Phi3(Llama):
    fused = True
