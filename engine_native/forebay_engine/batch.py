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
    #: The last token of each row that wants a sample.
    sample_at: Tensor  # [samples] int64
    paged: PagedBatch


def build_batch(plan: StepPlan, block_size: int, device: torch.device) -> StepBatch:
    """Lay out the plan's tokens; ValueError where its rows contradict each other."""
    rows = plan.rows
    for row in rows:
        _check(row, block_size)
    num_decodes = next((i for i, row in enumerate(rows) if row.count != 1), len(rows))
    tokens = [token for row in rows for token in row.token_ids[row.start : row.start + row.count]]
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
    samples = [end - 1 for row, end in zip(rows, ends[1:], strict=True) if row.sample]
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


def _check(row: Row, block_size: int) -> None:
    end = row.start + row.count
    if row.count < 1 or end > len(row.token_ids):
        raise ValueError(
            f"sequence {row.seq_id}: tokens {row.start}..{end} of {len(row.token_ids)} planned"
        )
    if end > len(row.block_table) * block_size:
        raise ValueError(
            f"sequence {row.seq_id}: {end} tokens do not fit its {len(row.block_table)} pages"
        )
    if row.sample and end != len(row.token_ids):
        raise ValueError(f"sequence {row.seq_id}: a sample is asked before its last token")
