"""Telling observers: a bounded queue and one task, so that no request ever waits for a plugin."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping

import structlog

from forebay.api import Decision, Observer

log = structlog.get_logger("forebay.observers")

#: Events that may wait; the newest are dropped beyond. At 1,000 requests/s three seconds' worth.
QUEUE = 10_000
#: An observer that raises this often in a row is detached.
STRIKES = 10
#: Seconds that closing waits for what is queued, and then for each observer's ``aclose``.
CLOSE_TIMEOUT = 5.0

Call = Callable[[Observer], Awaitable[None]]


class Observers:
    """All observers of one gateway; each is called in the order of the events, one at a time."""

    def __init__(self, observers: list[Observer]) -> None:
        self._attached = list(observers)
        self._all = list(observers)
        # By identity: an observer may be of a type that can not be hashed.
        self._strikes: Counter[int] = Counter()
        self._failures: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._queue: deque[tuple[str, Call]] = deque()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def started(self, decision: Decision) -> None:
        self._put("started", lambda observer: observer.started(decision))

    def first_token(self, decision: Decision, seconds: float) -> None:
        self._put("first_token", lambda observer: observer.first_token(decision, seconds))

    def finished(self, decision: Decision) -> None:
        self._put("finished", lambda observer: observer.finished(decision))

    def failures(self) -> Mapping[str, int]:
        """Calls that raised, by the observer's class."""
        return dict(self._failures)  # a copy: scrapes run in a thread

    def dropped(self) -> Mapping[str, int]:
        """Events that found the queue full, by kind."""
        return dict(self._dropped)

    async def aclose(self) -> None:
        """Deliver what is queued, for a bounded time, then close the observers."""
        task, self._task = self._task, None
        if task is not None:
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await self._idle.wait()
            except TimeoutError:
                log.warning("observers too slow, events lost", events=len(self._queue))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._attached.clear()
        observers, self._all = self._all, []
        for observer in observers:
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await observer.aclose()
            except Exception:
                log.exception("observer failed to close", observer=type(observer).__name__)

    def _put(self, event: str, call: Call) -> None:
        if not self._attached:
            return
        if len(self._queue) >= QUEUE:
            self._dropped[event] += 1
            return
        self._queue.append((event, call))
        self._idle.clear()
        self._wake.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._deliver(), name="forebay-observers")

    async def _deliver(self) -> None:
        while True:
            await self._wake.wait()
            while self._queue:
                event, call = self._queue.popleft()
                for observer in tuple(self._attached):
                    await self._tell(observer, event, call)
                # One that never awaits must not keep the loop from the streams.
                await asyncio.sleep(0)
            self._wake.clear()
            self._idle.set()

    async def _tell(self, observer: Observer, event: str, call: Call) -> None:
        name = type(observer).__name__
        try:
            await call(observer)
        except Exception:
            self._failures[name] += 1
            self._strikes[id(observer)] += 1
            log.exception("observer raised", observer=name, event_kind=event)
            if self._strikes[id(observer)] >= STRIKES:
                self._attached.remove(observer)
                log.error("observer detached", observer=name, failures_in_a_row=STRIKES)
        else:
            self._strikes[id(observer)] = 0
