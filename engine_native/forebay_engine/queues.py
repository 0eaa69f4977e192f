"""Who runs and who waits, each by rank."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from forebay_engine.cache import Pages
from forebay_engine.sequence import Sequence
from forebay_engine.step import Row

#: Seconds of waiting that a level of priority is worth.
PATIENCE = 10.0


@dataclass(slots=True, eq=False)
class Entry:
    """The scheduler's own notes on a sequence.

    Of a sequence in steps under way, ``num_computed`` and ``token_ids`` say what is known for sure;
    what follows says how it will stand when they are over.
    """

    sequence: Sequence
    pages: Pages
    #: Nothing can be planned for it behind a token that is not known yet.
    waits: bool = False
    admitted: bool = False
    #: Its row in the newest of these steps; None: it is in none of them.
    row: Row | None = None
    #: Tokens in the cache after these steps.
    reach: int = 0
    #: Arrival, put off by its priority: never changes.
    rank: tuple[float, int] = field(init=False)

    def __post_init__(self) -> None:
        sequence = self.sequence
        self.rank = sequence.arrival + PATIENCE * sequence.priority, sequence.id

    @property
    def total(self) -> int:
        """Its tokens, the one that is being drawn among them."""
        row = self.row
        return len(self.sequence.token_ids) + (row is not None and row.sample)


class Queues:
    """All sequences that have not come to their end, or that a step under way still writes."""

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}
        #: Both by rank.
        self.running: list[Entry] = []
        self.waiting: list[Entry] = []

    def add(self, entry: Entry) -> None:
        self.entries[entry.sequence.id] = entry
        insort(self.waiting, entry, key=by_rank)

    def admit(self, entry: Entry) -> None:
        self.waiting.remove(entry)
        insort(self.running, entry, key=by_rank)

    def send_back(self) -> Entry:
        """The last that runs waits again."""
        entry = self.running.pop()
        insort(self.waiting, entry, key=by_rank)
        return entry

    def leave(self, entry: Entry) -> None:
        """It neither runs nor waits any longer."""
        (self.running if entry in self.running else self.waiting).remove(entry)

    def check(self) -> None:
        """Raise AssertionError unless the books agree with each other."""
        if any(any(entry.pages.tables) or entry.row for entry in self.waiting):
            raise AssertionError("a waiting sequence holds pages")
        for entries in (self.running, self.waiting):
            if entries != sorted(entries, key=by_rank):
                raise AssertionError("running or waiting sequences are not in order of rank")
        there = {id(entry) for entry in [*self.running, *self.waiting]}
        if there != {id(e) for e in self.entries.values() if e.sequence.finish_reason is None}:
            raise AssertionError("a sequence is neither running nor waiting, or has ended")
        if any(e.sequence.finish_reason and not e.row for e in self.entries.values()):
            raise AssertionError("a sequence has ended, and no step under way writes its pages")


def by_rank(entry: Entry) -> tuple[float, int]:
    return entry.rank
