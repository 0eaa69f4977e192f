"""Where the tokens of one step lie in the paged cache: the input every attention shares."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedBatch:
    """Rows of a step, decode rows (one token) first, then prefill chunks; tokens are row after row.

    Host copies of the row lengths lie beside the tensors so that no operator has to wait for the
    device to learn its loop bounds.
    """

    #: First token of each row, and the end: ``rows + 1`` offsets into the step's tokens.
    query_starts: tuple[int, ...]
    #: Tokens of each row that are in the cache once this step has been stored.
    seq_lens: tuple[int, ...]
    #: Rows with one token, which come first.
    num_decodes: int
    #: Physical page of each logical page; what lies past a row's end is never read.
    block_tables: Tensor  # [rows, max_pages] int32
    #: ``seq_lens`` on the device.
    lengths: Tensor  # [rows] int32
    #: The step is a recording that is replayed with other lengths: ``seq_lens`` are then the most
    #: that they can be, and what is computed must follow from ``lengths``.
    replayed: bool = False
    #: Cache slot (page * block_size + offset) of each token; negative: do not store it.
    slots: Tensor  # [tokens] int64
    #: Layers with a window may have pages of their own: where the step's tokens lie there.
    by_window: dict[int | None, PagedBatch] = field(default_factory=dict, repr=False)
    #: What an implementation worked out for this step and reuses in the next layers.
    memo: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_rows(self) -> int:
        return len(self.seq_lens)

    @property
    def num_tokens(self) -> int:
        return self.query_starts[-1]

    def query_len(self, row: int) -> int:
        """Tokens that a row runs in this step."""
        return self.query_starts[row + 1] - self.query_starts[row]

    def within(self, window: int | None) -> PagedBatch:
        """The batch as layers with this window have it."""
        return self.by_window.get(window, self)
