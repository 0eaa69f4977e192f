"""A language model small enough for tests: what it says is a hash of what it has read.

Tokens are up to three letters, a digit, a sign, or one byte of any other character, so that some
characters, as in real vocabularies, come in several tokens. The same prompt has the same greedy
answer for ever, on any machine.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["BOS", "EOS", "Ask", "Step", "detokenize", "piece_of", "tokenize", "walk"]

EOS, BOS = 1, 2
#: Ids of single bytes, and of text, begin here.
_BYTES, _TEXT = 3, 1000
_SPLIT = re.compile(r" ?[A-Za-z]{1,3}|[\n -~]|.", re.DOTALL)
#: The digits of a text token's id. The blank is the last, so that no lone digit is white space.
_SIGNS = "".join(map(chr, range(33, 127))) + "\n "
_PLACES = {sign: place for place, sign in enumerate(_SIGNS)}
_BASE = len(_SIGNS)
#: What it can say. Of the last, some characters are tokens of one byte each.
_WORDS = (
    *(" one", " two", " six", " ten", " red", " sea", " sun", " and", " the", " is", " a", " to"),
    *(" up", " we", " go", ",", ".", " river", " stone", " green"),
    *(" wörld", " naïve", "水", "😀"),
)
#: Logits of the likeliest and of what no one would say.
_SPREAD, _NEVER = 4.0, -30.0


def tokenize(text: str) -> list[int]:
    """Token ids, without the one that begins a prompt."""
    found: list[int] = []
    for piece in _SPLIT.findall(text):
        if piece.isascii() and piece[0] in _PLACES:
            found.append(_id_of(piece))
        else:
            found += (_BYTES + byte for byte in piece.encode(errors="replace"))
    return found


def piece_of(token: int) -> bytes:
    """What a token says; empty for those that only steer, and those that do not exist."""
    if token < _TEXT:
        return bytes([token - _BYTES]) if _BYTES <= token < _BYTES + 256 else b""
    signs, rest = "", token - _TEXT
    while rest >= 0 and len(signs) < 5:
        signs = _SIGNS[rest % _BASE] + signs
        rest = rest // _BASE - 1
    return signs.encode() if rest < 0 else b""


def detokenize(tokens: Sequence[int]) -> str:
    return b"".join(map(piece_of, tokens)).decode(errors="replace")


def _id_of(signs: str) -> int:
    """Bijective numeration: each text has one number, each number one text."""
    number = 0
    for sign in signs:
        number = number * _BASE + _PLACES[sign] + 1
    return _TEXT + number - 1


_SAYABLE = tuple(tuple(tokenize(word)) for word in _WORDS)
#: The first tokens of words with more than ASCII.
_FOREIGN = tuple(tokenize(word)[0] for word in _WORDS if not word.isascii())


class Step(NamedTuple):
    """One token of an answer, and the likeliest in its place, best first."""

    token: int
    logprob: float
    top: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Ask:
    """What is asked of the model, in terms that every server's request can be brought to."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    #: Instead of the model's own words; the end comes right after them.
    forced: str | None = None


def walk(ask: Ask) -> Iterator[Step]:
    """The tokens of an answer; the last is :data:`EOS` if the model ends by itself."""
    digest = hashlib.blake2b(repr(ask.prompt).encode(), digest_size=8).digest()
    # Its own end: without chance it soon has said all, else it goes on for a while.
    length = 80 + digest[0] // 2 if ask.temperature == 0 else 600 + 2 * digest[0]
    chance = random.Random(ask.seed if ask.seed is None else f"{ask.seed}{ask.prompt}")
    said: list[int] = []
    rest = list(tokenize(ask.forced)) if ask.forced is not None else []
    while len(said) < ask.max_tokens:
        if rest:
            step = _certain(rest.pop(0), digest)
        elif ask.forced is not None:
            step = _certain(EOS, digest)
        else:
            step, rest = _next(ask, digest, said, length, chance)
        said.append(step.token)
        yield step
        if step.token == EOS or step.token in ask.stop_tokens:
            return


def _certain(token: int, digest: bytes) -> Step:
    """The rest of a word, or a constraint, leaves hardly a choice."""
    others = [(_id_of(sign), -4.0 - place) for place, sign in enumerate("!?;:#")]
    return Step(token, -0.02, [(token, -0.02), *(o for o in others if o[0] != token)])


def _next(
    ask: Ask, digest: bytes, said: list[int], length: int, chance: random.Random
) -> tuple[Step, list[int]]:
    """The first token of the next word, and the tokens after it."""
    scores = _scores(ask, digest, said, length)
    words = {word[0]: list(word[1:]) for word in _SAYABLE}
    total = math.log(sum(math.exp(score) for _, score in scores))
    ranked = [(token, score - total) for token, score in scores]
    token = _chosen(ask, scores, chance)
    step = Step(token, dict(ranked)[token], ranked[:20])
    return step, words.get(token, [])


def _scores(ask: Ask, digest: bytes, said: list[int], length: int) -> list[tuple[int, float]]:
    """Tokens with their logits, best first."""
    noise = hashlib.blake2b(digest + repr(said[-8:]).encode(), digest_size=32).digest()
    logits = {word[0]: _SPREAD * noise[place] / 255 for place, word in enumerate(_SAYABLE)}
    kind = 2.5 if any(token < _TEXT and token > BOS for token in ask.prompt) else -2.5
    for token in _FOREIGN:  # who writes in another script is answered in kind
        logits[token] += kind
    may_end = not ask.ignore_eos and len(said) >= ask.min_tokens
    logits[EOS] = 40.0 if may_end and len(said) >= length else _NEVER
    if (ask.frequency_penalty, ask.presence_penalty, ask.repetition_penalty) != (0, 0, 1):
        _penalise(ask, logits, said)
    for token, bias in ask.logit_bias.items():
        logits[token] = logits.get(token, 0.0) + bias
    return sorted(logits.items(), key=lambda pair: (-pair[1], pair[0]))


def _penalise(ask: Ask, logits: dict[int, float], said: list[int]) -> None:
    for token in logits.keys() & set(said):
        logits[token] -= ask.frequency_penalty * said.count(token) + ask.presence_penalty
        change = ask.repetition_penalty
        logits[token] = logits[token] / change if logits[token] > 0 else logits[token] * change


def _chosen(ask: Ask, scores: list[tuple[int, float]], chance: random.Random) -> int:
    if ask.temperature == 0:
        return scores[0][0]
    best = scores[0][1]
    weights = [math.exp((score - best) / ask.temperature) for _, score in scores]
    total, among, reached = sum(weights), 0, 0.0
    for weight in weights:  # at least the first; then as long as all filters let it in
        if among and (
            among == ask.top_k or reached >= ask.top_p * total or weight < ask.min_p * weights[0]
        ):
            break
        among, reached = among + 1, reached + weight
    return chance.choices([token for token, _ in scores[:among]], weights[:among])[0]
