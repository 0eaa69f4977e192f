"""One timer for all timeouts of a request, cheap enough to be touched for every event.

``asyncio.timeout`` around each read would arm and disarm a timer per event. This one moves a
deadline and leaves the armed timer alone; a timer that fires too early just re-arms itself.
"""

from __future__ import annotations

import asyncio
from math import inf

from forebay.api import BackendTimeout


class Watchdog:
    """Cancels the current task when what is being waited for takes too long.

    ``total`` in seconds from now; 0: no limit.
    """

    def __init__(self, total: float) -> None:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a watchdog watches the task that makes it")
        self._task = task
        self._total = total
        self._end = self._loop.time() + total if total else inf
        self._due = inf
        self._phase = ""
        self._seconds = 0.0
        # Armed by the first wait: until then the request is queued, which has a timeout of its own.
        self._timer: asyncio.TimerHandle | None = None
        #: Set once it has cancelled the task.
        self.expired: BackendTimeout | None = None

    def wait(self, phase: str, seconds: float) -> None:
        """From now on, ``seconds`` for the next thing to happen; 0: as long as it takes."""
        self._phase, self._seconds = phase, seconds
        self._due = self._loop.time() + seconds if seconds else inf
        if self._timer is None or self._due < self._timer.when():
            self._arm(min(self._due, self._end))

    def rest(self) -> None:
        """Nothing is being waited for; only the total counts."""
        self._due = inf

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self, when: float) -> None:
        self.stop()
        self._timer = self._loop.call_at(when, self._fire) if when < inf else None

    def _fire(self) -> None:
        self._timer = None
        now = self._loop.time()
        if now >= self._end:
            self._expire(BackendTimeout("total", self._total))
        elif now >= self._due:
            self._expire(BackendTimeout(self._phase, self._seconds))
        else:
            self._arm(min(self._due, self._end))

    def _expire(self, timeout: BackendTimeout) -> None:
        self.expired = timeout
        self._task.cancel()

    def catch(self) -> BackendTimeout | None:
        """To be called where the cancellation arrives: the timeout if it came from here."""
        expired, self.expired = self.expired, None
        if expired is not None:
            self._task.uncancel()
        return expired
