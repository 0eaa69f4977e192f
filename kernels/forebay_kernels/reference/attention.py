"""Attention over the paged cache, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from forebay_kernels.batch import PagedBatch
from forebay_kernels.reference.layers import wide


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
    key_scale: Tensor | None = None,  # [kv_heads] float32
    value_scale: Tensor | None = None,  # [kv_heads] float32
) -> Tensor:
    """Causal attention of each row's tokens to the row's cached tokens, found by its block table.

    ``softmax(cap(scale * q k^T)) v`` with ``cap(s) = softcap * tanh(s / softcap)``; a token at
    position ``p`` sees positions ``max(0, p - window + 1) .. p``. Query head ``h`` reads KV head
    ``h // (heads / kv_heads)``. A row of length 0 gives zeros. ``sinks`` are scores of a token more
    in each head, whose value is 0 (https://arxiv.org/abs/2508.10925). With scales, as an FP8 cache
    has, a key is ``key_scale`` times what is stored, and a value ``value_scale`` times.
    """
    out = torch.zeros_like(query)
    group = query.shape[1] // keys.shape[0]
    for row in range(batch.num_rows):
        length, count = batch.seq_lens[row], batch.query_len(row)
        if length == 0:
            continue
        tokens = slice(batch.query_starts[row], batch.query_starts[row + 1])
        k = _row_cache(keys, key_scale, batch, row)  # [kv_heads, length, dim]
        v = _row_cache(values, value_scale, batch, row)
        k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))  # [heads, length, dim]
        q = wide(query[tokens]).transpose(0, 1)  # [heads, count, dim]
        scores = scale * (q @ k.transpose(1, 2))  # [heads, count, length]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores.masked_fill_(~visible(length - count, length, window, query.device), -math.inf)
        if sinks is not None:
            more = wide(sinks).view(-1, 1, 1).expand(-1, count, 1)
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


def _row_cache(cache: Tensor, scale: Tensor | None, batch: PagedBatch, row: int) -> Tensor:
    length, block_size = batch.seq_lens[row], cache.shape[2]
    pages = batch.block_tables[row, : -(-length // block_size)].long()
    found = wide(cache[:, pages].flatten(1, 2)[:, :length])  # [kv_heads, length, head_dim]
    return found if scale is None else found * scale.view(-1, 1, 1)
