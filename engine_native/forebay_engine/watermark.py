"""Marks in answers that only who has the key can see. No tensors here.

``kgw`` raises the logits of a keyed share of the vocabulary, its green list, by ``delta``
(Kirchenbauer et al. 2023, https://arxiv.org/abs/2301.10226). A token is green if a hash of key,
context and token says so, not by its place in a permutation; so it can be asked of one token alone,
and on any device. The context is the last tokens before it: with ``lefthash`` all of them together,
with ``selfhash`` the one among them whose hash with the token is least, so that changing another
does no harm (Kirchenbauer et al. 2024, https://arxiv.org/abs/2306.04634, which calls it so).

``gumbel`` leaves the distribution of each token alone: it draws by Gumbel noise that is a hash of
key, context and token (Aaronson 2022, https://scottaaronson.blog/?p=6823). A context that has
occurred before in the answer is drawn by ordinary noise, or the answer would run in circles.

Contexts lie in the answer alone: so the detector needs no prompt, and choices of one prompt differ.
"""

from __future__ import annotations

import os
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import msgspec

from forebay_engine.config import EngineConfig
from forebay_engine.errors import RequestRefused, StartRefused

#: Holds the key where no file is named.
KEY_VARIABLE = "FOREBAY_WATERMARK_KEY"
_SHORTEST_KEY = 16
_LONGEST_CONTEXT = 64
_MOST_DELTA = 100.0
_WORD = (1 << 32) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Watermark:
    scheme: Literal["kgw", "gumbel"] = "kgw"
    #: Share of the green tokens.
    gamma: float = 0.25
    #: Added to their logits.
    delta: float = 2.0
    #: Tokens before a token that decide on it.
    context: int = 4
    seeding: Literal["selfhash", "lefthash"] = "selfhash"
    key: bytes = field(default=b"", repr=False)

    @property
    def threshold(self) -> int:
        """Hashes of 31 bits below it are green."""
        return round(self.gamma * (1 << 31))


def parse(text: str) -> Watermark:
    """Of a scheme with its parameters: ``kgw gamma=0.5 context=2``.

    :raises RequestRefused: naming what is wrong.
    """
    scheme, *pairs = text.split()
    given = dict(pair.partition("=")[::2] for pair in pairs)
    unknown = given.keys() - {item.name for item in fields(Watermark)} | given.keys() & {"key"}
    if unknown:
        raise RequestRefused(f"a watermark has no {', '.join(sorted(unknown))}", "watermark")
    try:
        mark = msgspec.convert({"scheme": scheme, **given}, Watermark, strict=False)
    except msgspec.ValidationError as error:
        raise RequestRefused(f"{text!r} is no watermark: {error}", "watermark") from None
    check(mark)
    return mark


def check(mark: Watermark) -> None:
    """:raises RequestRefused: a parameter is out of range."""
    wrong = {
        "gamma": (0.0 < mark.gamma < 1.0, "must be between 0 and 1"),
        "delta": (0.0 <= mark.delta <= _MOST_DELTA, f"must be from 0 to {_MOST_DELTA:g}"),
        "context": (1 <= mark.context <= _LONGEST_CONTEXT, f"must be 1 to {_LONGEST_CONTEXT}"),
    }
    for name, (right, bound) in wrong.items():
        if not right:
            raise RequestRefused(f"{name} is {getattr(mark, name):g}; it {bound}", "watermark")


def read_key(path: str) -> bytes:
    """The key, from a file or, where none is named, from the environment; empty: there is none.

    :raises StartRefused: it can't be read, or is too short to be one.
    """
    if path:
        try:
            secret = Path(path).expanduser().read_bytes().strip()
        except OSError as error:
            raise StartRefused(f"watermark_key_file: {error}") from error
    else:
        secret = os.environ.get(KEY_VARIABLE, "").strip().encode()
    if not path and not secret:
        return b""
    if len(secret) < _SHORTEST_KEY:
        raise StartRefused(
            f"the watermark's key has {len(secret)} bytes; make one of at least {_SHORTEST_KEY}, "
            "such as `openssl rand -hex 32` gives"
        )
    return blake2b(secret, digest_size=32).digest()


