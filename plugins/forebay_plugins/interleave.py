"""Several streams as one, each piece as soon as it is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import TypeVar

__all__ = ["interleave"]

T = TypeVar("T")


async def interleave(
    streams: Iterable[AsyncGenerator[T, None]], at_once: int
) -> AsyncGenerator[T, None]:
    """What the streams yield; ``at_once`` of them run, the others wait for their turn.

    Each is at most one piece ahead of the consumer. One that fails ends all; leaving closes all.
    """
    waiting = list(streams)
    if len(waiting) == 1:  # the common case needs no tasks
        async with aclosing(waiting[0]) as only:
            async for item in only:
                yield item
        return
    running: dict[asyncio.Task[T | None], AsyncGenerator[T, None]] = {}

    def go_on(stream: AsyncGenerator[T, None]) -> None:
        running[asyncio.ensure_future(_next(stream))] = stream

    try:
        while running or waiting:
            while waiting and len(running) < at_once:
                go_on(waiting.pop(0))
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                piece, stream = task.result(), running.pop(task)
                if piece is not None:
                    go_on(stream)
                    yield piece
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for stream in (*running.values(), *waiting):
            await stream.aclose()


async def _next(stream: AsyncGenerator[T, None]) -> T | None:
    return await anext(stream, None)
