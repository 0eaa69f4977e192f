"""Guesses from what was already said: prompt lookup, also called n-gram speculation.

Where the last tokens occurred before, what followed them then may follow them now: quotations, code
that is edited, answers drawn from a document (Saxena 2023,
https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Items

from forebay_engine.acceptance import Guess
from forebay_engine.step import Row

#: Tokens that must agree; with a single one, guesses seldom come true.
_LEAST = 2
#: Tokens compared; a longer agreement says little more.
_MOST = 8
#: Earlier places looked at, the latest first.
_PLACES = 16
#: Tokens indexed in a step, about 2 ms: a long prompt out of the prefix cache takes several.
_INDEXED = 4096


class NgramIndex:
    """Where each pair of neighbouring tokens of a growing text occurred before.

    A dictionary holds the latest place of each pair, and each place refers to the one before it, as
    in LZ77 compressors; so a token costs the same however long the text is. It takes some 120 bytes
    a token, under 1% of the token's keys and values.
    """

    def __init__(self) -> None:
        self._latest: dict[int, int] = {}
        #: Of the pair that ends at each position: where it ended before; -1: nowhere.
        self._before = array("q")

    def __len__(self) -> int:
        return len(self._before)

    def extend(self, tokens: Items[int], end: int) -> None:
        """Take in ``tokens[len(self) : end]``; those before are the same as ever."""
        for at in range(len(self._before), end):
            pair = (tokens[at - 1] << 32 | tokens[at]) if at else -1
            self._before.append(self._latest.get(pair, -1))
            self._latest[pair] = at

    def find(self, tokens: Items[int]) -> tuple[int, int]:
        """Where the longest end of ``tokens`` last ended before, and how many tokens agree.

        The agreement is 0 where there is no such place.
        """
        last = len(self._before) - 1
        place, longest = -1, 0
        found = self._before[last]
        for _ in range(_PLACES):
            if found < 0:
                break
            agreed = _agreement(tokens, found, last)
            if agreed > longest:
                place, longest = found, agreed
            if longest == _MOST:
                break
            found = self._before[found]
        return place, longest


class PromptLookup:
    """Proposes what followed the longest earlier occurrence of a sequence's last tokens."""

    def __init__(self) -> None:
        self._indexes: dict[int, NgramIndex] = {}

    def guess(self, row: Row, most: int) -> Guess:
        index = self._indexes.setdefault(row.seq_id, NgramIndex())
        tokens = row.token_ids
        index.extend(tokens, min(len(tokens), len(index) + _INDEXED))
        if not most or len(index) < len(tokens):
            return Guess()
        place, agreed = index.find(tokens)
        if agreed < _LEAST:
            return Guess()
        # Where the copy reaches the text's end, it goes on with itself: a period is continued.
        period = len(tokens) - 1 - place
        return Guess(tuple(tokens[place + 1 + at % period] for at in range(most)), agreed)

    def forget(self, seq_id: int) -> None:
        self._indexes.pop(seq_id, None)


def _agreement(tokens: Items[int], one: int, other: int) -> int:
    """How many tokens, at most ``_MOST``, agree up to two places, ``one`` before ``other``."""
    agreed = 0
    while agreed < min(_MOST, one + 1) and tokens[one - agreed] == tokens[other - agreed]:
        agreed += 1
    return agreed
