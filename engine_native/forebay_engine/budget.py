"""How many tokens of a step each sequence gets."""

from __future__ import annotations

from collections.abc import Sequence as Items

from forebay_engine.queues import Entry

#: Of each step, this part is kept for prompts that need no more than it, if there are any; but no
#: more than half of what decodes leave, so that long prompts get on as well.
_SHORT_PART = 4


class StepBudget:
    """A step that is being planned: tokens by sequence, and what is left to give.

    One long prompt must not take all of every step: the short ones behind it would wait until it is
    through. So a part is kept for them, and handed to the long ones if nobody wants it.
    """

    def __init__(self, tokens: int) -> None:
        self.left = tokens
        self.counts: dict[Entry, int] = {}
        self.preempted: set[Entry] = set()
        self._short_most = tokens // _SHORT_PART
        self._short = 0
        self._for_long = tokens

    def decode(self, entries: Items[Entry]) -> None:
        """Give each one token, before anybody has anything; there are enough."""
        self.counts = dict.fromkeys(entries, 1)
        self.left -= len(entries)
        self._for_long = self.left

    def keep_for_short(self) -> None:
        """From now on, keep a part for prompts that need no more than it."""
        self._short = min(self._short_most, self.left // 2)
        self._for_long = self.left - self._short

    def free_for_all(self) -> None:
        """From now on, anybody may have what is left."""
        self._short, self._for_long = 0, self.left

    def share(self, wanted: int) -> int:
        """Tokens that a sequence gets of those it wants."""
        return min(wanted, self.left if wanted <= self._short else self._for_long)

    def take(self, entry: Entry, count: int, wanted: int) -> None:
        """Give a sequence ``count`` more tokens of those it wants."""
        if not count:
            return
        self.counts[entry] = self.counts.get(entry, 0) + count
        self.left -= count
        if wanted > self._short:
            self._for_long -= count
        self._for_long = min(self._for_long, self.left)

    def preempt(self, entry: Entry) -> None:
        """A sequence has lost its place, and what it was given."""
        self.left += self.counts.pop(entry, 0)
        self.preempted.add(entry)
