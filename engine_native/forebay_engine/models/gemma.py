"""Gemma 2 and 3, text only: https://arxiv.org/abs/2408.00118, https://arxiv.org/abs/2503.19786.

Norms scale by ``1 + w`` and stand before and after each part. Gemma 2 caps its logits and slides in
every other layer; Gemma 3 norms queries and keys, and five layers in six slide and rotate by their
own base.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

import forebay_kernels as kernels
from forebay_engine.head import WithHead, head
from forebay_engine.hf_config import ModelConfig
from forebay_engine.layers import (
    LayerCache,
    ResidualLayer,
    RmsNorm,
    attention,
    gated_mlp,
)
from forebay_engine.rotary import Rotary
from forebay_engine.stack import Stack
from forebay_engine.weights import Weights


def _norm(config: ModelConfig, weights: Weights, name: str) -> RmsNorm:
    weight = weights.take(f"{name}.weight", config.hidden_size, dtype=torch.float32)
    return RmsNorm(weight, config.norm_eps, unit_offset=True)


class Gemma2(WithHead):
    """A Gemma 2 decoder; Gemma 3 differs by norms and by config.json."""

    replayable: bool = True
    qk_norm: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self._embedding = weights.take("model.embed_tokens.weight", *shape)
        # Rounded to the weights' type first: for 640 in bf16 25.25, not 25.298.
        self._embed_scale = float(torch.tensor(config.hidden_size**0.5).to(self._embedding))
        # Before the layers: it takes longest to lay out, and they are read meanwhile.
        softcap = config.final_logit_softcapping
        self._head = head(config, weights, self._embedding, softcap=softcap)
        self._rotary = Rotary(config.rope, config, weights.device)
        self._rotary_local = Rotary(config.rope_local, config, weights.device)
        self._sliding = config.sliding
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
                scale=config.query_pre_attn_scalar**-0.5,
                qkv_bias=config.attention_bias,
                out_bias=config.attention_bias,
                qk_norm=self.qk_norm,
                unit_offset=True,
            ),
            _norm(config, weights, f"{prefix}.pre_feedforward_layernorm"),
            gated_mlp(config, weights, f"{prefix}.mlp"),
            after_attention=_norm(config, weights, f"{prefix}.post_attention_layernorm"),
            after_mlp=_norm(config, weights, f"{prefix}.post_feedforward_layernorm"),
        )

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        caches: list[LayerCache],
        batch: kernels.PagedBatch,
    ) -> Tensor:
        x = kernels.embedding(token_ids, self._embedding, self._embed_scale)
        whole, local = self._rotary(positions), self._rotary_local(positions)
        angles = [local if slides else whole for slides in self._sliding]
        return self._stack(x, angles, caches, batch)


class Gemma3(Gemma2):
    qk_norm = True
