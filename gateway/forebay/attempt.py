"""One attempt under way: the adapter's stream, and the load it puts on its backend."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

from msgspec import Struct

from forebay.api import (
    Adapter,
    Attempt,
    Event,
    Finished,
    GenerateRequest,
    Operation,
    Request,
    Result,
)
from forebay.backend import Backend
from forebay.telemetry.tracing import AttemptTrace
from forebay.usage import UsageCounter


class Answered(Struct, frozen=True):
    """The whole answer to an operation that generates no text."""

    result: Result


FlightEvent = Event | Answered


class LiveAttempt:
    """Counted in its backend's load from :meth:`begin` to :meth:`end`."""

    def __init__(
        self,
        backend: Backend,
        tokens: int,
        trace: AttemptTrace,
        usage: UsageCounter,
        started: float,
    ) -> None:
        self.backend = backend
        self.trace = trace
        self.usage = usage
        #: Seconds after the request's arrival.
        self.started = started
        self.events: AsyncIterator[FlightEvent]
        self._tokens = tokens

    def begin(self, events: AsyncIterator[FlightEvent]) -> None:
        self.events = events
        self.backend.in_flight += 1
        self.backend.queued_tokens += self._tokens
        self.backend.requests += 1
        self.backend.health.began()

    def answered(self, ttft: float) -> None:
        """The first event has come: its prompt is no longer queued there."""
        self.backend.first_token(ttft)
        self._dequeue()

    def _dequeue(self) -> None:
        self.backend.queued_tokens -= self._tokens
        self._tokens = 0

    async def end(self) -> None:
        """Close the adapter's stream, with it the upstream, and give the slot back."""
        self._dequeue()
        self.backend.in_flight -= 1
        if isinstance(self.events, AsyncGenerator):
            await self.events.aclose()


def work_of(adapter: Adapter, request: Request, attempt: Attempt) -> AsyncIterator[FlightEvent]:
    """The adapter's stream for any kind of request."""
    if isinstance(request, GenerateRequest):
        return adapter.stream(request, attempt)
    return _one(adapter, request, attempt)


async def _one(
    adapter: Adapter, request: Operation, attempt: Attempt
) -> AsyncIterator[FlightEvent]:
    """An operation as a stream of one answer, so that all that holds for streams holds for it."""
    result = await adapter.perform(request, attempt)
    yield Answered(result)
    yield Finished(result.usage, model=result.model)
