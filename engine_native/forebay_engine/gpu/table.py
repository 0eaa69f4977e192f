"""The running sequences as the device knows them, and what it has to be told for a step.

A sequence has a place in the table as long as it has a row in every step: what is left out of one
gives its place up, and is told anew when it comes back. So nobody has to say that a sequence has
ended or was preempted, which always leaves it out of a step, and no page of another time remains.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import torch

from forebay_engine.step import Row

#: Words of a place before its pages: the last token drawn, and room so that pages begin at a
#: multiple of 16 bytes.
_HEAD = 4


@dataclass(slots=True)
class _Place:
    number: int
    #: Of each group, how many of the sequence's pages the device knows.
    pages: list[int]
    #: The last step drew a token for it.
    drawn: bool = False


@dataclass(frozen=True, slots=True)
class Words:
    """What changes in the table: ``table[at[i]] = words[i]``."""

    at: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)

    def add(self, at: int, words: Items[int]) -> None:
        """So many words from ``at`` on."""
        self.at.extend(range(at, at + len(words)))
        self.words.extend(words)


class RequestTable:
    """Places for so many sequences of at most ``pages`` pages in each group, and one for nobody."""

    def __init__(self, places: int, groups: int, pages: int, device: torch.device) -> None:
        pages += -pages % 4
        self.size = places
        #: What padded rows stand for; it may hold anything.
        self.nobody = places
        self._width = _HEAD + groups * pages
        self._pages = pages
        words = torch.zeros(places + 1, self._width, dtype=torch.int32, device=device)
        self.words = words.view(-1)
        self.last = words[:, 0]  # [places + 1] int32
        self.tables = words[:, _HEAD:].view(places + 1, groups, pages)
        self._places: dict[int, _Place] = {}
        self._free = list(range(places - 1, -1, -1))

    def enter(self, rows: Items[Row]) -> tuple[list[int], Words]:
        """The rows' places, and what the device does not know of them yet.

        :raises ValueError: there are too many, or one has too many pages, or an unknown token that
            the last step did not draw.
        """
        if len(rows) > self.size:
            raise ValueError(f"{len(rows)} rows in a step, where {self.size} are the most")
        before, self._places = self._places, {}
        for row in rows:
            place = before.pop(row.seq_id, None)
            if place is not None:
                self._places[row.seq_id] = place
        self._free.extend(place.number for place in before.values())
        numbers, words = [], Words()
        for row in rows:
            place = self._places.get(row.seq_id)
            if place is None:
                place = _Place(self._free.pop(), [0] * len(row.block_tables))
                self._places[row.seq_id] = place
            if row.unknown and not place.drawn:
                raise ValueError(f"sequence {row.seq_id}: the last step drew no token for it")
            numbers.append(place.number)
            self._tell_pages(place, row, words)
        return numbers, words

    def forget(self) -> None:
        """Nothing that was told of pages counts: a step came to nothing."""
        for place in self._places.values():
            place.pages = [0] * len(place.pages)

    def drew(self, rows: Items[Row]) -> None:
        """A step with these rows has been launched."""
        for row in rows:
            self._places[row.seq_id].drawn = row.sample

    def _tell_pages(self, place: _Place, row: Row, words: Words) -> None:
        for group, table in enumerate(row.block_tables):
            known, there = place.pages[group], len(table)
            if there > known:
                if there > self._pages:
                    raise ValueError(
                        f"sequence {row.seq_id}: {there} pages, where {self._pages} are the most"
                    )
                first = place.number * self._width + _HEAD + group * self._pages
                words.add(first + known, [max(0, page) for page in table[known:]])
                place.pages[group] = there
