"""Mixtures of experts in the Llama family: Mixtral and Qwen 3 MoE.

A router sends each token to a few of a layer's MLPs: https://arxiv.org/abs/2401.04088 (Mixtral),
https://arxiv.org/abs/2505.09388 (Qwen 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

import forebay_kernels as kernels
from forebay_engine.hf_config import ModelConfig
from forebay_engine.layers import GatedMlp, Part, gated_mlp
from forebay_engine.linear import Linear
from forebay_engine.models.llama import Llama
from forebay_engine.weights import Weights
from forebay_kernels.matrix import Dense, Matrix, concatenate


class Experts:
    """``sum(weight[e] * expert[e](x))`` over the ``top_k`` experts that the router likes best."""

    def __init__(
        self, router: Linear, experts: list[GatedMlp], *, top_k: int, normalised: bool
    ) -> None:
        self._router, self._experts = router, experts
        self._top_k = top_k
        self._normalised = normalised

    def __call__(self, x: Tensor) -> Tensor:
        likely = self._router(x).float().softmax(-1)  # [tokens, experts]
        weight, chosen = likely.topk(self._top_k)  # [tokens, top_k]
        if self._normalised:
            weight = weight / weight.sum(-1, keepdim=True)
        # Sorted by expert, so that each one that is chosen is read once, for all of its tokens.
        chosen = chosen.flatten()
        order = chosen.argsort(stable=True)  # [tokens * top_k]
        token = order // self._top_k
        weight = weight.flatten()[order].to(x.dtype).unsqueeze(1)
        out = torch.zeros_like(x)
        start = 0
        for expert, count in enumerate(torch.bincount(chosen).tolist()):
            if count:
                part = slice(start, start + count)
                found = self._experts[expert](x[token[part]])
                out.index_add_(0, token[part], found.mul_(weight[part]))
                start += count
        return out


class PackedExperts:
    """The same by kernels that compute all experts together, without asking the device of any."""

    def __init__(
        self,
        router: Linear,
        experts: Callable[[Tensor, Tensor, Tensor], Tensor],
        *,
        top_k: int,
        normalised: bool,
    ) -> None:
        self._router, self._experts = router, experts
        self._top_k, self._normalised = top_k, normalised

    def __call__(self, x: Tensor) -> Tensor:
        weight, chosen = kernels.route(self._router(x), self._top_k, normalised=self._normalised)
        return self._experts(x, weight, chosen)


class Mixtral(Llama):
    #: In the layer; and of an expert gate, up and down.
    block: ClassVar[str] = "block_sparse_moe"
    names: ClassVar[tuple[str, str, str]] = ("w1", "w3", "w2")

    def _mlp(self, config: ModelConfig, weights: Weights, index: int) -> Part:
        return self._experts(
            config, weights, index, inner=config.intermediate_size, normalised=True
        )

    def _experts(
        self, config: ModelConfig, weights: Weights, index: int, *, inner: int, normalised: bool
    ) -> Part:
        """A layer's experts, stored one by one, or as two tensors under transformers' names."""
        count = config.data.get("num_local_experts") or config.data["num_experts"]
        layer, outer = f"model.layers.{index}", config.hidden_size
        stacked = f"{layer}.mlp.experts"
        if f"{stacked}.gate_up_proj" in weights:
            block = f"{layer}.mlp"
            gate_up = weights.stacked(f"{stacked}.gate_up_proj", count, 2 * inner, outer)
            down = weights.stacked(f"{stacked}.down_proj", count, outer, inner)
        else:
            block = f"{layer}.{self.block}"
            gate, up, back = self.names
            each = [f"{block}.experts.{i}" for i in range(count)]
            gate_up = [
                concatenate(
                    [weights.matrix(f"{e}.{name}", inner, outer) for name in (gate, up)],
                    weights.dtype,
                )
                for e in each
            ]
            down = [weights.matrix(f"{e}.{back}", outer, inner) for e in each]
        # As stored, whatever the others are: rounded, it would send tokens to other experts.
        router = Linear(Dense(weights.take(f"{block}.gate.weight", count, outer)))
        mixture = _mixture(
            config, router, gate_up, down, dtype=weights.dtype, normalised=normalised
        )
        # Of the others the host has to know which experts are chosen.
        self.replayable &= isinstance(mixture, PackedExperts)
        return mixture


def _mixture(
    config: ModelConfig,
    router: Linear,
    gate_up: list[Matrix],
    down: list[Matrix],
    *,
    dtype: torch.dtype,
    normalised: bool,
) -> Part:
    top_k: int = config.data["num_experts_per_tok"]
    if config.hidden_act == "silu":
        packed = kernels.pack_experts(gate_up, down, dtype)
        if packed is not None:
            return PackedExperts(router, packed, top_k=top_k, normalised=normalised)
    experts = [
        GatedMlp(Linear(one), Linear(other), config.hidden_act)
        for one, other in zip(gate_up, down, strict=True)
    ]
    return Experts(router, experts, top_k=top_k, normalised=normalised)


class Qwen3Moe(Mixtral):
    qk_norm = True
    block = "mlp"
    names = ("gate_proj", "up_proj", "down_proj")

    def _mlp(self, config: ModelConfig, weights: Weights, index: int) -> Part:
        data = config.data
        dense = index in (data.get("mlp_only_layers") or ())
        if dense or (index + 1) % data.get("decoder_sparse_step", 1):
            return gated_mlp(config, weights, f"model.layers.{index}.mlp")
        return self._experts(
            config,
            weights,
            index,
            inner=data["moe_intermediate_size"],
            normalised=data.get("norm_topk_prob", False),
        )
