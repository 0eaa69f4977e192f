"""The operators of ``forebay_kernels`` by compiled kernels, for inputs that ``takes`` them.

Each is what ``reference`` says, with sums in float32; attention's probabilities are not rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forebay_kernels.batch import PagedBatch
from forebay_kernels.cpu.library import (
    AttentionArgs,
    GateArgs,
    NormArgs,
    QkvArgs,
    ResidualArgs,
    available,
    library,
)
from forebay_kernels.cpu.tape import call, empty

_SILU, _GELU_TANH = 0, 1


def takes_rows(x: Tensor) -> bool:
    """Whether the operators on rows take this: ``[rows, width]`` or more axes, without gaps."""
    return available(x) and x.is_contiguous()


def takes_cache(cache: Tensor, dim: int) -> bool:
    """Whether attention takes this cache: a head's elements must fill whole words."""
    return takes_rows(cache) and dim * cache.element_size() % 4 == 0


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight``: ``[width]`` float32."""
    out = empty(x.shape, x.dtype)
    width = x.shape[-1]
    rows = x.numel() // width
    args = NormArgs(x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, width, eps)
    call(library().norm, args, x.element_size(), (x,), (out,))
    return out


def add_rms_norm(
    x: Tensor, added: Tensor, inner: Tensor | None, outer: Tensor, eps: float
) -> Tensor:
    out = empty(x.shape, x.dtype)
    args = ResidualArgs(
        x.data_ptr(),
        added.data_ptr(),
        None if inner is None else inner.data_ptr(),
        outer.data_ptr(),
        out.data_ptr(),
        len(x),
        x.shape[-1],
        eps,
    )
    call(library().add_and_norm, args, x.element_size(), (x, added), (x, out))
    return out


def silu_mul(x: Tensor) -> Tensor:
    return _gate(x, _SILU)


def gelu_tanh_mul(x: Tensor) -> Tensor:
    return _gate(x, _GELU_TANH)


def _gate(x: Tensor, kind: int) -> Tensor:
    *rows, both = x.shape
    width = both // 2
    out = empty((*rows, width), x.dtype)
    args = GateArgs(x.data_ptr(), out.data_ptr(), x.numel() // both, width, kind)
    call(library().gate, args, x.element_size(), (x,), (out,))
    return out


def argmax(x: Tensor) -> Tensor:
    """``[rows, width]``, rows at any distance."""
    found = torch.empty(len(x), dtype=torch.int64)
    library().argmax(
        x.element_size(), x.data_ptr(), x.stride(0), len(x), x.shape[1], found.data_ptr()
    )
    return found


def prepare_qkv(
    qkv: Tensor,  # [tokens, heads + 2 kv_heads, dim]
    kv_heads: int,
    norm: Tensor | None,  # [heads + kv_heads, dim] float32
    eps: float,
    cos: Tensor | None,  # [tokens, half] float32
    sin: Tensor | None,  # [tokens, half] float32
    keys: Tensor,  # [kv_heads, pages, block_size, dim]
    values: Tensor,  # [kv_heads, pages, block_size, dim]
    slots: Tensor,  # [tokens] int64
) -> None:
    tokens, heads, dim = qkv.shape
    args = QkvArgs(
        qkv.data_ptr(),
        qkv.stride(0),
        None if norm is None else norm.data_ptr(),
        None if cos is None else cos.data_ptr(),
        None if sin is None else sin.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        slots.data_ptr(),
        tokens,
        heads - 2 * kv_heads,
        kv_heads,
        dim,
        0 if cos is None else cos.shape[1],
        keys.shape[1] * keys.shape[2],
        eps,
    )
    turn = () if cos is None or sin is None else (cos, sin)
    call(library().prepare_qkv, args, qkv.element_size(), (qkv, *turn, slots), (qkv,))


def paged_attention(
    query: Tensor,  # [tokens, heads, dim], tokens at any distance
    keys: Tensor,  # [kv_heads, pages, block_size, dim]
    values: Tensor,  # [kv_heads, pages, block_size, dim]
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    tokens, heads, dim = query.shape
    kv_heads, pages, block_size, _ = keys.shape
    starts, lengths = rows_of(batch)
    out = empty((tokens, heads, dim), query.dtype)
    args = AttentionArgs(
        query.data_ptr(),
        query.stride(0),
        out.data_ptr(),
        heads * dim,
        keys.data_ptr(),
        values.data_ptr(),
        batch.block_tables.data_ptr(),
        batch.block_tables.stride(0),
        starts.data_ptr(),
        lengths.data_ptr(),
        batch.num_rows,
        heads,
        kv_heads,
        dim,
        pages,
        block_size,
        window or 0,
        scale,
        softcap or 0.0,
    )
    reads = (query, batch.block_tables, starts, lengths)
    call(library().attention, args, query.element_size(), reads, (out,))
    return out


def rows_of(batch: PagedBatch) -> tuple[Tensor, Tensor]:
    """Where the batch's rows begin, and their lengths, as attention reads them: int64."""
    found: tuple[Tensor, Tensor] | None = batch.memo.get("cpu")
    if found is None:
        found = torch.tensor(batch.query_starts), batch.lengths.long()
        batch.memo["cpu"] = found
    return found
