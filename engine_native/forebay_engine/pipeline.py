"""The steps under way: launched in order, their results taken in order.

With a runner that runs ahead, step N + 1 is launched before the result of step N is waited for, so
that the device always has one to go on with. A step that fails takes the one behind it along, whose
rows began with tokens that were never drawn: that one is waited for, and forgotten.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from concurrent.futures import Executor
from dataclasses import dataclass

from forebay_engine.isolation import Outcome, execute
from forebay_engine.scheduler import Scheduler
from forebay_engine.step import StepPlan, StepResult
from forebay_engine.step_runner import Finished, Launched, StepRunner

log = logging.getLogger("forebay_engine")


@dataclass(frozen=True, slots=True)
class _NotLaunched:
    error: Exception

    def result(self) -> StepResult:
        raise self.error


class Pipeline:
    """Executes the scheduler's plans, all in one thread, which ``thread`` has to be."""

    def __init__(self, runner: StepRunner, scheduler: Scheduler, thread: Executor) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._thread = thread
        self._most = scheduler.most_in_flight
        #: Touched in the thread only, while nobody else looks.
        self._launched: deque[Launched] = deque()

    @property
    def empty(self) -> bool:
        return not self._launched

    async def advance(self, plan: StepPlan | None) -> Outcome | None:
        """Launch a step; what the oldest came to, if there is none to launch, or enough are.

        The scheduler has not applied the outcome yet.
        """
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, self._go_on, plan)
        except Exception:
            log.exception("a step failed, its rows are tried again")
        while self._launched:
            await loop.run_in_executor(self._thread, self._drain)
            self._scheduler.discard()
        again = self._scheduler.retry()
        return await loop.run_in_executor(self._thread, execute, self._runner.execute, again)

    def _go_on(self, plan: StepPlan | None) -> Outcome | None:
        if plan is not None:
            self._launched.append(self._launch(plan))
            if len(self._launched) < self._most:
                return None
        return Outcome(self._launched.popleft().result(), {})

    def _launch(self, plan: StepPlan) -> Launched:
        try:
            if self._most == 1:
                return Finished(self._runner.execute(plan))
            return self._runner.launch(plan)
        except Exception as error:
            log.exception("a step could not be launched")
            return _NotLaunched(error)

    def _drain(self) -> None:
        try:
            self._launched.popleft().result()
        except Exception:
            log.exception("so did the step behind it")
