"""The tensors of one step, built from its plan."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from forebay_engine.step import Pooled, Row, StepPlan
from forebay_kernels import PagedBatch


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What the model runs on, tokens row after row in the plan's order."""

    token_ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64
    #: Of each row that wants a sample, the last known token and the guesses behind it.
    sample_at: Tensor  # [samples] int64
    paged: PagedBatch


def build_batch(
    plan: StepPlan,
    block_size: int,
    device: torch.device,
    windows: Items[int | None] = (None,),
) -> StepBatch:
    """Lay out the plan's tokens; ValueError where its rows contradict each other.

    :param windows: of the groups of layers that have block tables of their own, in their order.
    """
    rows = plan.rows
    for row in rows:
        check_row(row, block_size)
    num_decodes = next((i for i, row in enumerate(rows) if row.count != 1), len(rows))
    tokens = [token for row in rows for token in _tokens(row)]
    positions = [p for row in rows for p in range(row.start, row.start + row.count)]
    ends = tuple(accumulate((row.count for row in rows), initial=0))
    lengths = tuple(row.start + row.count for row in rows)
    samples = [
        place
        for row, end in zip(rows, ends[1:], strict=True)
        if row.sample
        for place in range(end - 1 - len(row.draft), end)
    ]
    groups = [
        PagedBatch(
            query_starts=ends,
            seq_lens=lengths,
            num_decodes=num_decodes,
            block_tables=torch.tensor(_tables(rows, group), dtype=torch.int32, device=device),
            lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
            slots=torch.tensor(_slots(rows, group, block_size), device=device),
        )
        for group in range(len(windows))
    ]
    groups[0].by_window.update(zip(windows[1:], groups[1:], strict=True))
    return StepBatch(
        token_ids=torch.tensor(tokens, device=device),
        positions=torch.tensor(positions, device=device),
        sample_at=torch.tensor(samples, dtype=torch.int64, device=device),
        paged=groups[0],
    )


def _tables(rows: Items[Row], group: int) -> list[list[int]]:
    """Pages of each row, as many for each; what no token sees is page 0, and never read."""
    tables = [row.block_tables[group] for row in rows]
    widest = max(len(table) for table in tables)
    return [[max(0, page) for page in t] + [0] * (widest - len(t)) for t in tables]


def _slots(rows: Items[Row], group: int, block_size: int) -> list[int]:
    """Where the keys and values of each of the step's tokens go."""
    return [
        row.block_tables[group][p // block_size] * block_size + p % block_size
        for row in rows
        for p in range(row.start, row.start + row.count)
    ]


def _tokens(row: Row) -> list[int]:
    known = list(row.token_ids[row.start : row.start + row.count])
    return [*known, *row.draft]


def pool(hidden: Tensor, rows: Items[Row]) -> tuple[Pooled, ...]:
    """What the rows with ``pooling`` want of the step's ``hidden`` ``[tokens, hidden]``, float32.

    ``last`` gives nothing before the sequence's last token.
    """
    found = []
    ends = accumulate(row.count for row in rows)
    for row, end in zip(rows, ends, strict=True):
        if row.pooling == "mean":
            vector = hidden[end - row.count : end].float().sum(0)
        elif row.pooling == "last" and row.start + row.count == len(row.token_ids):
            # A copy: the next step may write its hidden states where this one's are.
            vector = hidden[end - 1].to(torch.float32, copy=True)
        else:
            continue
        found.append(Pooled(row.seq_id, row.start, vector.numpy(force=True)))
    return tuple(found)


def check_row(row: Row, block_size: int) -> None:
    """:raises ValueError: the row contradicts itself."""
    start, count, draft = row.start, row.count, row.draft
    end = start + count
    there = len(row.token_ids) + len(draft) + row.unknown
    if count < 1 or end > there:
        raise ValueError(f"sequence {row.seq_id}: tokens {start}..{end} of {there} planned")
    if row.unknown and (count != 1 or draft or row.guide is not None):
        raise ValueError(f"sequence {row.seq_id}: an unknown token must be all that it runs")
    if draft and (not row.sample or count <= len(draft)):
        raise ValueError(f"sequence {row.seq_id}: guesses do not follow its last token")
    first, last = start // block_size, (end - 1) // block_size
    for table in row.block_tables:
        # Most rows touch one page, and there are hundreds of them.
        if last >= len(table) or table[last] < 0 or (first < last and min(table[first:last]) < 0):
            raise ValueError(
                f"sequence {row.seq_id}: {end} tokens do not fit its {len(table)} pages"
            )
    if row.sample and end != there:
        raise ValueError(f"sequence {row.seq_id}: a sample is asked before its last token")
