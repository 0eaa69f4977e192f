"""Several streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from forebay_plugins.interleave import interleave


class Streams:
    """Streams that say numbers when they may, and tell how many of them run."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.most = 0
        self.closed: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}

    async def say(
        self, name: str, count: int, error: Exception | None = None
    ) -> AsyncGenerator[str, None]:
        self.running.add(name)
        self.most = max(self.most, len(self.running))
        try:
            for number in range(count):
                if name in self.gates:
                    await self.gates[name].wait()
                await asyncio.sleep(0)
                yield f"{name}{number}"
            if error:
                raise error
        finally:
            self.running.discard(name)
            self.closed.append(name)


async def test_a_slow_stream_does_not_hold_up_the_others() -> None:
    streams = Streams()
    streams.gates["a"] = asyncio.Event()
    found: list[str] = []
    async for piece in interleave([streams.say("a", 2), streams.say("b", 3)], 2):
        found.append(piece)
        if piece == "b2":
            streams.gates["a"].set()
    assert found == ["b0", "b1", "b2", "a0", "a1"]


@pytest.mark.parametrize("at_once", [1, 2, 5, 9])
async def test_no_more_run_than_may(at_once: int) -> None:
    streams = Streams()
    said = [streams.say(name, 3) for name in "abcde"]
    found = [piece async for piece in interleave(said, at_once)]
    assert sorted(found) == [f"{name}{number}" for name in "abcde" for number in range(3)]
    assert streams.most == min(at_once, 5)
    if at_once == 1:
        assert found == sorted(found)


async def test_one_that_fails_ends_all() -> None:
    streams = Streams()
    streams.gates["b"] = asyncio.Event()
    said = [streams.say("a", 1, ValueError("a")), streams.say("b", 1), streams.say("c", 1)]
    with pytest.raises(ValueError, match="a"):
        async for _ in interleave(said, 2):
            pass
    assert not streams.running
    assert streams.closed == ["a", "b"]


@pytest.mark.parametrize("count", [1, 3])
async def test_leaving_closes_all(count: int) -> None:
    streams = Streams()
    async with aclosing(interleave([streams.say(n, 99) for n in "abc"[:count]], 2)) as pieces:
        await anext(pieces)
        assert streams.running
    assert not streams.running
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_consumer_that_waits_is_waited_for() -> None:
    """At most one piece of each stream is ahead."""
    said: list[int] = []

    async def eager() -> AsyncGenerator[int, None]:
        for number in range(100):
            said.append(number)
            yield number

    async with aclosing(interleave([eager(), eager()], 2)) as pieces:
        await anext(pieces)
        for _ in range(50):
            await asyncio.sleep(0)
    assert len(said) <= 4
