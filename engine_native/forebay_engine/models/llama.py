"""The Llama family: Llama 2 and 3, Mistral, Qwen 2 and 2.5, Qwen 3.

Llama: https://arxiv.org/abs/2302.13971; Mistral (sliding window): https://arxiv.org/abs/2310.06825;
Qwen 2 (biases on q, k, v): https://arxiv.org/abs/2407.10671; Qwen 3 (norms on q, k):
https://arxiv.org/abs/2505.09388.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

import forebay_kernels as kernels
from forebay_engine.hf_config import ModelConfig
from forebay_engine.layers import Angles, Attention, GatedMlp, LayerCache, RmsNorm, Rotary, head
from forebay_engine.weights import Weights


class Layer:
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(
        self, config: ModelConfig, weights: Weights, index: int, *, qkv_bias: bool, qk_norm: bool
    ) -> None:
        prefix = f"model.layers.{index}"
        norm = [
            RmsNorm(
                weights.take(f"{prefix}.{name}.weight", config.hidden_size), config.rms_norm_eps
            )
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
        self._attention_norm, self._mlp_norm = norm
        self._attention = Attention(
            config,
            weights,
            f"{prefix}.self_attn",
            layer=index,
            scale=config.head_dim**-0.5,
            qkv_bias=qkv_bias or config.attention_bias,
            out_bias=config.attention_bias,
            qk_norm=qk_norm,
        )
        self._mlp = GatedMlp(config, weights, f"{prefix}.mlp")

    def __call__(
        self, x: Tensor, angles: Angles, cache: LayerCache, batch: kernels.PagedBatch
    ) -> Tensor:
        x = x + self._attention(self._attention_norm(x), angles, cache, batch)
        return x + self._mlp(self._mlp_norm(x))


class Llama:
    """A Llama decoder; the others of the family differ by two flags and by config.json."""

    qkv_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self._embedding = weights.take("model.embed_tokens.weight", *shape)
        self._rotary = Rotary(config.rope, config.head_dim, weights.device)
        self._layers = [
            Layer(config, weights, i, qkv_bias=self.qkv_bias, qk_norm=self.qk_norm)
            for i in range(config.num_layers)
        ]
        self._norm = RmsNorm(
            weights.take("model.norm.weight", config.hidden_size), config.rms_norm_eps
        )
        self._head = head(config, weights, self._embedding)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        caches: list[LayerCache],
        batch: kernels.PagedBatch,
    ) -> Tensor:
        x = F.embedding(token_ids, self._embedding)
        angles = self._rotary(positions)
        for layer, cache in zip(self._layers, caches, strict=True):
            x = layer(x, angles, cache, batch)
        return self._norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden)


class Qwen2(Llama):
    qkv_bias = True


class Qwen3(Llama):
    qk_norm = True
