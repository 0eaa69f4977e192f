"""The tensors of one step, built from its plan."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from forebay_engine.step import Row, StepPlan
from forebay_kernels import PagedBatch


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What the model runs on, tokens row after row in the plan's order."""

    token_ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64
    #: Of each row that wants a sample, the last known token and the guesses behind it.
    sample_at: Tensor  # [samples] int64
    paged: PagedBatch


def build_batch(plan: StepPlan, block_size: int, device: torch.device) -> StepBatch:
    """Lay out the plan's tokens; ValueError where its rows contradict each other."""
    rows = plan.rows
    for row in rows:
        _check(row, block_size)
    num_decodes = next((i for i, row in enumerate(rows) if row.count != 1), len(rows))
    tokens = [token for row in rows for token in _tokens(row)]
    positions = [p for row in rows for p in range(row.start, row.start + row.count)]
    slots = [
        row.block_table[p // block_size] * block_size + p % block_size
        for row in rows
        for p in range(row.start, row.start + row.count)
    ]
    ends = tuple(accumulate((row.count for row in rows), initial=0))
    lengths = tuple(row.start + row.count for row in rows)
    widest = max(len(row.block_table) for row in rows)
    tables = [list(row.block_table) + [0] * (widest - len(row.block_table)) for row in rows]
    samples = [
        place
        for row, end in zip(rows, ends[1:], strict=True)
        if row.sample
        for place in range(end - 1 - len(row.draft), end)
    ]
    return StepBatch(
        token_ids=torch.tensor(tokens, device=device),
        positions=torch.tensor(positions, device=device),
        sample_at=torch.tensor(samples, dtype=torch.int64, device=device),
        paged=PagedBatch(
            query_starts=ends,
            seq_lens=lengths,
            num_decodes=num_decodes,
            block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
            lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
            slots=torch.tensor(slots, device=device),
        ),
    )


def _tokens(row: Row) -> list[int]:
    known = list(row.token_ids[row.start : row.start + row.count])
    return [*known, *row.draft]


def _check(row: Row, block_size: int) -> None:
    end, there = row.start + row.count, len(row.token_ids) + len(row.draft)
    if row.count < 1 or end > there:
        raise ValueError(f"sequence {row.seq_id}: tokens {row.start}..{end} of {there} planned")
    if row.draft and (not row.sample or row.count <= len(row.draft)):
        raise ValueError(f"sequence {row.seq_id}: guesses do not follow its last token")
    if end > len(row.block_table) * block_size:
        raise ValueError(
            f"sequence {row.seq_id}: {end} tokens do not fit its {len(row.block_table)} pages"
        )
    if row.sample and end != there:
        raise ValueError(f"sequence {row.seq_id}: a sample is asked before its last token")
