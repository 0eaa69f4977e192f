"""Which program of a prefill kernel computes what: worked out once a step for all layers.

Tiles of queries differ in how many slots they see. The heaviest start first, so that the last ones
to finish are short; and rows whose tiles would outlast all other work share their slots among
several programs. The plan only spreads work: kernels read lengths on the device, so lengths on the
host may be guesses, as long as rows and their tokens are right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from forebay_kernels.batch import PagedBatch

#: Tokens of a row up to which equal rows need no list of work: guesses to verify.
SHORT = 16
#: Multiprocessors of an H200, each of which runs one large tile at a time.
_PROCESSORS = 132
#: Shares of one row at most, so that joining them stays cheap.
_MOST_SPLITS = 32
#: Tiles of slots that a share has at least: fewer take less time than the join's launch.
_LEAST_TILES = 4


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens side by side whose rows are shared, and where their partial results begin."""

    token: int
    tokens: int
    place: int


@dataclass(frozen=True, slots=True)
class Plan:
    #: Programs for each KV head.
    programs: int
    #: Row, first token of the row, its tokens, tile, share, first place (-1: not shared) of each
    #: program; None: all rows are alike, and the kernel derives them.
    items: Tensor | None  # [programs, 6] int32
    #: Shares of each row that is shared.
    splits: int
    #: What is to be joined; they end at ``places``.
    runs: tuple[Run, ...]

    @property
    def places(self) -> int:
        return self.runs[-1].place + self.runs[-1].tokens if self.runs else 0


def plan_prefill(
    batch: PagedBatch,
    kv_heads: int,
    group: int,
    window: int | None,
    chosen: Mapping[str, int],
) -> Plan:
    """The plan of all rows behind the decode rows, from the batch's memo if a layer made it.

    ``chosen`` holds ``rows``, the queries of a tile, and ``tile``, the slots.
    """
    rows, tile = chosen["rows"], chosen["tile"]
    key = ("plan_prefill", kv_heads, group, window, rows, tile)
    plan: Plan | None = batch.memo.get(key)
    if plan is None:
        counts = {batch.query_len(row) for row in range(batch.num_decodes, batch.num_rows)}
        alike = len(counts) == 1
        if batch.replayed and not alike:
            raise ValueError(
                "batch: rows behind the decode rows of a replayed step must have as many tokens"
                f" each, not {sorted(counts)}"
            )
        if alike and (batch.replayed or max(counts) <= SHORT):
            plan = _uniform(batch, max(counts), kv_heads, group, window, rows, tile)
        else:
            plan = _weighed(batch, kv_heads, group, window, rows, tile)
        batch.memo[key] = plan
    return plan


def _uniform(
    batch: PagedBatch,
    count: int,
    kv_heads: int,
    group: int,
    window: int | None,
    rows: int,
    tile: int,
) -> Plan:
    """By shapes and the longest row that there can be: a captured graph serves all lengths."""
    first = batch.num_decodes
    tokens = batch.num_tokens - batch.query_starts[first]
    programs = (batch.num_rows - first) * -(-count * group // rows)
    longest = max(batch.seq_lens[first:])
    seen = longest if window is None else min(longest, window + count)
    # Small tiles, of which a multiprocessor runs two at a time.
    splits = max(1, min(2 * _PROCESSORS // (programs * kv_heads), -(-seen // tile), _MOST_SPLITS))
    runs = (Run(batch.query_starts[first], tokens, 0),) if splits > 1 else ()
    return Plan(programs * splits, None, splits, runs)


def _weighed(
    batch: PagedBatch, kv_heads: int, group: int, window: int | None, rows: int, tile: int
) -> Plan:
    """By the tiles of slots that each tile of queries sees."""
    numbers = range(batch.num_decodes, batch.num_rows)
    weights = {row: _weights(batch, row, group, window, rows, tile) for row in numbers}
    work = kv_heads * sum(sum(each) for each in weights.values())
    fair = max(_LEAST_TILES, -(-work // _PROCESSORS))
    # Below twice a fair share, what splitting wins is lost in writing and joining the shares.
    shared = {row: max(each) for row, each in weights.items() if max(each) >= 2 * fair}
    splits = min(_MOST_SPLITS, max((-(-most // fair) for most in shared.values()), default=1))
    runs: list[Run] = []
    items: list[tuple[float, list[int]]] = []
    for row, each in weights.items():
        token, count = batch.query_starts[row], batch.query_len(row)
        place = -1
        if row in shared:
            last = runs[-1] if runs else Run(0, 0, 0)
            place = last.place + last.tokens
            if runs and last.token + last.tokens == token:
                runs[-1] = Run(last.token, last.tokens + count, last.place)
            else:
                # Two places are 16 bytes of spans: Triton compiles anew for pointers that are not.
                place += place % 2
                runs.append(Run(token, count, place))
        shares = 1 if place < 0 else splits
        items += [
            (weight / shares, [row, token, count, number, share, place])
            for number, weight in enumerate(each)
            for share in range(shares)
        ]
    items.sort(key=lambda item: -item[0])
    device = batch.lengths.device
    # From pinned memory, so that the copy does not wait for the device.
    packed = torch.tensor(
        [item for _, item in items], dtype=torch.int32, pin_memory=device.type == "cuda"
    )
    return Plan(len(items), packed.to(device, non_blocking=True), splits, tuple(runs))


def _weights(
    batch: PagedBatch, row: int, group: int, window: int | None, rows: int, tile: int
) -> list[int]:
    """For each tile of a row's queries, the tiles of slots that it sees."""
    count = batch.query_len(row)
    before = batch.seq_lens[row] - count
    found = []
    for start in range(0, count * group, rows):
        last = before + min((start + rows - 1) // group, count - 1)
        low = 0 if window is None else max(0, before + start // group - window + 1)
        found.append(max(0, last // tile - low // tile + 1))
    return found
