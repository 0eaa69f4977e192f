"""Draws behind a step's hidden states, queued like everything else."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor

import forebay_kernels as kernels
from forebay_engine.gpu.layout import Samples, Sections
from forebay_engine.gpu.sampling import mask
from forebay_engine.gpu.table import RequestTable
from forebay_kernels import SamplingRows
from forebay_kernels.sampling import MARKS, MOST_MARK_KEYS, Wants

#: Of rows that draw with a guide, what may come: by ``seq_id``, ``[1 + guesses, vocab]`` bool.
Allowed = Future[Mapping[int, Tensor]]


class Drawing:
    """For steps of at most ``most`` samples."""

    def __init__(self, table: RequestTable, vocab: int, most: int) -> None:
        device = table.words.device
        self._table, self._vocab = table, vocab
        self._nothing = torch.zeros(most, dtype=torch.int32, device=device)
        self._mark_keys = torch.zeros((most, MOST_MARK_KEYS), dtype=torch.int64, device=device)
        self._mark_counts = torch.zeros(most, dtype=torch.int32, device=device)
        self._no_masks = torch.zeros((1, -(-vocab // 32)), dtype=torch.int32, device=device)

    def begin(self, sections: Sections) -> None:
        """Take what a step tells of its requests, before anything is drawn."""
        if len(sections.changes_at):
            kernels.scatter(self._table.words, sections.changes_at, sections.changes)
        if len(sections.cleared):
            self._table.sampling.counts.index_fill_(0, sections.cleared.long(), 0)

    def draw(
        self, logits: Tensor, sections: Sections, samples: Samples, allowed: Allowed, asked: Wants
    ) -> Tensor:
        """A token for each row of ``logits`` ``[samples, vocab]``, which the next step finds.

        :param asked: by its rows together, beyond a temperature.
        """
        count = len(logits)
        if not count:
            return torch.zeros(0, dtype=torch.int64, device=logits.device)
        rows = SamplingRows(
            table=self._table.sampling,
            requests=sections.sample_places,
            positions=sections.sample_positions,
            guessed=self._nothing[:count],
            mask_lines=sections.sample_masks,
            masks=self._masks(samples, allowed) if samples.masked else self._no_masks,
            mark_keys=self._mark_keys[:count],
            mark_counts=self._mark_counts[:count],
        )
        if asked & MARKS:
            kernels.mark_keys(rows)
        tokens = kernels.sample(logits, rows, asked).tokens
        kernels.remember(
            tokens,
            sections.sample_places,
            sections.sample_positions,
            self._table.last,
            self._table.sampling.tokens,
        )
        return tokens

    def _masks(self, samples: Samples, allowed: Allowed) -> Tensor:
        """Of the rows that have some: waits for the thread that makes them, not for the device."""
        by_guide = allowed.result()
        lines = []
        for row in samples.masked:
            own = by_guide.get(row.seq_id)
            for number in range(1 + len(row.draft)):
                line = mask(row.sampling, None if own is None else own[number], self._vocab)
                if line is None:
                    raise ValueError(f"sequence {row.seq_id}: its guide made no mask")
                lines.append(line)
        device = self._table.words.device
        words = torch.empty(
            (len(lines), len(lines[0])), dtype=torch.int32, pin_memory=device.type == "cuda"
        )
        np.stack(lines, out=words.numpy())
        return words.to(device, non_blocking=True)
