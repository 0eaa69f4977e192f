"""Every operator in plain PyTorch, written to be read: the specification of the fast ones.

All arithmetic is in float32 (float64 for float64 inputs), rounded once to the input's type.

The cache of one layer is two tensors, keys and values, each ``[kv_heads, pages, block_size,
head_dim]``: one head's page is one contiguous run, so a page is gathered with one copy, and the
pages of a row form a contiguous ``[tokens, head_dim]`` matrix for each head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from forebay_kernels.batch import PagedBatch


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * w`` over the last axis; Gemma's form has ``1 + w`` for ``w``.

    Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
    """
    wide = _wide(x)  # [..., dim]
    scale = _wide(weight) + 1.0 if unit_offset else _wide(weight)  # broadcast to [..., dim]
    rms = torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide / rms * scale).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair ``(x[i], x[i + dim/2])`` by its position's angle ``i``.

    Su et al. 2021, https://arxiv.org/abs/2104.09864, in the half-split order of checkpoints.
    """
    half = x.shape[-1] // 2
    a, b = _wide(x[..., :half]), _wide(x[..., half:])  # [tokens, heads, dim/2]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [tokens, 1, dim/2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def silu_mul(x: Tensor) -> Tensor:
    """``silu(gate) * up`` of gate and up side by side: ``[..., 2 n] -> [..., n]``."""
    gate, up = _wide(x).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def gelu_tanh_mul(x: Tensor) -> Tensor:
    """``gelu(gate) * up`` with GELU's tanh form, ``[..., 2 n] -> [..., n]``.

    ``gelu(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))``, https://arxiv.org/abs/1606.08415.
    """
    gate, up = _wide(x).chunk(2, dim=-1)
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


def paged_attention(
    query: Tensor,  # [tokens, heads, head_dim]
    keys: Tensor,  # [kv_heads, pages, block_size, head_dim]
    values: Tensor,  # [kv_heads, pages, block_size, head_dim]
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [heads]
) -> Tensor:
    """Causal attention of each row's tokens to the row's cached tokens, found by its block table.

    ``softmax(cap(scale * q k^T)) v`` with ``cap(s) = softcap * tanh(s / softcap)``; a token at
    position ``p`` sees positions ``max(0, p - window + 1) .. p``. Query head ``h`` reads KV head
    ``h // (heads / kv_heads)``. A row of length 0 gives zeros. ``sinks`` are scores of a token more
    in each head, whose value is 0 (https://arxiv.org/abs/2508.10925).
    """
    out = torch.zeros_like(query)
    group = query.shape[1] // keys.shape[0]
    for row in range(batch.num_rows):
        length, count = batch.seq_lens[row], batch.query_len(row)
        if length == 0:
            continue
        tokens = slice(batch.query_starts[row], batch.query_starts[row + 1])
        k = _row_cache(keys, batch, row).repeat_interleave(group, dim=0)  # [heads, length, dim]
        v = _row_cache(values, batch, row).repeat_interleave(group, dim=0)
        q = _wide(query[tokens]).transpose(0, 1)  # [heads, count, dim]
        scores = scale * (q @ k.transpose(1, 2))  # [heads, count, length]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores.masked_fill_(~visible(length - count, length, window, query.device), -math.inf)
        if sinks is not None:
            more = _wide(sinks).view(-1, 1, 1).expand(-1, count, 1)
            scores = torch.cat((scores, more), dim=-1)
        likely = scores.softmax(-1)[..., :length]
        out[tokens] = (likely @ v).transpose(0, 1).to(out.dtype)
    return out


def visible(start: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """Which of positions ``0 .. length`` each of ``start .. length`` sees: ``[count, length]``."""
    position = torch.arange(start, length, device=device).unsqueeze(1)
    other = torch.arange(length, device=device).unsqueeze(0)
    seen = other <= position
    return seen if window is None else seen & (other > position - window)


def _row_cache(cache: Tensor, batch: PagedBatch, row: int) -> Tensor:
    length, block_size = batch.seq_lens[row], cache.shape[2]
    pages = batch.block_tables[row, : -(-length // block_size)].long()
    return _wide(cache[:, pages].flatten(1, 2)[:, :length])  # [kv_heads, length, head_dim]
