"""Usage: what is billed must be there, add up, and come where clients look for it."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from forebay.conformance.answer import Answer, Broken, shaped
from forebay.conformance.check import check
from forebay.conformance.talk import PROMPT, Talk

_WITH: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


class Figures(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@check("usage.whole", "A whole answer says how many tokens it took")
async def whole(talk: Talk) -> None:
    usage = shaped((await talk.generate()).expect().body["usage"], Figures)
    if usage.prompt_tokens < 1 or not 1 <= usage.completion_tokens <= 8:
        raise Broken(f"of at most 8 tokens it says {usage}")


@check("usage.adds-up", "The total is the sum of prompt and completion")
async def adds_up(talk: Talk) -> None:
    for answer in (await talk.generate(), await talk.generate(**_WITH)):
        usage = answer.expect("stream_options").usage
        if usage.prompt_tokens + usage.completion_tokens != usage.total_tokens:
            raise Broken(f"it does not: {usage}")


@check("usage.stream", "With `include_usage` the last chunk has it, and no choices")
async def stream(talk: Talk) -> None:
    last = (await _streamed(talk)).chunks[-1]
    shaped(last["usage"], Figures)
    if last["choices"]:
        raise Broken("the last chunk has choices")


@check("usage.stream-once", "All chunks before the last have no usage, or null")
async def stream_once(talk: Talk) -> None:
    chunks = (await _streamed(talk)).chunks
    count = sum(chunk.get("usage") is not None for chunk in chunks)
    if count != 1:
        raise Broken(f"{count} of {len(chunks)} chunks have it")


@check("usage.stream-unasked", "Nobody is sent a usage chunk who did not ask for one")
async def stream_unasked(talk: Talk) -> None:
    chunks = (await talk.generate(stream=True)).expect().chunks
    if any(chunk.get("usage") or not chunk["choices"] for chunk in chunks):
        raise Broken("there is one")


@check("usage.same", "The prompt of a stream is as long as that of a whole answer")
async def same(talk: Talk) -> None:
    whole_, streamed = (await talk.generate()).expect().usage, (await _streamed(talk)).usage
    if whole_.prompt_tokens != streamed.prompt_tokens:
        raise Broken(f"{whole_.prompt_tokens} tokens, streamed {streamed.prompt_tokens}")


@check("usage.grows", "A longer prompt has more tokens")
async def grows(talk: Talk) -> None:
    short = (await talk.generate(PROMPT, max_tokens=1)).expect().usage
    long = (await talk.generate(f"{PROMPT} {PROMPT} {PROMPT}", max_tokens=1)).expect().usage
    if short.prompt_tokens >= long.prompt_tokens:
        raise Broken(f"8 words: {short.prompt_tokens}; 24 words: {long.prompt_tokens}")


@check("usage.choices", "Of several choices all are counted, and the prompt once")
async def choices(talk: Talk) -> None:
    fields: dict[str, Any] = {"max_tokens": 4, "temperature": 0.7}
    one = (await talk.generate(**fields)).expect().usage
    both = (await talk.generate(n=2, **fields)).expect("n")
    usage = both.usage
    if usage.prompt_tokens != one.prompt_tokens:
        raise Broken(f"the prompt has {one.prompt_tokens} tokens, for two {usage.prompt_tokens}")
    by_length = [choice.finish == "length" for choice in both.choices.values()]
    if all(by_length) and usage.completion_tokens != 8:
        raise Broken(f"two answers of 4 tokens are {usage.completion_tokens}")


async def _streamed(talk: Talk) -> Answer:
    return (await talk.generate(**_WITH)).expect("stream_options")
