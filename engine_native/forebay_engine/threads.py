"""How many threads compute a step: timed with real steps, again when neighbours come or go.

On a shared machine a second thread can cost more than it gives: the step waits for the part that
lies with a thread which the neighbour has displaced. No token depends on the number, so the steps
that are timed are those of requests.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

#: Seconds between two looks at the machine; twice as many after each trial that changed nothing.
_PERIOD, _LONGEST_PERIOD = 1.0, 8.0
#: Share of the time that threads were ready but had no core, from which on neighbours matter.
_CROWDED = 0.1
#: Timed steps of each number of threads.
_SAMPLES = 3
#: Steps after which a trial is given up because too few were alike.
_PATIENCE = 32

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Trial:
    """Steps of one shape, timed with each number of threads in turn."""

    shape: tuple[int, int]
    seconds: dict[int, list[float]]
    left: int = field(default=_PATIENCE)


class ThreadPolicy:
    """The number for each next step, from ``choices``; ``waited`` and ``clock`` are in seconds."""

    def __init__(
        self,
        choices: Sequence[int],
        current: int,
        waited: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._choices = tuple(choices)
        self._current = current
        self._waited, self._clock = waited, clock
        self._trial: _Trial | None = None
        self._begun, self._used = 0.0, current
        self._looked, self._had_waited = clock(), waited()
        self._period = _PERIOD

    @property
    def current(self) -> int:
        return self._current

    def begin(self, rows: int, tokens: int) -> int:
        """The number of threads for a step of this shape, which begins now."""
        self._used = self._current
        trial = self._trial
        if trial is not None and trial.shape == (rows, tokens):
            self._used = min(trial.seconds, key=lambda number: len(trial.seconds[number]))
        self._begun = self._clock()
        return self._used

    def end(self, rows: int, tokens: int) -> None:
        """The step that began last has ended."""
        now = self._clock()
        if self._trial is not None:
            self._judge(self._trial, (rows, tokens), now - self._begun)
        elif now - self._looked >= self._period and len(self._choices) > 1:
            self._look(now, (rows, tokens))

    def _look(self, now: float, shape: tuple[int, int]) -> None:
        waited = self._waited()
        crowded = waited - self._had_waited > _CROWDED * (now - self._looked)
        self._looked, self._had_waited = now, waited
        # With fewer threads than there are cores a trial costs little and may win much.
        if crowded or self._current < max(self._choices):
            self._trial = _Trial(shape, {number: [] for number in self._choices})

    def _judge(self, trial: _Trial, shape: tuple[int, int], seconds: float) -> None:
        trial.left -= 1
        if shape == trial.shape:
            trial.seconds[self._used].append(seconds)
        if min(map(len, trial.seconds.values())) >= _SAMPLES:
            times = {number: median(found) for number, found in trial.seconds.items()}
            best = min(times, key=lambda number: times[number])
            if best == self._current:
                self._period = min(2.0 * self._period, _LONGEST_PERIOD)
            else:
                self._period = _PERIOD
                found = ", ".join(f"{n}: {1000 * t:.1f} ms" for n, t in times.items())
                log.info("compute threads: %d (one step by threads: %s)", best, found)
            self._current = best
        elif trial.left > 0:
            return
        self._trial = None
        self._looked, self._had_waited = self._clock(), self._waited()


def run_queue_wait() -> float:
    """Seconds that this process's threads were ready to run but had no core, on Linux; else 0.

    The second figure of ``/proc/.../schedstat`` (nanoseconds; Linux, Documentation/scheduler).
    """
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except OSError:  # the thread has ended meanwhile
            continue
    return total / 1e9
