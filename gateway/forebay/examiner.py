"""When a backend is examined: when it joins, and when it is no longer the one that was examined."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from contextlib import aclosing, suppress

import structlog

from forebay.api import Capabilities
from forebay.backend import Backend
from forebay.examination import Examination, Finding, Question, questions
from forebay.questions import examine

log = structlog.get_logger("forebay.examiner")

#: Seconds for all questions together; until then requests wait that need an answer to one.
LIMIT = 60.0
#: How often what could not be told is asked again, and the seconds before the first time; then
#: twice as many each time.
RETRIES, PAUSE = 4, 30.0


class Examiner:
    """Of one backend. It never speaks to health, and what it asks counts as nobody's request."""

    def __init__(self, backend: Backend, model: str, on_change: Callable[[], None]) -> None:
        """``model``: a name under which the gateway serves it. ``on_change``: called with each
        finding, as it may be what a request waits for."""
        self._backend = backend
        self._model = model
        self._on_change = on_change
        #: Version and models of what was, or is being, examined.
        self._known: tuple[str, tuple[str, ...]] | None = None
        self._task: asyncio.Task[None] | None = None

    def probed(self, claims: Capabilities) -> None:
        """A probe has succeeded: begin, unless it is the one that was examined."""
        identity = (claims.version, claims.models)
        if identity == self._known:
            return
        self._known = identity
        if self._task is not None:
            self._task.cancel()
        asked = questions(claims)
        self._backend.examination = Examination(
            version=claims.version, began=time.time(), pending=asked
        )
        self._task = asyncio.create_task(self._examine(claims, asked))

    def lost(self) -> None:
        """The backend is gone. One that tells no version may come back as another."""
        if self._known is not None and not self._known[0]:
            self._known = None

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _examine(self, claims: Capabilities, asked: Collection[Question]) -> None:
        pause = PAUSE
        for _ in range(1 + RETRIES):
            if not asked:
                return
            found = await self._ask(claims, asked)
            told = {
                question: f"{finding.verdict}: {finding.reason}".removesuffix(": ")
                for question, finding in found.items()
            }
            log.info("examined", backend=self._backend.name, version=claims.version, **told)
            asked = [question for question, finding in found.items() if finding.again]
            await asyncio.sleep(pause)
            pause *= 2

    async def _ask(
        self, claims: Capabilities, asked: Collection[Question]
    ) -> dict[Question, Finding]:
        """Ask as many as there is time for; the others could not be told for now."""
        backend = self._backend
        found: dict[Question, Finding] = {}
        findings = examine(backend.adapter, claims, self._model, asked, lambda: backend.in_flight)
        with suppress(TimeoutError):
            async with asyncio.timeout(LIMIT), aclosing(findings):
                await self._room()
                async for question, finding in findings:
                    found[question] = finding
                    self._tell(question, finding)
                    await self._room()
        for question in asked:
            if question not in found:
                found[question] = Finding("unknown", f"not told within {LIMIT:g} s", again=True)
                self._tell(question, found[question])
        return found

    async def _room(self) -> None:
        """Wait until it is well and no client's request would be kept waiting."""
        while True:
            if self._backend.state() == "healthy" and not self._backend.full:
                return
            await asyncio.sleep(0.1)

    def _tell(self, question: Question, finding: Finding) -> None:
        if self._backend.examination is not None:
            self._backend.examination = self._backend.examination.with_finding(question, finding)
        self._on_change()
