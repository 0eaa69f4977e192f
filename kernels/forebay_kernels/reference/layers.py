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


def select_rms_norm(hidden: Tensor, at: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm`` of rows ``at``: ``[tokens, n] -> [rows, n]``; zeros where ``at`` is negative."""
    normed = rms_norm(hidden[at.clamp(min=0)], weight, eps)
    return normed.masked_fill(at.unsqueeze(1) < 0, 0.0)


def add_rms_norm(
    x: Tensor, added: Tensor, inner: Tensor | None, outer: Tensor, eps: float
) -> Tensor:
    """``x += added``, or its norm if ``inner`` is a weight, in place; the norm of ``x`` comes back.

    ``[tokens, n]``; weights ``[n]``. The stream ``x`` is rounded before it is normed.
    """
    value = wide(added)
    x += value if inner is None else rms_norm(value, inner, eps)
    return rms_norm(x, outer, eps)


def embedding(token_ids: Tensor, weight: Tensor, scale: float | None = None) -> Tensor:
    """Row ``token_ids[t]`` of ``weight`` for each token, times ``scale``: ``[tokens, n]``.

    ``scale`` is rounded to the weights' type by whoever gives it, as Gemma's checkpoints expect.
    """
    rows = weight[token_ids]
    return rows if scale is None else (wide(rows) * scale).to(weight.dtype)


def rotary_angles(positions: Tensor, frequency: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """``factor * cos`` and ``factor * sin`` of each position's angles: ``[tokens, dim/2]``.

    An angle is ``positions[t] * frequency[i]`` radians, rounded as ``frequency`` is.
    """
    angle = positions.to(frequency.dtype).unsqueeze(1) * frequency
    return angle.cos() * factor, angle.sin() * factor


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


def kv_store(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None:
    """Write each token's key and value into its slot; a negative slot is skipped.

    A captured graph pads its batch with slot -1; written as an index it would be the last slot.
    A cache with scales, ``[kv_heads]``, holds ``x / scale`` as far as its type reaches.
    """
    block_size = keys.shape[2]
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        page, offset = divmod(slot, block_size)
        keys[:, page, offset] = _as_stored(key[token], key_scale, keys.dtype)
        values[:, page, offset] = _as_stored(value[token], value_scale, values.dtype)


def _as_stored(heads: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``[kv_heads, head_dim]`` as the cache holds it."""
    if scale is None:
        return heads.to(dtype)
    most = torch.finfo(dtype).max  # not every torch saturates: some give NaN
    return (wide(heads) / wide(scale).unsqueeze(1)).clamp(-most, most).to(dtype)


def prepare_qkv(
    qkv: Tensor,  # [tokens, heads + 2 kv_heads, head_dim]
    kv_heads: int,
    norm: Tensor | None,  # [heads + kv_heads, head_dim]
    eps: float,
    angles: tuple[Tensor, Tensor] | None,  # cos and sin: [tokens, rotated / 2]
    keys: Tensor,  # [kv_heads, pages, block_size, head_dim]
    values: Tensor,  # [kv_heads, pages, block_size, head_dim]
    slots: Tensor,  # [tokens] int64
    key_scale: Tensor | None = None,  # [kv_heads]
    value_scale: Tensor | None = None,  # [kv_heads]
) -> Tensor:
    """``rms_norm`` and ``rope`` of queries and keys, ``kv_store`` of keys and values: the queries.

    ``[tokens, heads, head_dim]``. Values of a head past ``rotated`` are not rotated.
    """
    heads = qkv.shape[1] - 2 * kv_heads
    x, value = wide(qkv[:, : heads + kv_heads]), qkv[:, heads + kv_heads :]
    if norm is not None:
        x = rms_norm(x, norm, eps)
    if angles is not None:
        rotated = 2 * angles[0].shape[1]
        x = torch.cat((rope(x[..., :rotated], *angles), x[..., rotated:]), dim=-1)
    kv_store(x[:, heads:], value, keys, values, slots, key_scale, value_scale)
    return x[:, :heads].to(qkv.dtype)
