"""Norms, rotation, activations and the cache write, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """In the type that references compute in: float32, or float64 as it came."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * w`` over the last axis; Gemma's form has ``1 + w`` for ``w``.

    Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
    """
    wider = wide(x)  # [..., dim]
    scale = wide(weight) + 1.0 if unit_offset else wide(weight)  # broadcast to [..., dim]
    rms = torch.sqrt(wider.pow(2).mean(-1, keepdim=True) + eps)
    return (wider / rms * scale).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair ``(x[i], x[i + dim/2])`` by its position's angle ``i``.

    Su et al. 2021, https://arxiv.org/abs/2104.09864, in the half-split order of checkpoints.
    """
    half = x.shape[-1] // 2
    a, b = wide(x[..., :half]), wide(x[..., half:])  # [tokens, heads, dim/2]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [tokens, 1, dim/2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def silu_mul(x: Tensor) -> Tensor:
    """``silu(gate) * up`` of gate and up side by side: ``[..., 2 n] -> [..., n]``."""
    gate, up = wide(x).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def gelu_tanh_mul(x: Tensor) -> Tensor:
    """``gelu(gate) * up`` with GELU's tanh form, ``[..., 2 n] -> [..., n]``.

    ``gelu(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))``, https://arxiv.org/abs/1606.08415.
    """
    gate, up = wide(x).chunk(2, dim=-1)
    inner = math.sqrt(2.0 / math.pi) * (gate + 0.044715 * gate.pow(3))
    return (0.5 * gate * (1.0 + torch.tanh(inner)) * up).to(x.dtype)


def kv_store(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Write each token's key and value into its slot; a negative slot is skipped.

    A captured graph pads its batch with slot -1; written as an index it would be the last slot.
    """
    block_size = keys.shape[2]
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        page, offset = divmod(slot, block_size)
        keys[:, page, offset] = key[token]  # [kv_heads, head_dim]
        values[:, page, offset] = value[token]
