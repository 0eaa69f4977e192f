"""Stop strings for backends that leave them in the text."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopStrings"]


class StopStrings:
    """Passes a text on in pieces, up to the stop string that is the first to be complete.

    What may be a stop string's beginning is held back until more text tells; how the text was cut
    makes no difference to what comes out.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        #: One has come: nothing more will pass.
        self.found = False

    def feed(self, text: str) -> str:
        """What may be passed on."""
        if self.found or not self._strings:
            return "" if self.found else text
        text = self._held + text
        starts = [(text.find(string), len(string)) for string in self._strings]
        found = [(start + length, start) for start, length in starts if start >= 0]
        if found:
            self.found, self._held = True, ""
            return text[: min(found)[1]]
        keep = max(_overlap(text, string) for string in self._strings)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """The text is over: what was held back was none."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Characters at the text's end with which the string begins."""
    longest = min(len(text), len(string) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(string[:size])), 0)
