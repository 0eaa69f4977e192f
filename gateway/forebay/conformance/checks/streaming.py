"""Streams: how they begin, what they are cut into, how they end."""

from __future__ import annotations

from typing import Any

from forebay.conformance.answer import DONE, Answer, Broken, Lacking
from forebay.conformance.check import check
from forebay.conformance.talk import Talk


@check("streaming.first-chunk", "The role of a chat stream comes before its text")
async def first_chunk(talk: Talk) -> None:
    first = (await _chat(talk)).choice.parts[0].said
    if first.role != "assistant":
        raise Broken(f"the first chunk has the role {first.role!r}")


@check("streaming.role-once", "The role comes once")
async def role_once(talk: Talk) -> None:
    roles = (await _chat(talk)).choice.roles
    if len(roles) != 1:
        raise Broken(f"it comes {len(roles)} times")


@check("streaming.pieces", "A stream comes in pieces")
async def pieces(talk: Talk) -> None:
    answer = await _any(talk, max_tokens=12)
    if len(answer.choice.pieces) < 2:
        raise Broken(f"a text of {len(answer.text)} characters came as one")


@check("streaming.finish-once", "The finish reason comes once, and nothing after it")
async def finish_once(talk: Talk) -> None:
    choice = (await _any(talk)).choice
    last = choice.parts[-1]
    if not choice.finish or last.finish_reason is None:
        raise Broken("the last chunk of the choice has none")


@check("streaming.done", "`[DONE]` is the last event, and comes once")
async def done(talk: Talk) -> None:
    events = (await _any(talk)).events
    count = sum(event.data == DONE for event in events)
    if count != 1 or events[-1].data != DONE:
        raise Broken(f"it comes {count} times in {len(events)} events")


@check("streaming.lines", "Every event is one line of data, and an empty one")
async def lines(talk: Talk) -> None:
    raw = (await _any(talk)).raw
    if not raw.endswith(b"\n\n"):
        raise Broken(f"the last event is not ended: {raw[-20:]!r}")
    for event in raw[:-2].split(b"\n\n"):
        if not event.startswith(b"data: ") or b"\n" in event:
            raise Broken(f"an event is {event[:60]!r}")


@check("streaming.whole", "At temperature 0 a stream is the whole answer in pieces", alone=True)
async def whole(talk: Talk) -> None:
    texts = set()
    for _ in range(3):
        text = (await talk.generate(max_tokens=12)).expect().text
        texts.add(text)
        if (await _any(talk, max_tokens=12)).text == text:
            return
    if len(texts) > 1:
        raise Lacking("its answers at temperature 0 differ from one request to the next")
    raise Broken("the texts differ, three times")


@check("streaming.choices", "Of several choices each is streamed, and finished")
async def choices(talk: Talk) -> None:
    answer = await _any(talk, "n", n=2, temperature=0.7)
    if sorted(answer.choices) != [0, 1]:
        raise Broken(f"asked for 2, got those with index {sorted(answer.choices)}")
    for choice in answer.choices.values():
        if not choice.finish:
            raise Broken("one is not finished")


@check("streaming.not", "`stream: false` is answered whole")
async def not_streamed(talk: Talk) -> None:
    answer = (await talk.generate(stream=False)).expect()
    if answer.streamed or not answer.choice.finish:
        raise Broken("it is a stream")


@check("streaming.completion", "A completions stream has text and an end")
async def completion(talk: Talk) -> None:
    answer = (await talk.complete(stream=True)).expect()
    if not answer.choice.finish or answer.events[-1].data != DONE:
        raise Broken("it does not end")
    if not answer.text:
        raise Broken("it has no text")


async def _chat(talk: Talk) -> Answer:
    return (await talk.chat(stream=True)).expect()


async def _any(talk: Talk, *needs: str, **fields: Any) -> Answer:
    answer = (await talk.generate(stream=True, **fields)).expect(*needs)
    if not answer.streamed:
        raise Broken("it is not a stream")
    return answer
