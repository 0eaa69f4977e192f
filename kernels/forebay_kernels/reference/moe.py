"""Mixtures of experts, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from forebay_kernels.reference.layers import silu_mul, wide


def route(logits: Tensor, top_k: int, *, normalised: bool) -> tuple[Tensor, Tensor]:
    """Each token's ``top_k`` likeliest experts and their weights: ``[tokens, experts]`` gives both.

    ``softmax(logits)`` of the chosen, ``[tokens, top_k]`` float32, divided by its sum over them if
    ``normalised``; and which they are, ``[tokens, top_k]`` int32, the likeliest first, of equals
    the one with the lower number. Shazeer et al. 2017, https://arxiv.org/abs/1701.06538.
    """
    likely = wide(logits).softmax(-1)
    weight, chosen = likely.sort(dim=-1, descending=True, stable=True)
    weight, chosen = weight[:, :top_k], chosen[:, :top_k]
    if normalised:
        weight = weight / weight.sum(-1, keepdim=True)
    return weight.float(), chosen.int()


def experts(
    x: Tensor,  # [tokens, hidden]
    weight: Tensor,  # [tokens, top_k]
    chosen: Tensor,  # [tokens, top_k]
    gate_up: Tensor,  # [experts, 2 inner, hidden]
    down: Tensor,  # [experts, hidden, inner]
) -> Tensor:
    """Of each token ``sum_k weight[k] * down[e] silu_mul(gate_up[e] x)``, ``e = chosen[k]``."""
    found = torch.zeros_like(wide(x))
    for expert, (first, second) in enumerate(zip(gate_up, down, strict=True)):
        token, k = (chosen == expert).nonzero(as_tuple=True)
        inner = silu_mul(wide(x[token]) @ wide(first).T)
        found.index_add_(0, token, (inner @ wide(second).T) * wide(weight)[token, k, None])
    return found.to(x.dtype)
