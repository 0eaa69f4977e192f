"""When a backend may be asked: a state machine without I/O and without a clock of its own.

Active probes decide ``starting``, ``healthy`` and ``unhealthy``. Attempts decide ejection: after a
number of consecutive failures a backend rests, twice as long each time; then one single request is
let through, whose outcome decides. A 4xx, a 429 or a client that left never counts (operators of
other routers learnt why: bad requests would eject healthy servers).
"""

from __future__ import annotations

from typing import Literal

from forebay.config import Health as Settings

State = Literal["starting", "healthy", "unhealthy", "ejected", "draining"]


class Health:
    """Of one backend. Every method takes the current monotonic time in seconds where it matters."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._probed = False
        self._loading = False
        self._probe_failures = 0
        self._failures = 0
        self._ejections = 0
        self._ejected_until = 0.0
        self._busy_until = 0.0
        self._trial = False
        self.draining = False
        #: Why it is not healthy, for people.
        self.reason: str | None = "not probed yet"

    def state(self, now: float) -> State:
        if self.draining:
            return "draining"
        if not self._probed:
            return "starting" if self._loading or not self._probe_failures else "unhealthy"
        if self._probe_failures >= self._settings.probe_failures:
            return "unhealthy"
        if self._ejections and (now < self._ejected_until or self._trial):
            return "ejected"
        return "healthy"

    def busy(self, now: float) -> bool:
        """It said 429 or 503 a moment ago: others come first."""
        return now < self._busy_until

    def probe_ok(self) -> None:
        self._probed = True
        self._probe_failures = 0
        if not self._ejections:
            self.reason = None

    def probe_failed(self, reason: str, *, loading: bool = False) -> None:
        """``loading``: it answered that it is not ready yet."""
        self._loading = loading
        self._probe_failures += 1
        self.reason = reason

    def began(self) -> None:
        """A request is being sent. After an ejection it is the single trial."""
        if self._ejections:
            self._trial = True

    def succeeded(self) -> None:
        self._failures = 0
        self._ejections = 0
        self._trial = False
        self._busy_until = 0.0
        if not self._probe_failures:
            self.reason = None

    def failed(self, now: float, reason: str) -> None:
        """A failure that counts. During a trial one is enough."""
        self._failures += 1
        limit = self._settings.failures
        if limit and (self._trial or self._failures >= limit):
            rest = self._settings.ejection * 2.0**self._ejections
            self._ejected_until = now + min(rest, self._settings.ejection_max)
            self._ejections += 1
            self._failures = 0
            self.reason = reason
        self._trial = False

    def inconclusive(self) -> None:
        """The request ended without a word on the backend's health (4xx, busy, client left)."""
        self._trial = False

    def said_busy(self, now: float, retry_after: float | None) -> None:
        """429 or 503. ``retry_after`` in seconds is capped: a backend must not exclude itself."""
        self._busy_until = now + min(retry_after or 1.0, 10.0)
        self._trial = False
