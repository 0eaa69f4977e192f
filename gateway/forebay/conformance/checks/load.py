"""Overload and disconnects: too many are told so, and who leaves is not worked for."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from forebay.conformance.answer import DONE, Answer, Broken, Lacking
from forebay.conformance.check import check
from forebay.conformance.talk import PROMPT, Talk

#: Requests at once, at most.
_MOST = 24
#: So many tokens that none is left while one looks.
_LONG = 1500
#: Seconds that may pass until it shows that a client has left.
_PATIENCE = 15.0


@check("overload.ends", "More requests than slots: each is served, or told 429 or 503", alone=True)
async def ends(talk: Talk) -> None:
    for answer in await _crowd(talk):
        _served_or_told(answer)


@check(
    "overload.streams", "More streams than slots: each ends by `[DONE]`, or was told", alone=True
)
async def streams(talk: Talk) -> None:
    for answer in await _crowd(talk, stream=True):
        if _served_or_told(answer) and answer.events[-1].data != DONE:
            raise Broken("a stream ends without [DONE]")


@check("overload.mixed", "At once asked answers are not mixed up", alone=True)
async def mixed(talk: Talk) -> None:
    """Each has a prompt of a length of its own, which its usage must tell."""
    prompts = [" ".join([PROMPT] * times) for times in (1, 3, 5, 7)]
    alone = [(await talk.generate(prompt, max_tokens=2)).expect().usage for prompt in prompts]
    answers = await asyncio.gather(*(talk.generate(prompt, max_tokens=2) for prompt in prompts))
    for usage, answer in zip(alone, answers, strict=True):
        if answer.expect().usage.prompt_tokens != usage.prompt_tokens:
            raise Broken(f"prompts of {usage} were told of {answer.usage}")


async def _crowd(talk: Talk, **fields: Any) -> list[Answer]:
    (await talk.generate(max_tokens=1)).expect()
    count = min(_MOST, 2 * talk.claims.slots + 4)
    return await asyncio.gather(*(talk.generate(max_tokens=3, **fields) for _ in range(count)))


def _served_or_told(answer: Answer) -> bool:
    if answer.status in (429, 503):
        if not answer.error.get("message"):
            raise Broken(f"HTTP {answer.status} without a message")
        return False
    answer.expect()
    return True


@check("disconnect.stream", "Leaving a stream gives its slot back", alone=True, compared=False)
async def stream(talk: Talk) -> None:
    await _leave_stream(talk)
    await _until(talk, "in_flight", 0)


@check(
    "disconnect.stream-stops",
    "Leaving a stream stops the backend's work on it",
    alone=True,
    compared=False,
)
async def stream_stops(talk: Talk) -> None:
    before = await _running(talk)
    async with asyncio.timeout(_PATIENCE * 3):
        await _leave_stream(talk, seen_running=before + 1)
    await _until(talk, "running", before)


@check(
    "disconnect.whole",
    "Leaving while a whole answer is made gives its slot back",
    alone=True,
    compared=False,
)
async def whole(talk: Talk) -> None:
    await _leave_whole(talk)
    await _until(talk, "in_flight", 0)


@check(
    "disconnect.whole-stops",
    "Leaving while a whole answer is made stops the backend's work on it",
    alone=True,
    compared=False,
)
async def whole_stops(talk: Talk) -> None:
    before = await _running(talk)
    await _leave_whole(talk, seen_running=before + 1)
    await _until(talk, "running", before)


def _long(talk: Talk, **fields: Any) -> tuple[str, dict[str, Any]]:
    """Path and body of a long answer, within the context."""
    limit = min(_LONG, talk.claims.max_context // 2 or _LONG)
    return talk.generation(PROMPT, **{"max_tokens": limit, "temperature": 0.7, **fields})


async def _leave_stream(talk: Talk, seen_running: int = 0) -> None:
    async with talk.opened(*_long(talk, stream=True)) as pieces:
        async for piece in pieces:
            if DONE.encode() in piece:
                raise Lacking("the answer was over before it could be left")
            if not seen_running or await _figure(talk, "running") >= seen_running:
                return
    raise Lacking("the answer was over before it could be left")


async def _leave_whole(talk: Talk, seen_running: int = 0) -> None:
    asking = asyncio.create_task(talk.ask(*_long(talk)))
    name, wanted = ("running", seen_running) if seen_running else ("in_flight", 1)
    try:
        while not asking.done() and await _figure(talk, name) < wanted:
            await asyncio.wait([asking], timeout=0.02)
        if asking.done():
            (await asking).expect()
            raise Lacking("the answer was over before it could be left")
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


async def _running(talk: Talk) -> int:
    """Requests that the backend works on. :raises Lacking: it does not tell."""
    (await talk.generate(max_tokens=1)).expect()
    await asyncio.sleep(0.3)  # load is read every 0.2 s
    return await _figure(talk, "running")


async def _figure(talk: Talk, name: str) -> int:
    (backend,) = (await talk.operator("/backends"))["backends"]
    figure: int | None = backend[name]
    if figure is None:
        raise Lacking("the backend does not tell how many requests it works on")
    return figure


async def _until(talk: Talk, name: str, most: int) -> None:
    end = time.monotonic() + _PATIENCE
    while (figure := await _figure(talk, name)) > most:
        if time.monotonic() > end:
            raise Broken(f"{name} is still {figure} after {_PATIENCE:g} s")
        await asyncio.sleep(0.05)
