"""The relay: a raw ASGI handler for every route that asks a backend.

Written against ASGI itself because what matters here cannot be had above it: the upstream is
closed within milliseconds when the client leaves, the next upstream read waits for the client's
socket, and an event costs one ``send``.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import structlog
from litestar.types import Receive, Scope, Send

from forebay.access import Access
from forebay.api import Finished, ForebayError
from forebay.attempt import FlightEvent
from forebay.config import Limits
from forebay.dispatch import Dispatch, Flight
from forebay.http.intake import ClientLeft, read_body, read_headers, request_id
from forebay.http.reply import (
    Arrival,
    Dialect,
    Headers,
    Reply,
    internal_error,
    send_body,
    send_error,
)
from forebay.telemetry import logs
from forebay.telemetry.tracing import RequestTrace, Tracing

log = structlog.get_logger("forebay.http")

_STREAM_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
]


class Relay:
    """One route, in one dialect."""

    def __init__(
        self,
        dialect: Dialect,
        dispatch: Dispatch,
        access: Access,
        limits: Limits,
        tracing: Tracing,
    ) -> None:
        self._dialect = dialect
        self._dispatch = dispatch
        self._access = access
        self._limits = limits
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer_headers: Headers = []
        trace: RequestTrace | None = None
        try:
            headers = read_headers(scope["headers"], self._limits.header_bytes)
            rid = request_id(headers)
            answer_headers.append((b"x-request-id", rid.encode()))
            trace = self._tracing.request(self._dialect.template, "POST", headers)
            logs.in_request(rid, trace.trace_id)
            identity = self._access.identify(headers)
            body = await read_body(receive, headers, self._limits.body_bytes)
            began = time.perf_counter()
            arrival = Arrival(
                body=body,
                request_id=rid,
                created=int(time.time()),
                identity=identity,
                headers=headers,
                parameters=scope.get("path_params", {}),
            )
            request, reply = self._dialect.decode(arrival, self._limits)
            flight = self._dispatch.flight(request, trace, began)
        except ForebayError as error:
            await self._refuse(error, send, answer_headers, trace)
        except Exception:
            log.exception("reading a request failed")
            await self._refuse(internal_error(), send, answer_headers, trace)
        else:
            exchange = Exchange(flight, reply, self._dialect, trace, send, answer_headers)
            await exchange.run(receive)

    async def _refuse(
        self, error: ForebayError, send: Send, headers: Headers, trace: RequestTrace | None
    ) -> None:
        if not isinstance(error, ClientLeft):
            await send_error(send, self._dialect, error, headers)
        self._dispatch.recorder.refused(self._dialect.endpoint, error.kind)
        if trace is not None:
            trace.end(self._dialect.status(error), None, error.kind)


class Exchange:
    """One request being answered."""

    def __init__(
        self,
        flight: Flight,
        reply: Reply,
        dialect: Dialect,
        trace: RequestTrace,
        send: Send,
        headers: Headers,
    ) -> None:
        self._flight = flight
        self._reply = reply
        self._dialect = dialect
        self._trace = trace
        self._send = send
        self._headers = headers
        self._status = 0
        self._task = asyncio.current_task()
        # All has been sent: the server reports that, too, as a disconnect.
        self._answered = False

    async def run(self, receive: Receive) -> None:
        """Answer; whatever happens, the flight is closed and the trace ended."""
        leaving = asyncio.create_task(self._watch_client(receive))
        error: BaseException | None = None
        try:
            await self._answer()
        except ForebayError as failure:
            error = failure
            await self._fail(failure)
        except asyncio.CancelledError as cancelled:
            error = cancelled
            if not leaving.done() or self._task is None:
                raise  # the server stops; not the client
            self._task.uncancel()
            self._status = 499
        except Exception as bug:
            error = bug
            log.exception("request failed", request_id=self._flight.request.id)
            await self._fail(internal_error())
        finally:
            leaving.cancel()
            decision = await self._flight.close(self._status, error)
            kind = decision.outcome.error if decision.outcome else None
            self._trace.end(self._status, decision, kind)

    async def _answer(self) -> None:
        first = await self._flight.open()
        self._headers += self._routing_headers()
        if self._flight.request.stream:
            await self._stream(first)
        else:
            await self._whole(first)

    def _routing_headers(self) -> Headers:
        flight = self._flight
        policy = flight.decision.policy if flight.decision else ""
        return [
            (b"x-forebay-backend", (flight.backend or "").encode()),
            (b"x-forebay-policy", policy.encode()),
            (b"x-forebay-attempts", str(flight.attempts).encode()),
            (b"x-forebay-overhead-ms", f"{flight.overhead * 1e3:.3f}".encode()),
        ]

    async def _stream(self, first: FlightEvent) -> None:
        self._status = 200
        send, chunk = self._send, self._reply.chunk
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [*_STREAM_HEADERS, *self._headers],
            }
        )
        async for event in self._flight.events(first):
            data = chunk(event)
            self._answered = isinstance(event, Finished)
            if data or self._answered:
                await send(
                    {"type": "http.response.body", "body": data, "more_body": not self._answered}
                )

    async def _whole(self, first: FlightEvent) -> None:
        body = b""
        reply = self._reply
        async for event in self._flight.events(first):
            if isinstance(event, Finished):
                body = reply.body(event)
            else:
                reply.add(event)
        self._status = 200
        self._answered = True
        headers = [*self._headers, *reply.headers]
        await send_body(self._send, 200, headers, body, reply.content_type)

    async def _fail(self, error: ForebayError) -> None:
        """Before the first byte an error response; after it an error event, and no ``[DONE]``."""
        self._answered = True
        if self._status == 0:
            self._status = self._dialect.status(error)
            self._headers.append((b"x-forebay-attempts", str(self._flight.attempts).encode()))
            await send_error(self._send, self._dialect, error, self._headers)
            return
        # The connection may be gone as well; then there is nobody left to tell.
        with suppress(OSError):
            data = self._reply.failure(error)
            await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def _watch_client(self, receive: Receive) -> None:
        """Cancel the answering task when the client closes its connection."""
        while (await receive())["type"] != "http.disconnect":
            pass
        if self._task is not None and not self._answered:
            self._task.cancel()
