"""Large tokenizers, written down once more in a form that is read in 60 % of the time.

Of 262144 tokens and 513511 merges reading takes 1.2 s, in which no other Python runs. Most of it is
copying each string several times and sorting the vocabulary, so merges are written as one string
each (as all were before tokenizers 0.20) and the vocabulary in its order: 0.7 s, and half the
memory. The form is used only if the tokenizer that is read from it is, written out again, equal to
the original's to the last byte; else the cache holds the original.
"""

from __future__ import annotations

import logging
import os
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import Tokenizer as Backend

#: Bytes from which it is worth a file; a tokenizer of 32000 tokens has 2 MB and is read in 0.1 s.
_WORTH = 4 << 20
#: Counted up when a file would be written otherwise than before.
_EDITION = 1

log = logging.getLogger(__name__)


def read(path: Path) -> Backend:
    """The tokenizer of a tokenizer.json; if large, by ``$XDG_CACHE_HOME/forebay/tokenizers``."""
    status = path.stat()
    if status.st_size < _WORTH:
        return Backend.from_file(str(path))
    parts = (_EDITION, tokenizers.__version__, str(path.resolve()), status.st_size)
    key = sha256(repr((*parts, status.st_mtime_ns)).encode()).hexdigest()[:24]
    quick = _cache() / f"{key}.json"
    if quick.is_file():
        return Backend.from_file(str(quick))
    found = Backend.from_file(str(path))
    try:
        quick.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=quick.parent) as folder:
            made = Path(folder) / quick.name
            made.write_bytes(_equal(found, path.read_bytes()))
            made.replace(quick)
    except OSError as error:
        log.warning("each start reads %s in full, since there is no cache: %s", path, error)
    return found


def _equal(original: Backend, text: bytes) -> bytes:
    """What is read as the same tokenizer, quicker if possible."""
    quicker = rewritten(text)
    same = quicker == text or Backend.from_buffer(quicker).to_str() == original.to_str()
    return quicker if same else text


def rewritten(text: bytes) -> bytes:
    """A BPE tokenizer.json with merges as strings and its vocabulary sorted; others as they are."""
    tree: dict[str, Any] = msgspec.json.decode(text)
    model = tree["model"]
    merges = model.get("merges", [])
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    if model.get("type") != "BPE" or any(" " in part for pair in pairs for part in pair):
        return text
    model["merges"] = [" ".join(pair) for pair in pairs]
    model["vocab"] = dict(sorted(model["vocab"].items()))
    return msgspec.json.encode(tree)


def _cache() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return root / "forebay" / "tokenizers"
