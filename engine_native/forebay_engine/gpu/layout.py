"""A step as one run of 32-bit words, so that one copy takes it to the device."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forebay_engine.gpu.table import Words
from forebay_engine.step import Row

#: Every section begins at a multiple of 16 bytes, whatever the sizes: kernels are compiled for it.
_ALIGNED = 4


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much a step holds of each kind."""

    rows: int
    tokens: int
    samples: int
    by_host: int = 0
    scored: int = 0
    changes: int = 0

    def sections(self) -> tuple[int, ...]:
        """Words of each field of :class:`Sections`, with those that fill up the last 16 bytes."""
        rows, samples, changes = self.rows, self.samples, self.changes
        found = (rows, rows, rows + 1, self.tokens, samples, samples)
        return (*found, self.by_host, self.scored, changes, changes)

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
    #: Where tokens are drawn: behind which token of the step, and for which place of the table.
    sample_at: Tensor  # [samples] int32
    sample_places: Tensor  # [samples] int32
    #: Samples that the host draws, and those that it wants log-probabilities of.
    by_host: Tensor  # [by_host] int32
    scored: Tensor  # [scored] int32
    #: What changes in the table.
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
        for field in fields(self):
            section: Tensor = getattr(self, field.name)
            if len(section):
                section.numpy()[:] = values[field.name]


@dataclass(frozen=True, slots=True)
class Samples:
    """Where a step draws, by the sample's number."""

    at: list[int]
    places: list[int]
    #: Of each row that draws, its first sample.
    first: dict[int, int]
    by_host: list[int]
    scored: list[int]


def lay(
    rows: Items[Row],
    places: Items[int],
    changes: Words,
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
        samples=0 if padded else len(samples.at),
        by_host=len(samples.by_host),
        scored=len(samples.scored),
        changes=len(changes.at),
    )
    words = torch.empty(sizes.words, dtype=torch.int32, pin_memory=pinned)
    Sections.of(words, sizes).fill(
        places=[*places, *[nobody] * more],
        starts=[row.start for row in rows] + [-1] * more,
        query_starts=np.fromiter(accumulate(counts, initial=0), np.int32, len(counts) + 1),
        tokens=tokens,
        sample_at=samples.at,
        sample_places=samples.places,
        by_host=samples.by_host,
        scored=samples.scored,
        changes_at=changes.at,
        changes=changes.words,
    )
    return words, sizes


def _tokens(row: Row) -> Items[int]:
    if row.unknown:
        return (-1,)
    known = row.token_ids[row.start : row.start + row.count]
    return [*known, *row.draft] if row.draft else known
