"""Carrying out a decision: attempts, failover before the first byte, feedback after the last."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator

import structlog
from msgspec import structs

from forebay.admission import Admission
from forebay.api import (
    Attempt,
    AttemptRecord,
    BackendBusy,
    BackendError,
    BackendFailed,
    BackendGarbage,
    ConnectFailed,
    Decision,
    Delta,
    Finished,
    ForebayError,
    NoBackend,
    Outcome,
    Relayed,
    Request,
    StaleConnection,
    Started,
)
from forebay.attempt import Answered, FlightEvent, LiveAttempt, work_of
from forebay.backend import Backend
from forebay.config import Model
from forebay.outcome import kind_of, result_of
from forebay.prefix_index import PrefixIndex
from forebay.recorder import Recorder
from forebay.routing import Choice, Router, refusal
from forebay.sampling import with_defaults
from forebay.telemetry.tracing import RequestTrace
from forebay.usage import UsageCounter
from forebay.watchdog import Watchdog

log = structlog.get_logger("forebay.dispatch")


class Flight:
    """One request on its way. ``open``, iterate over ``events``, and ``close`` in every case."""

    def __init__(
        self, dispatch: Dispatch, request: Request, trace: RequestTrace, arrived: float
    ) -> None:
        self.request = request
        self._dispatch = dispatch
        self._trace = trace
        self._arrived = arrived  # perf_counter
        self._settings = dispatch.models[request.model]
        self._watchdog = Watchdog(self._settings.timeouts.total)
        self._choice: Choice | None = None
        self._attempts: list[AttemptRecord] = []
        self._live: LiveAttempt | None = None
        self._queue = 0.0
        self._overhead = 0.0
        self._ttft: float | None = None
        self._events = 0
        self._finished: Finished | None = None
        self._reasons: dict[int, str] = {}
        #: Events after the first of an answer that does not stream.
        self._gathered: deque[FlightEvent] = deque()
        self._lane = ""

    @property
    def decision(self) -> Decision | None:
        return self._choice.decision if self._choice else None

    @property
    def backend(self) -> str | None:
        """Whose answer this is, once there is one."""
        return self._live.backend.name if self._live else None

    @property
    def attempts(self) -> int:
        return len(self._attempts) + (self._live is not None)

    @property
    def overhead(self) -> float:
        """Seconds from arrival to the first attempt, without the wait in the queue."""
        return self._overhead

    def _now(self) -> float:
        return time.perf_counter() - self._arrived

    async def open(self) -> FlightEvent:
        """The first event of the answer, from whichever candidate gives one.

        :raises ForebayError: nobody did; of several failures the last.
        """
        choice = await self._choose()
        self._overhead = self._now() - self._queue
        error: ForebayError | None = None
        for backend, tokens in zip(choice.backends, choice.tokens, strict=True):
            if len(self._attempts) >= self._settings.max_attempts:
                break
            if error is not None and (backend.full or backend.state() != "healthy"):
                continue  # the world has moved on since the decision
            for _ in range(2):  # a stale connection is tried again on the same backend, once
                try:
                    return await self._first(backend, tokens)
                except StaleConnection as stale:
                    error = stale
                except BackendError as failure:
                    if not failure.retryable:
                        raise
                    error = failure
                    break
        raise error or NoBackend("no attempt was made", retry_after=1.0)

    async def _choose(self) -> Choice:
        """Wait for a turn and decide; again if by then the backends that can do it are full."""
        gate = self._dispatch.admission.gate(self.request.model)
        begun = self._now()
        await gate.enter()
        self._queue = self._now() - begun
        while True:
            start = time.time_ns()
            arrived = time.time() - self._now()
            try:
                choice = self._dispatch.router.choose(self.request, arrived, self._trace.trace_id)
            finally:
                gate.passed()
            self._choice = choice
            self._trace.decided(choice.decision, start, time.time_ns())
            if choice.backends:
                self._dispatch.recorder.started(choice.decision)
                return choice
            gate.pass_on()
            reason = refusal(choice.decision)
            if reason is not None:
                raise reason
            await gate.wait_for_change()
            self._queue = self._now() - begun

    async def _first(self, backend: Backend, tokens: int) -> FlightEvent:
        """One attempt up to its first event that says something."""
        request, settings = self.request, self._settings
        number = len(self._attempts) + 1
        trace = self._trace.attempt(
            number, backend.name, backend.provider, backend.address, request
        )
        attempt = Attempt(number=number, headers=trace.headers, timeouts=settings.timeouts)
        usage = UsageCounter(request, self._dispatch.index)
        live = self._live = LiveAttempt(backend, tokens, trace, usage, self._now())
        live.begin(work_of(backend.adapter, request, attempt))
        self._watchdog.wait("first_token", settings.timeouts.first_token)
        self._events, self._finished = 0, None
        self._reasons.clear()
        self._gathered.clear()
        try:
            event = await self._next(live)
            while isinstance(event, Started):
                event = await self._next(live)
            self._begun(live, event)
            if not request.stream:
                await self._gather(live, event)
        except BackendError as error:
            await self._failed(live, error)
            raise
        return event

    def _begun(self, live: LiveAttempt, first: FlightEvent) -> None:
        self._ttft = self._now()
        live.trace.first_token()
        live.answered(self._ttft - live.started)
        self._lane = "relay" if isinstance(first, Relayed) else "typed"
        self._insert_prefix(live.backend)
        self._dispatch.recorder.first_token(self._choice_made.decision, self._ttft)

    async def _gather(self, live: LiveAttempt, event: FlightEvent) -> None:
        """The rest of an answer that does not stream.

        Nothing of it reaches the client before its end, so until then it can be tried elsewhere.
        """
        while not isinstance(event, Finished):
            self._watchdog.wait("inter_token", self._settings.timeouts.inter_token)
            event = await self._next(live)
            self._gathered.append(event)
        self._watchdog.rest()

    @property
    def _choice_made(self) -> Choice:
        if self._choice is None:
            raise RuntimeError("nothing was decided yet")
        return self._choice

    async def _next(self, live: LiveAttempt) -> FlightEvent:
        """The adapter's next event; whatever goes wrong there becomes a BackendError."""
        try:
            event = await anext(live.events)
        except StopAsyncIteration:
            raise BackendGarbage("the adapter ended without Finished") from None
        except asyncio.CancelledError:
            expired = self._watchdog.catch()
            if expired is None:
                raise
            raise expired from None
        except ForebayError:
            raise
        except Exception as error:
            log.exception("adapter raised", backend=live.backend.name)
            raise BackendFailed(f"the adapter raised {type(error).__name__}") from error
        if isinstance(event, Finished):
            event = self._finished = live.usage.complete(event, self._events)
        elif isinstance(event, Relayed):
            self._events += event.events
        elif isinstance(event, Answered):
            self._events += 1
        elif isinstance(event, Delta):
            self._events += 1
            live.usage.see(event)
            if event.finish_reason is not None:
                self._reasons[event.index] = event.finish_reason
        return event

    async def events(self, first: FlightEvent) -> AsyncIterator[FlightEvent]:
        """All events, ``first`` included; ends after ``Finished``.

        :raises BackendError: the stream broke. Nothing is retried any more.
        """
        live = self._live
        if live is None:
            raise RuntimeError("open it first")
        inter_token = self._settings.timeouts.inter_token
        event = first
        while True:
            # While the client takes its bytes, the backend is not to blame for the pause.
            self._watchdog.rest()
            yield event
            if isinstance(event, Finished):
                return
            if self._gathered:
                event = self._gathered.popleft()
                continue
            self._watchdog.wait("inter_token", inter_token)
            event = await self._next(live)

    async def close(self, status: int, error: BaseException | None) -> Decision:
        """End it: upstream closed, slot back, everything told to whom it concerns.

        ``status``: what the client was sent; 499: it had gone. ``error``: what ended the request,
        None if the answer is complete.
        """
        self._watchdog.stop()
        live, self._live = self._live, None
        if live is not None:
            await self._settle(live, error)
        outcome = Outcome(
            result=result_of(status, error),
            status=status,
            error=None if error is None else kind_of(error),
            queue=self._queue,
            ttft=self._ttft,
            duration=self._now(),
            overhead=self._overhead,
            events=self._events,
            finish_reasons=self._finish_reasons(),
            usage=self._finished.usage if self._finished else None,
            timings=self._finished.timings if self._finished else None,
            lane=self._lane,
        )
        decision = self.decision or self._undecided()
        decision = structs.replace(decision, attempts=tuple(self._attempts), outcome=outcome)
        self._dispatch.recorder.finished(decision, self.request.stream)
        return decision

    def _finish_reasons(self) -> tuple[str, ...]:
        """As the adapter says, or as seen in the typed events."""
        if self._finished is not None and self._finished.finish_reasons:
            return self._finished.finish_reasons
        return tuple(self._reasons[index] for index in sorted(self._reasons))

    def _undecided(self) -> Decision:
        """For a request that left or was refused before it was routed."""
        request = self.request
        return Decision(
            request_id=request.id,
            time=time.time() - self._now(),
            endpoint=request.endpoint,
            model=request.model,
            identity=request.identity,
            policy="",
            policy_version="",
            seed=0,
            candidates=(),
            order=(),
            trace_id=self._trace.trace_id,
        )

    async def _settle(self, live: LiveAttempt, error: BaseException | None) -> None:
        """The last attempt has ended: well, badly in mid-stream, or by the client's leaving."""
        if isinstance(error, BackendError):
            await self._failed(live, error)
            return
        await live.end()
        kind = None if error is None else kind_of(error)
        self._record(live, kind)
        finished = self._finished
        if finished is not None:
            live.backend.health.succeeded()
            self._learn(live.backend, finished)
        else:
            live.backend.health.inconclusive()
        live.trace.end(
            usage=finished.usage if finished else None,
            timings=finished.timings if finished else None,
            finish_reasons=self._finish_reasons(),
            error=kind,
            synthesise=not live.backend.settings.exports_traces,
            lane=self._lane,
            model=finished.model if finished else "",
        )
        self._dispatch.admission.wake()

    async def _failed(self, live: LiveAttempt, error: BackendError) -> None:
        """An attempt failed: tell health, trace and record; free its slot."""
        self._live = None
        await live.end()
        backend = live.backend
        now = time.monotonic()
        backend.failures += 1
        if isinstance(error, BackendBusy):
            backend.health.said_busy(now, error.retry_after)
        elif error.counts:
            backend.health.failed(now, error.message)
            if isinstance(error, ConnectFailed):
                backend.doubt.set()
        else:
            backend.health.inconclusive()
        self._record(live, error.kind)
        live.trace.end(
            error=error.kind,
            synthesise=not live.backend.settings.exports_traces,
            lane=self._lane,
        )
        log.warning(
            "attempt failed",
            request_id=self.request.id,
            backend=backend.name,
            attempt=len(self._attempts),
            error=error.kind,
            reason=error.message,
        )
        self._dispatch.admission.wake()

    def _record(self, live: LiveAttempt, error: str | None) -> None:
        self._attempts.append(
            AttemptRecord(live.backend.name, live.started, self._now() - live.started, error)
        )
        self._dispatch.recorder.attempt(live.backend.name, error)

    def _insert_prefix(self, backend: Backend) -> None:
        key = self._choice_made.key
        if key is not None:
            self._dispatch.index.insert(key, backend.name)

    def _learn(self, backend: Backend, finished: Finished) -> None:
        choice = self._choice_made
        if choice.key is None or finished.usage is None:
            return
        predicted = next(
            c.prefix_tokens for c in choice.decision.candidates if c.backend == backend.name
        )
        self._dispatch.index.learn(choice.key, backend.name, finished.usage, predicted)


class Dispatch:
    """Makes flights; holds what they all need."""

    def __init__(
        self,
        models: dict[str, Model],
        admission: Admission,
        router: Router,
        index: PrefixIndex,
        recorder: Recorder,
    ) -> None:
        self.models = models
        self.admission = admission
        self.router = router
        self.index = index
        self.recorder = recorder

    def flight(self, request: Request, trace: RequestTrace, arrived: float) -> Flight:
        """``arrived`` by ``time.perf_counter``.

        :raises UnknownModel: nobody serves the request's model.
        """
        self.router.check_model(request.model)
        request = with_defaults(request, self.models[request.model].sampling)
        return Flight(self, request, trace, arrived)
