"""The tensors that every step reads, at places in memory that never change."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import forebay_kernels as kernels
from forebay_engine.gpu.layout import Sections, Sizes
from forebay_engine.gpu.table import RequestTable
from forebay_kernels import PagedBatch

#: Words of the table that may change with the one copy: pages of 512 prompts of 8,192 tokens.
_CHANGES = 1 << 17


@dataclass(frozen=True, slots=True)
class Lengths:
    """What launches depend on, known to the host."""

    #: First token of each row, and the end.
    query_starts: tuple[int, ...]
    #: Tokens of each row that are in the cache after the step; of a replay the most there may be.
    seq_lens: tuple[int, ...]
    num_decodes: int
    replayed: bool = False


class StepInputs:
    """For steps of at most so many tokens."""

    def __init__(
        self, table: RequestTable, windows: Items[int | None], block_size: int, tokens: int
    ) -> None:
        rows = table.size
        groups, pages = table.tables.shape[1:]
        device = table.words.device

        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.most_tokens = tokens
        self._table, self._windows, self._block_size = table, windows, block_size
        most = Sizes(rows, tokens, tokens, tokens, rows, _CHANGES)
        self._words = zeros(most.words)
        self._token_ids = zeros(tokens, dtype=torch.int64)
        self._positions = zeros(tokens, dtype=torch.int64)
        self._lengths = zeros(rows)
        self._block_tables = zeros(groups, rows, pages)
        # A group's slots begin at a multiple of 16 bytes, whatever the number of tokens.
        self._slots = zeros(groups, tokens + tokens % 2, dtype=torch.int64)

    def send(self, words: Tensor, sizes: Sizes) -> Sections:
        """Queue the one copy of a step; its changes go by themselves where they are very many."""
        if sizes.changes <= _CHANGES:
            self._words[: len(words)].copy_(words, non_blocking=True)
            return self.sections(sizes)
        front = replace(sizes, changes=0)
        self._words[: front.words].copy_(words[: front.words], non_blocking=True)
        whole = Sections.of(words.to(self._words.device, non_blocking=True), sizes)
        return replace(self.sections(front), changes_at=whole.changes_at, changes=whole.changes)

    def sections(self, sizes: Sizes) -> Sections:
        return Sections.of(self._words, sizes)

    def derive(self, sections: Sections, lengths: Lengths) -> tuple[Tensor, Tensor, PagedBatch]:
        """Token ids, positions, and where the step's tokens lie."""
        rows, tokens = len(sections.places), len(sections.tokens)
        token_ids, positions = self._token_ids[:tokens], self._positions[:tokens]
        kernels.step_inputs(
            sections.places,
            sections.starts,
            sections.query_starts,
            sections.tokens,
            self._table.last,
            self._table.tables,
            self._block_size,
            token_ids=token_ids,
            positions=positions,
            lengths=self._lengths[:rows],
            block_tables=self._block_tables[:, :rows],
            slots=self._slots[:, :tokens],
        )
        groups = [
            PagedBatch(
                query_starts=lengths.query_starts,
                seq_lens=lengths.seq_lens,
                num_decodes=lengths.num_decodes,
                block_tables=self._block_tables[group, :rows],
                lengths=self._lengths[:rows],
                slots=self._slots[group, :tokens],
                replayed=lengths.replayed,
            )
            for group in range(len(self._windows))
        ]
        groups[0].by_window.update(zip(self._windows[1:], groups[1:], strict=True))
        return token_ids, positions, groups[0]
