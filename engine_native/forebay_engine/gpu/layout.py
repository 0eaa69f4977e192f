"""A step as one run of 32-bit words, so that one copy takes it to the device."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import accumulate
from struct import pack_into

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


@dataclass(frozen=True, slots=True)
class Samples:
    """Where a step draws, by the sample's number."""

    at: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    masks: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    #: Rows with masks, in the masks' order.
    masked: list[Row] = field(default_factory=list)
    #: Those that the host draws, each behind its first sample.
    by_host: list[tuple[int, Row]] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Items[Row], places: Items[Place]) -> Samples:
        found = cls()
        end = masks = 0
        for row, place in zip(rows, places, strict=True):
            end += row.count
            if not row.sample:
                continue
            count = 1 + len(row.draft)
            behind = row.start + row.count
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
            if place.plain and row.guide is None:
                continue
            first = len(found.at) - count
            if not place.draws:
                found.by_host.append((first, row))
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
    tokens: list[int] = []
    for row in rows:
        if row.unknown:
            tokens.append(-1)
        else:
            tokens += row.token_ids[row.start : row.start + row.count]
            tokens += row.draft
    tokens += [0] * more
    sizes = Sizes(
        rows=len(counts),
        tokens=len(tokens),
        samples=len(samples.at),
        scored=len(samples.scored),
        cleared=len(changes.cleared),
        changes=len(changes.at),
    )
    sections = (  # in the order of Sections
        [place.number for place in places] + [nobody] * more,
        [row.start for row in rows] + [-1] * more,
        [*accumulate(counts, initial=0)],
        tokens,
        samples.at,
        samples.places,
        samples.positions,
        samples.masks,
        samples.scored,
        changes.cleared,
        changes.at,
        changes.words,
    )
    values: list[int] = []
    for section in sections:
        values += section
        values += [0] * (-len(section) % _ALIGNED)
    words = torch.empty(sizes.words, dtype=torch.int32, pin_memory=pinned)
    # Of 256 numbers in 2 µs, where numpy takes 7.
    pack_into(f"{sizes.words}i", words.numpy().data, 0, *values)
    return words, sizes