class Marks:
    """Which answers are marked, and how."""

    def __init__(self, key: bytes = b"", always: Watermark | None = None) -> None:
        if always is not None and not key:
            raise StartRefused(
                f"watermark needs a key: name a file in watermark_key_file, or set {KEY_VARIABLE}"
            )
        self._key = key
        self._always = always

    @classmethod
    def settled(cls, config: EngineConfig) -> Marks:
        """As configured.

        :raises StartRefused: that can't be.
        """
        try:
            always = parse(config.watermark) if config.watermark.strip() else None
        except RequestRefused as error:
            raise StartRefused(f"watermark: {error.message}") from error
        return cls(read_key(config.watermark_key_file), always)

    def of(self, asked: Watermark | bool | None, temperature: float) -> Watermark | None:
        """The mark of an answer; ``asked``: by its request, True: of the usual kind.

        :raises RequestRefused: there is no key for it, or the operator wants another.
        """
        if self._always is not None:
            if asked is False or isinstance(asked, Watermark):
                raise RequestRefused("every answer of this server has its own mark", "watermark")
            return replace(self._always, key=self._key)
        if asked is None or asked is False:
            return None
        if not self._key:
            raise RequestRefused(
                "the engine has no key: its operator gives it one as watermark_key_file or "
                f"{KEY_VARIABLE}",
                "watermark",
            )
        mark = Watermark() if asked is True else asked
        check(mark)
        if mark.scheme == "gumbel" and temperature == 0:
            raise RequestRefused(
                "the scheme gumbel marks what is drawn, and at temperature 0 nothing is; "
                "use kgw, or a temperature above 0",
                "watermark",
            )
        return replace(mark, key=self._key)


def context_keys(mark: Watermark, token_ids: Items[int], start: int) -> tuple[int, ...]:
    """Keys, 64 bits each, of the token after ``token_ids``; the answer begins at ``start``.

    One, or one for each token of the context with ``selfhash``; none: it is not marked.
    """
    first = len(token_ids) - mark.context
    if first < start:
        return ()
    context = token_ids[first:]
    if mark.scheme == "kgw" and mark.seeding == "selfhash":
        return tuple(key_of(mark, [token_id]) for token_id in context)
    if mark.scheme == "gumbel" and _occurred(context, token_ids, start):
        return ()
    return (key_of(mark, context),)


def key_of(mark: Watermark, token_ids: Items[int]) -> int:
    """A key of 64 bits that tells nothing of the secret one."""
    data = b"".join(token_id.to_bytes(4, "little") for token_id in token_ids)
    hashed = blake2b(data, digest_size=8, key=mark.key, person=person_of(mark))
    return int.from_bytes(hashed.digest(), "big")


def person_of(mark: Watermark) -> bytes:
    """What sets the keys of marks of different kinds apart."""
    return f"{mark.scheme} {mark.seeding}".encode()[:16]


def bits_of(key: int, value: int) -> int:
    """31 bits of a token id under a key: :func:`forebay_engine.noise.token_bits` of one."""
    x = value ^ (key & _WORD)
    x = ((x ^ x >> 17) * 0xED5AD4BB + (key >> 32)) & _WORD
    x = (x ^ x >> 11) * 0xAC4C1B51 & _WORD
    x = (x ^ x >> 15) * 0x31848BAB & _WORD
    return (x ^ x >> 14) & (_WORD >> 1)


def _occurred(context: Items[int], token_ids: Items[int], start: int) -> bool:
    """Whether these last tokens stood in the answer before."""
    size, at = len(context), start + len(context) - 1
    end = len(token_ids) - 1
    while True:
        try:
            at = token_ids.index(context[-1], at, end)
        except ValueError:
            return False
        if token_ids[at + 1 - size : at + 1] == context:
            return True
        at += 1
