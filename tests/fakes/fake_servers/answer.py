"""From tokens to text, as servers do it: whole characters, held back where a stop may begin."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fake_servers.model import EOS, Ask, Step, piece_of, tokenize, walk

__all__ = ["Holding", "Piece", "pieces", "seeded"]

#: What is held back while a stop string is looked for: as many characters as the longest has, less
#: one (vLLM, SGLang); only what may be the begin of one (llama.cpp, Ollama); nothing, so that it
#: stays in the text and counts only where a token ends with it (``ends``: TGI), or only where it
#: comes as the very tokens that it is by itself (``tokens``: TensorRT-LLM).
Holding = Literal["longest", "begin", "ends", "tokens"]


@dataclass(frozen=True)
class Piece:
    """What one or more tokens say. Empty text: they make no whole character yet, or are held."""

    text: str
    steps: Sequence[Step]
    #: ``stop`` or ``length`` on the last.
    finish: str | None = None
    #: The stop string, or the stop token's id, that was met; None for the model's own end.
    matched: str | int | None = None


def seeded(ask: Ask, index: int) -> Ask:
    """The ask of one of several choices, whose seeds must differ."""
    return ask if ask.seed is None or not index else replace(ask, seed=ask.seed + index)


def pieces(ask: Ask, holding: Holding = "longest") -> Iterator[Piece]:
    """One piece a token; the last one has the reason why it is."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    held, said, read = "", "", []
    for count, step in enumerate(walk(ask), 1):
        fresh = "" if step.token == EOS else decoder.decode(piece_of(step.token))
        text, said = held + fresh, said + fresh
        read.append(step.token)
        stop = _stop_in(text, said, read, ask, holding) if count >= ask.min_tokens else None
        if stop is not None:
            shown = text if holding in ("ends", "tokens") else text[: text.index(stop)]
            yield Piece(shown, [step], "stop", stop)
            return
        if step.token == EOS:
            yield Piece(text, [step], "stop")
            return
        if step.token in ask.stop_tokens:
            yield Piece(held, [step], "stop", step.token)
            return
        if count == ask.max_tokens:
            yield Piece(text, [step], "length")  # of a character that is not whole, nothing
            return
        keep = _kept(text, ask.stop, holding)
        held = text[len(text) - keep :]
        yield Piece(text[: len(text) - keep], [step])


def _stop_in(text: str, said: str, read: Sequence[int], ask: Ask, holding: Holding) -> str | None:
    """The stop string that comes first."""
    if holding == "ends":
        return next((stop for stop in ask.stop if said.endswith(stop)), None)
    if holding == "tokens":
        wanted = [(stop, tokenize(stop)) for stop in ask.stop]
        return next((stop for stop, ids in wanted if list(read[-len(ids) :]) == ids), None)
    found = [(text.index(stop), stop) for stop in ask.stop if stop in text]
    return min(found)[1] if found else None


def _kept(text: str, stops: Sequence[str], holding: Holding) -> int:
    """Characters at the text's end that must wait."""
    longest = max(map(len, stops), default=1) - 1
    if holding in ("ends", "tokens"):
        return 0
    if holding == "longest":
        return min(longest, len(text))
    return next(
        (
            size
            for size in range(min(longest, len(text)), 0, -1)
            if any(stop.startswith(text[-size:]) for stop in stops)
        ),
        0,
    )
