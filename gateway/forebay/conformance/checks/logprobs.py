"""Logprobs, in the two forms of OpenAI's API reference: of chat, and of completions."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

from forebay.conformance.answer import Answer, Broken, shaped
from forebay.conformance.check import check
from forebay.conformance.talk import Talk

#: A little above 0: rounding.
Logprob = Annotated[float, Meta(le=0.001)]


class Likely(Struct, frozen=True):
    token: str
    logprob: Logprob
    bytes: list[int] | None = None


class Entry(Struct, frozen=True):
    token: str
    logprob: Logprob
    top_logprobs: list[Likely]
    bytes: list[int] | None = None


class Of(Struct, frozen=True):
    """``logprobs`` of a completions choice."""

    tokens: list[str]
    token_logprobs: list[Logprob | None]
    text_offset: list[int]
    top_logprobs: list[dict[str, Logprob] | None] | None = None


@check(
    "logprobs.chat", "Chat has one for each token, and the tokens make the text", claim="logprobs"
)
async def chat(talk: Talk) -> None:
    answer = (await talk.chat(logprobs=True)).expect("logprobs")
    entries = _entries(answer)
    if len(entries) not in (answer.usage.completion_tokens, answer.usage.completion_tokens - 1):
        raise Broken(f"{len(entries)} for {answer.usage.completion_tokens} tokens")
    said = b"".join(
        bytes(entry.bytes) if entry.bytes is not None else entry.token.encode() for entry in entries
    ).decode(errors="replace")
    if not said.strip().startswith(answer.text.strip()):
        raise Broken(f"of {answer.text!r} the tokens are {said!r}")


@check("logprobs.top", "`top_logprobs: 3` has the three likeliest at each place, best first")
async def top(talk: Talk) -> None:
    answer = (await talk.chat(logprobs=True, top_logprobs=3)).expect("logprobs", "top_logprobs")
    for entry in _entries(answer):
        found = [likely.logprob for likely in entry.top_logprobs]
        if len(found) != 3 or found != sorted(found, reverse=True):
            raise Broken(f"at {entry.token!r} they are {found}")


@check("logprobs.stream", "A chat stream has them in its chunks")
async def stream(talk: Talk) -> None:
    whole = _entries((await talk.chat(logprobs=True)).expect("logprobs"))
    streamed = _entries((await talk.chat(logprobs=True, stream=True)).expect("logprobs"))
    if abs(len(whole) - len(streamed)) > 1:
        raise Broken(f"{len(whole)} of a whole answer, {len(streamed)} of a stream")


@check("logprobs.unasked", "Nobody is sent them who did not ask")
async def unasked(talk: Talk) -> None:
    answer = (await talk.generate()).expect()
    if any(answer.choice.logprobs(key) for key in ("content", "tokens")):
        raise Broken("they are there")


@check("logprobs.completion", "Completions have them in their own form")
async def completion(talk: Talk) -> None:
    answer = (await talk.complete(logprobs=2)).expect("logprobs")
    _matching(answer.choice.parts[0].logprobs)


@check("logprobs.completion-stream", "So have completions streams")
async def completion_stream(talk: Talk) -> None:
    answer = (await talk.complete(logprobs=2, stream=True)).expect("logprobs")
    found = [part.logprobs for part in answer.choice.parts if part.logprobs]
    if not found:
        raise Broken("no chunk has them")
    for logprobs in found:
        _matching(logprobs)
    offsets = answer.choice.logprobs("text_offset")
    if offsets != sorted(offsets):
        raise Broken(f"offsets do not grow: {offsets}")


@check("logprobs.top-bound", "More than 20 are refused by name")
async def top_bound(talk: Talk) -> None:
    (await talk.chat(logprobs=True, top_logprobs=21)).refused("top_logprobs")


@check("logprobs.top-alone", "`top_logprobs` without `logprobs` is refused by name")
async def top_alone(talk: Talk) -> None:
    (await talk.chat(top_logprobs=2)).refused("top_logprobs", "logprobs")


def _entries(answer: Answer) -> list[Entry]:
    found = [shaped(entry, Entry) for entry in answer.choice.logprobs("content")]
    if not found:
        raise Broken("there are none")
    return found


def _matching(logprobs: dict[str, Any] | None) -> None:
    found = shaped(logprobs, Of)
    counts = {len(found.tokens), len(found.token_logprobs), len(found.text_offset)}
    if len(counts) != 1 or not found.tokens:
        raise Broken(f"its lists are not of one length: {counts}")
    for likely in found.top_logprobs or ():
        if likely is not None and not 1 <= len(likely) <= 3:
            raise Broken(f"asked for the 2 likeliest, got {len(likely)}")
