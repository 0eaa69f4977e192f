"""A step as one run of 32-bit words, so that one copy takes it to the device."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field, fields
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forebay_engine.gpu.table import Changes, Place
from forebay_engine.step import Row

#: Every section begins at a multiple of 16 bytes, whatever the sizes: kernels are compiled for it.
_ALIGNED = 4


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much a step holds of each kind."""

    rows: int
    tokens: int
    samples: int = 0
    scored: int = 0
    cleared: int = 0
    changes: int = 0

    def sections(self) -> tuple[int, ...]:
        """Words of each field of :class:`Sections`."""
        rows, samples, changes = self.rows, self.samples, self.changes
        found = (rows, rows, rows + 1, self.tokens, samples, samples, samples, samples)
        return (*found, self.scored, self.cleared, changes, changes)

    @property
    def words(self) -> int:
        return sum(size + -size % _ALIGNED for size in self.sections())


@dataclass(frozen=True, slots=True)
class Sections:
    """A step's words by their meaning: views of a tensor."""

    #: Of each row its place in the table, its first position (negative: no row), its first token.
    places: Tensor  # [rows] int32
    starts: Tensor  # [rows] int32
    query_starts: Tensor  # [rows + 1] int32
    #: Token ids; negative: the last one drawn for the row.
    tokens: Tensor  # [tokens] int32
    #: Where tokens are drawn: behind which token of the step, for which place of the table, at
    #: which position, and which mask says what may come (negative: none).
    sample_at: Tensor  # [samples] int32
    sample_places: Tensor  # [samples] int32
    sample_positions: Tensor  # [samples] int32
    sample_masks: Tensor  # [samples] int32
    #: Samples of which log-probabilities are wanted.
    scored: Tensor  # [scored] int32
    #: Places whose counts of tokens begin anew, and what else changes in the table.
    cleared: Tensor  # [cleared] int32
    changes_at: Tensor  # [changes] int32
    changes: Tensor  # [changes] int32

    @classmethod
    def of(cls, words: Tensor, sizes: Sizes) -> Sections:
        found, first = [], 0
        for size in sizes.sections():
            found.append(words[first : first + size])
            first += size + -size % _ALIGNED
        return cls(*found)

    def fill(self, **values: Any) -> None:
        """Write sections by name; of a tensor on the host."""
        for item in fields(self):
            section: Tensor = getattr(self, item.name)
            if len(section):
                section.numpy()[:] = values[item.name]


@dataclass(frozen=True, slots=True)
class Samples:
    """Where a step draws, by the sample's number."""

    at: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    masks: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    #: Of each row that draws, its first sample.
    first: dict[int, int] = field(default_factory=dict)
    #: Rows with masks, in the masks' order, and those that the host draws.
    masked: list[Row] = field(default_factory=list)
    by_host: list[Row] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Items[Row], places: Items[Place]) -> Samples:
        found = cls()
        end = masks = 0
        for row, place in zip(rows, places, strict=True):
            end += row.count
            if not row.sample:
                continue
            count = 1 + len(row.draft)
            first, behind = len(found.at), row.start + row.count
            found.first[row.seq_id] = first
            if count == 1:  # the loops of a step of 256 rows are what the host does longest
                found.at.append(end - 1)
                found.places.append(place.number)
                found.positions.append(behind)
                found.masks.append(-1)
            else:
                found.at.extend(range(end - count, end))
                found.places.extend([place.number] * count)
                found.positions.extend(range(behind - count + 1, behind + 1))
                found.masks.extend([-1] * count)
            if not place.draws:
                found.by_host.append(row)
            elif row.guide is not None or row.sampling.allowed_token_ids:
                found.masked.append(row)
                found.masks[first:] = range(masks, masks + count)
                masks += count
            if row.sampling.logprobs is not None:
                found.scored.extend(range(first, first + count))
        return found


def lay(
    rows: Items[Row],
    places: Items[Place],
    changes: Changes,
    samples: Samples,
    *,
    padded: int,
    nobody: int,
    pinned: bool,
) -> tuple[Tensor, Sizes]:
    """The step's words, on the host.

    :param padded: rows that a step of one token each is filled up to, 0: none.
    :param nobody: the place of the rows that fill it up.
    """
    more = max(0, padded - len(rows))
    counts = [row.count for row in rows] + [1] * more
    tokens = [token for row in rows for token in _tokens(row)] + [0] * more
    sizes = Sizes(
        rows=len(counts),
        tokens=len(tokens),
        samples=len(samples.at),
        scored=len(samples.scored),
        cleared=len(changes.cleared),
        changes=len(changes.at),
    )
    words = torch.empty(sizes.words, dtype=torch.int32, pin_memory=pinned)
    Sections.of(words, sizes).fill(
        places=[*(place.number for place in places), *[nobody] * more],
        starts=[row.start for row in rows] + [-1] * more,
        query_starts=np.fromiter(accumulate(counts, initial=0), np.int32, len(counts) + 1),
        tokens=tokens,
        sample_at=samples.at,
        sample_places=samples.places,
        sample_positions=samples.positions,
        sample_masks=samples.masks,
        scored=samples.scored,
        cleared=changes.cleared,
        changes_at=changes.at,
        changes=changes.words,
    )
    return words, sizes


def _tokens(row: Row) -> Items[int]:
    if row.unknown:
        return (-1,)
    known = row.token_ids[row.start : row.start + row.count]
    return [*known, *row.draft] if row.draft else known
