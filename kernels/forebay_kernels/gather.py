"""Which pages the eager attention reads together: worked out once a step, used by every layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from forebay_kernels.batch import PagedBatch
from forebay_kernels.reference import visible, wide

#: Keys gathered at once. Up to 32 MiB glibc reuses freed memory (a fresh 67 MB costs 36 ms in page
#: faults); 4 MiB also stays in the cache until it is read again.
GATHER_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Gather:
    """One prefill chunk, or decode rows of like length, and the slots they see in one layer."""

    #: The rows' tokens in the step.
    tokens: slice | Tensor
    rows: int
    #: Pages, as many for each row; None: they are neighbours from ``first_page`` on.
    pages: Tensor | None  # [rows * pages_per_row] int64
    first_page: int
    pages_per_row: int
    #: Slots of the pages to use: a single row is cut to what it sees, several are masked.
    slots: slice
    #: Slots that hold no token of their row, to be cleared: they may hold anything, NaN too, and
    #: a probability of 0 does not remove a NaN.
    stale: Tensor | None  # [n] int64, into [rows * slots of a row]
    #: Which slots are seen; None: all.
    mask: Tensor | None  # [rows, 1, slots] for decode rows, [1, count, slots] for a chunk

    def read(self, cache: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
        """The slots of every row, times ``scale``: ``[kv_heads, rows, slots, head_dim]``."""
        heads, _, block_size, dim = cache.shape
        if self.pages is None:
            found = cache.narrow(1, self.first_page, self.pages_per_row)
        else:
            found = cache.index_select(1, self.pages)
        if scale is not None:
            found = wide(found) * scale.view(-1, 1, 1, 1)
        found = found.to(dtype)
        if self.stale is not None:  # only where slots were gathered: ``found`` is a copy
            found.view(heads, -1, dim).index_fill_(1, self.stale, 0)
        found = found.view(heads, self.rows, self.pages_per_row * block_size, dim)
        return found[:, :, self.slots]


def plan_gathers(batch: PagedBatch, cache: Tensor, window: int | None) -> list[Gather]:
    """The gathers of all rows for layers with this window.

    ``cache`` (keys or values) gives the shape, the item size and the device.
    """
    heads, _, block_size, dim = cache.shape
    page_bytes = heads * block_size * dim * cache.element_size()
    spans = [_Span.of(batch, row, block_size, window) for row in range(batch.num_rows)]
    decodes = batch.num_decodes
    limit = max(1, GATHER_BYTES // page_bytes)
    groups = _alike([span for span in spans[:decodes] if span.length], limit)
    device = cache.device
    parts = [
        _together(group, block_size, device)
        if len(group) > 1
        else _alone(group[0], block_size, window, device)
        for group in groups
    ]
    return parts + [_alone(span, block_size, window, device) for span in spans[decodes:]]


@dataclass(frozen=True, slots=True)
class _Span:
    """What one row sees: positions ``low .. length``."""

    tokens: slice
    count: int
    low: int
    length: int
    first: int
    #: The pages that hold them; position ``first * block_size`` is the first slot.
    pages: list[int]

    @classmethod
    def of(cls, batch: PagedBatch, row: int, block_size: int, window: int | None) -> _Span:
        length, count = batch.seq_lens[row], batch.query_len(row)
        low = 0 if window is None else max(0, length - count - window + 1)
        first, end = low // block_size, -(-length // block_size)
        pages = batch.block_tables[row, first:end].tolist()
        tokens = slice(batch.query_starts[row], batch.query_starts[row + 1])
        return cls(tokens, count, low, length, first, pages)


def _alike(spans: list[_Span], limit: int) -> Iterator[list[_Span]]:
    """Groups of at most ``limit`` pages in which no row is padded to more than twice its pages."""
    group: list[_Span] = []
    for span in sorted(spans, key=lambda s: len(s.pages), reverse=True):
        most = len(group[0].pages) if group else 0
        if group and (2 * len(span.pages) < most or (len(group) + 1) * most > limit):
            yield group
            group = []
        group.append(span)
    if group:
        yield group


def _alone(span: _Span, block_size: int, window: int | None, device: torch.device) -> Gather:
    start, first = span.first * block_size, span.pages[0]
    neighbours = span.pages == list(range(first, first + len(span.pages)))
    seen = visible(span.length - span.count, span.length, window, device)
    return Gather(
        tokens=span.tokens,
        rows=1,
        pages=None if neighbours else torch.tensor(span.pages, device=device),
        first_page=first,
        pages_per_row=len(span.pages),
        slots=slice(span.low - start, span.length - start),
        stale=None,
        mask=seen[None, :, span.low :] if span.count > 1 else None,
    )


def _together(group: list[_Span], block_size: int, device: torch.device) -> Gather:
    """Rows padded with their own first page: its tokens are the row's own, and masked."""
    most = max(len(span.pages) for span in group)
    position = torch.arange(most * block_size)
    low = torch.tensor([span.low - span.first * block_size for span in group])
    end = torch.tensor([span.length - span.first * block_size for span in group])
    full = torch.tensor([len(span.pages) * block_size for span in group])
    mask = (position >= low[:, None]) & (position < end[:, None])  # [rows, slots]
    # The last page's end; where it is also the first, the padding has that end again.
    filled = (position >= full[:, None]) & (full[:, None] > block_size)
    stale = (position >= end[:, None]) & ~filled
    pages = [span.pages + span.pages[:1] * (most - len(span.pages)) for span in group]
    starts = [span.tokens.start for span in group]
    return Gather(
        tokens=torch.tensor(starts, device=device),
        rows=len(group),
        pages=torch.tensor(pages, device=device).flatten(),
        first_page=0,
        pages_per_row=most,
        slots=slice(None),
        stale=stale.flatten().nonzero().flatten().to(device),
        mask=mask.unsqueeze(1).to(device),
    )
