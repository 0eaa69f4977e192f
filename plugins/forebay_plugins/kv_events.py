"""Following the KV-cache events that vLLM and SGLang publish over ZeroMQ.

A message is three frames: topic, number (8 bytes, big endian, from 0), payload. What was missed can
be asked for again, as far as the publisher still has it, by sending the number to begin with to its
replay address from a DEALER: ``["", number]``. It answers ``["", topic, number, payload]`` for each
(without the topic up to vLLM 0.11, and SGLang), the last with -1 for its number.

A publisher that restarts begins at 0 again. Its old messages may still be on their way then, so a
lost connection ends a session: all that was told is withdrawn, and nothing of it is read any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from forebay.api import (
    BackendFailed,
    BackendGarbage,
    CacheBatch,
    CacheCleared,
    CacheEvent,
    ConfigError,
    HttpBackendSettings,
)
from forebay_plugins.kv_event_format import KvEventDecoder

if TYPE_CHECKING:
    import zmq.asyncio

__all__ = ["KvEventSettings", "KvEvents", "Numbered"]

#: Seconds without a word after which a replay is taken to have ended.
_PATIENCE = 5.0
#: Milliseconds between pings, and without an answer to one, after which a connection is lost.
_PING, _LOST = 5000, 15000

#: The number that ends a replay: -1.
_END = (1 << 64) - 1
#: Seconds in which an address that was just closed comes free.
_FREED = 2.0

Address = Annotated[
    str, Meta(pattern=r"^((tcp|ipc)://.+)?$", description="an address like tcp://… or ipc://…")
]


class KvEventSettings(HttpBackendSettings, kw_only=True, frozen=True):
    """Settings of backends that publish KV-cache events over ZeroMQ."""

    kv_events: Address = ""
    """Where its KV-cache events are heard, e.g. `tcp://127.0.0.1:5557` or `ipc:///run/kv.ipc`;
    empty: they are not. Needs `pip install forebay[kv-events]`."""
    kv_events_bind: bool = False
    """Listen at that address and let the backend connect. vLLM does so unless its `endpoint` is an
    `ipc://` one or has a `*` in it."""
    kv_events_topic: str = ""
    """Topic under which it publishes; empty: any."""
    kv_events_replay: Address = ""
    """Its `replay_endpoint`, where missed events are asked for again; empty: what is missed is
    lost, and with it all that was known of the cache."""


class Numbered:
    """Messages in the order of their numbers, whichever way they came, as batches of events."""

    def __init__(self) -> None:
        self._decoder = KvEventDecoder()
        #: Of the next message; None before the first.
        self._next: int | None = None

    @property
    def begun(self) -> bool:
        return self._next is not None

    def misses(self, number: int) -> int | None:
        """The first of the messages that are missing before this one; None if there is none."""
        wanted = self._next or 0
        return wanted if number > wanted else None

    def take(self, number: int, payload: bytes, *, replayed: bool = False) -> CacheBatch | None:
        """What the message says; None if it was taken before.

        What is missing before it is given up for lost: then all that was told before is withdrawn.
        """
        wanted = number if self._next is None else self._next
        if number < wanted:
            return None
        self._next = number + 1
        events: tuple[CacheEvent, ...] = ()
        if number > wanted:
            events = (CacheCleared(lost=f"messages {wanted} to {number - 1} cannot be had"),)
        try:
            events += self._decoder.decode(payload)
        except BackendGarbage as wrong:
            events = (CacheCleared(lost=wrong.message),)
        return CacheBatch(events=events, sequence=number, replayed=replayed)


class KvEvents:
    """The events of one publisher.

    :raises ConfigError: pyzmq is not installed.
    """

    def __init__(self, settings: KvEventSettings) -> None:
        try:
            import zmq.asyncio
            import zmq.utils.monitor
        except ImportError:
            raise ConfigError("`kv_events` needs pyzmq: pip install forebay[kv-events]") from None
        self._zmq = zmq
        self._settings = settings

    async def batches(self) -> AsyncGenerator[CacheBatch, None]:
        """For ever, over the publisher's restarts too.

        :raises BackendError: the address cannot be used, or what comes from there are no events.
        """
        context = self._zmq.asyncio.Context()
        try:
            while True:
                numbered = Numbered()
                async with aclosing(self._session(context, numbered)) as session:
                    async for batch in session:
                        yield batch
                if numbered.begun:
                    yield CacheBatch(events=(CacheCleared(lost="the connection was lost"),))
        finally:
            context.destroy(linger=0)

    async def _session(
        self, context: zmq.asyncio.Context, numbered: Numbered
    ) -> AsyncGenerator[CacheBatch, None]:
        """Until the connection is lost, or the publisher begins anew behind it."""
        latest = -1
        with context.socket(self._zmq.SUB) as socket, self._monitor(socket) as monitor:
            await self._open(socket)
            while (heard := await self._heard(socket, monitor)) != "gone":
                number, payload = (None, b"") if heard == "connected" else heard
                if number is not None and number <= latest:
                    return
                missing = 0 if number is None else numbered.misses(number)
                if missing is not None:
                    async for batch in self._replayed(context, numbered, missing):
                        yield batch
                if number is not None:
                    latest = number
                    found = numbered.take(number, payload)
                    if found is not None:
                        yield found

    def _monitor(self, socket: zmq.asyncio.Socket) -> zmq.asyncio.Socket:
        """Tells of connections made and lost."""
        event = self._zmq.Event
        return socket.get_monitor_socket(event.HANDSHAKE_SUCCEEDED | event.DISCONNECTED)

    async def _open(self, socket: zmq.asyncio.Socket) -> None:
        settings, zmq = self._settings, self._zmq
        socket.linger = 0
        socket.heartbeat_ivl, socket.heartbeat_timeout = _PING, _LOST
        socket.subscribe(settings.kv_events_topic)
        give_up = asyncio.get_running_loop().time() + _FREED
        while True:
            try:
                if settings.kv_events_bind:
                    socket.bind(settings.kv_events)
                else:
                    socket.connect(settings.kv_events)
            except zmq.ZMQError as error:
                # The socket of a session before lets go of its address in the background.
                late = asyncio.get_running_loop().time() > give_up
                if late or error.errno != zmq.Errno.EADDRINUSE:
                    raise BackendFailed(f"kv_events: {settings.kv_events}: {error}") from None
            else:
                return
            await asyncio.sleep(0.05)

    async def _heard(
        self, socket: zmq.asyncio.Socket, monitor: zmq.asyncio.Socket
    ) -> Literal["connected", "gone"] | tuple[int, bytes]:
        poller = self._zmq.asyncio.Poller()
        poller.register(socket, self._zmq.POLLIN)
        poller.register(monitor, self._zmq.POLLIN)
        while True:
            ready = dict(await poller.poll())
            if monitor in ready:  # first: what still comes of a lost connection is not to be read
                told = await self._zmq.utils.monitor.recv_monitor_message(monitor)
                lost = told["event"] == self._zmq.Event.DISCONNECTED
                return "gone" if lost else "connected"
            topic, *message = await socket.recv_multipart()
            if self._settings.kv_events_topic.encode() in (b"", topic):  # it subscribes to prefixes
                return _message(message)

    async def _replayed(
        self, context: zmq.asyncio.Context, numbered: Numbered, start: int
    ) -> AsyncGenerator[CacheBatch, None]:
        """What the publisher still has from this number on."""
        if not self._settings.kv_events_replay:
            return
        with context.socket(self._zmq.DEALER) as dealer:
            dealer.linger = 0
            dealer.rcvhwm = 0  # bounded by what it keeps; what does not fit, it would drop
            try:
                dealer.connect(self._settings.kv_events_replay)
            except self._zmq.ZMQError as error:
                address = self._settings.kv_events_replay
                raise BackendFailed(f"kv_events_replay: {address}: {error}") from None
            await dealer.send_multipart([b"", start.to_bytes(8, "big")])
            while await dealer.poll(_PATIENCE * 1000):
                number, payload = _message((await dealer.recv_multipart())[-2:])
                if number == _END:
                    return
                batch = numbered.take(number, payload, replayed=True)
                if batch is not None:
                    yield batch


def _message(frames: list[bytes]) -> tuple[int, bytes]:
    if len(frames) != 2 or len(frames[0]) != 8:
        raise BackendGarbage("kv_events: what comes from there are no KV-cache events")
    return int.from_bytes(frames[0], "big"), frames[1]
