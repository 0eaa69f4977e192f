"""The model's tokenizer, from its ``tokenizer.json``."""

from __future__ import annotations

import json
from collections.abc import Callable
from collections.abc import Sequence as Items
from pathlib import Path

from tokenizers import Tokenizer as Backend

from forebay_engine import tokenizer_cache
from forebay_engine.errors import StartRefused

#: What decoders write for bytes that are not (yet) a character.
BROKEN = "\N{REPLACEMENT CHARACTER}"
#: Decoders that make of each token its text whatever stands beside it, characters in several tokens
#: excepted.
_INDEPENDENT = {"ByteLevel", "ByteFallback", "Fuse", "Replace"}


class Pieces(dict[int, str | None]):
    """Of each token its text, found when first asked for; None: it is part of a character."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode

    def __missing__(self, token_id: int) -> str | None:
        text = self._decode([token_id])
        self[token_id] = found = None if BROKEN in text else text
        return found


class Tokenizer:
    """Thread-safe: prompts are encoded, and tokens asked for, in threads beside the engine."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        # An ordinary token, so that the next one is decoded as in the middle of a text.
        self._anchor = backend.encode("a", add_special_tokens=False).ids[-1:]
        self._anchor_length = len(self.spell(self._anchor))
        self._texts: dict[int, str] = {}
        independent = _decodes_independently(backend)
        #: Of what ``decode`` and ``spell`` say; None: a token's text depends on the one before it.
        self.pieces = Pieces(self.decode) if independent else None
        self.spelled_pieces = Pieces(self.spell) if independent else None

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """:raises StartRefused: there is no tokenizer.json."""
        return cls.from_file(tokenizer_file(folder))

    @classmethod
    def from_file(cls, path: Path) -> Tokenizer:
        """Read a tokenizer.json; 0.7 s for 262144 tokens, in which no other Python runs."""
        return cls(tokenizer_cache.read(path))

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id, added tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def to_json(self) -> str:
        """As it would stand in a tokenizer.json; 0.4 s for 262144 tokens."""
        return self._backend.to_str()

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids; ``special`` adds what the model wants around a text, such as its ``<bos>``."""
        # The batch call is the one that lets other threads run meanwhile.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=special)
        return list(encoding.ids)

    def offsets(self, text: str) -> list[int]:
        """Where in a text each of its tokens begins, in characters, those added around it as well.

        A token that stands for no character of its own, as ``<bos>`` or the second half of one,
        begins where the next one does.
        """
        (encoding,) = self._backend.encode_batch([text])
        begins, end = [], 0
        for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            start = max(start, end)
            # Byte-level tokenizers leave the space before a word out of its span.
            name = self.token_text(token_id)
            spaces = len(name) - len(name.lstrip())
            begins.append(start - min(start - end, spaces))
            end = max(end, stop)
        return begins

    def decode(self, ids: Items[int]) -> str:
        """The text of tokens, special ones left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def spell(self, ids: Items[int]) -> str:
        """The text of tokens, special ones by their name."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def token_text(self, token_id: int) -> str:
        """The text of one token as it stands within a text, special tokens by their name."""
        text = self._texts.get(token_id)
        if text is None:
            text = self.spell([*self._anchor, token_id])[self._anchor_length :]
            self._texts[token_id] = text
        return text


def tokenizer_file(folder: Path) -> Path:
    """:raises StartRefused: there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise StartRefused(
            f"{path} is missing; make it with transformers: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    return path


def _decodes_independently(backend: Backend) -> bool:
    """Whether the text of tokens is the texts of each, one behind the other."""
    if backend.decoder is None:  # spaces between them
        return False
    decoder = json.loads(backend.decoder.__getstate__())
    kinds = [part["type"] for part in decoder.get("decoders", [decoder])]
    # What is replaced behind it, in the whole text, may reach over two tokens.
    whole = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    return set(kinds) <= _INDEPENDENT and "Replace" not in kinds[whole:]
