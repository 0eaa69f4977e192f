"""From a sequence's tokens to text that can be shown while it is being written."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

from forebay_engine.tokenizer import BROKEN, Pieces

#: Tokens of prompt that decide how the first token of the answer is spaced.
_CONTEXT = 5
#: UTF-8 characters have at most 4 bytes, so at most 4 tokens.
_LONGEST_CHARACTER = 4


class Detokenizer:
    """Text of one sequence, token by token, never with half a character in it.

    A token's text may depend on the one before it (spaces, bytes of one character), so a window of
    the last tokens is decoded and what was shown of it is cut off. A character whose last bytes
    never come is not shown.

    :param pieces: the text of each token, where texts are put together of them. Then most tokens
        are not decoded at all, which saves 5 of 6 µs each.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        prompt_ids: Items[int],
        pieces: Pieces | None = None,
    ) -> None:
        self._decode = decode
        self._pieces = pieces
        self._window = self._context(prompt_ids)
        #: Tokens at the window's start whose text is complete and shown.
        self._settled = len(self._window)
        self._shown = len(decode(self._window).rstrip(BROKEN))
        #: The window is one token that is a piece by itself.
        self._plain = self._is_plain()

    def push(self, token_id: int) -> str:
        """The text that can be shown now, often that of the token, sometimes none."""
        if self._plain and self._pieces is not None:
            piece = self._pieces[token_id]
            if piece is not None:
                self._window[0] = token_id
                self._shown = len(piece)
                return piece
        self._window.append(token_id)
        text = self._decode(self._window)
        complete = text.rstrip(BROKEN)
        pending = len(self._window) - self._settled
        if complete != text and pending < _LONGEST_CHARACTER:
            self._plain = False
            fresh = complete[self._shown :]
            self._shown = max(self._shown, len(complete))
            return fresh
        fresh = text[self._shown :]
        del self._window[: self._settled]
        self._settled = len(self._window)
        self._shown = len(self._decode(self._window))
        self._plain = self._is_plain()
        return fresh

    def _is_plain(self) -> bool:
        pieces, window = self._pieces, self._window
        return pieces is not None and len(window) == 1 and pieces[window[0]] is not None

    def _context(self, prompt_ids: Items[int]) -> list[int]:
        """The prompt's last tokens, begun at a character's first byte."""
        window: list[int] = []
        for size in range(_CONTEXT, _CONTEXT + _LONGEST_CHARACTER):
            window = list(prompt_ids[-size:])
            if not self._decode(window).startswith(BROKEN):
                break
        return window


class StopStrings:
    """Ends a text before the first stop string, holding back what may turn out to begin one.

    ``include``: the text ends behind it instead.
    """

    def __init__(self, stops: tuple[str, ...], include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is certain to be shown, and whether a stop string was found."""
        if not self._stops:
            return text, False
        text = self._held + text
        # The one that is complete first, so that it does not matter how the text was cut up.
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            end, begin = min(found)
            return text[: end if self._include else begin], True
        certain = len(text) - max((self._overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[certain:]
        return text[:certain], False

    def flush(self) -> str:
        """What was held back, once no more text can come."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of ``text`` that is a beginning of ``stop``."""
        longest = min(len(text), len(stop) - 1)
        return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
