"""A client that reads slowly holds up its own upstream, and nothing else."""

from __future__ import annotations

import asyncio
from typing import Any

EVENT_BYTES = 16 << 10
# What sockets may hold between upstream and client: on Linux up to 6 MB received and 4 MB sent,
# on both of the gateway's sides, if it lets them grow. A gateway that gathers would take it all.
SOCKETS = 24 << 20


class Torrent:
    """An upstream that writes as fast as it is let."""

    def __init__(self) -> None:
        self.sent = 0

    async def __call__(self, call: Any) -> None:
        await call.head()
        while not call.gone.is_set():
            await call.token("x" * EVENT_BYTES)
            self.sent += EVENT_BYTES

    async def settled(self) -> int:
        """Bytes sent when it has been held up for half a second."""
        before = -1
        while before != self.sent:
            before = self.sent
            await asyncio.sleep(0.5)
        return before


async def test_upstream_waits_for_the_client(start_gateway: Any, upstreams: Any) -> None:
    torrent = Torrent()
    upstreams[0].behaviour = torrent
    gateway = await start_gateway(alone=True, timeouts={"inter_token": 0.3})
    exchange = await gateway.ask(stream=True, receive_buffer=64 << 10)
    await exchange.head()
    held_at = await torrent.settled()
    assert held_at < SOCKETS
    # The pause was the client's, so no timeout of the backend's has run; it goes on.
    while torrent.sent < held_at + (1 << 20):
        assert await exchange.read()
    assert b'"error"' not in exchange.body
    exchange.leave()
    await gateway.until_idle()


async def test_others_are_served_meanwhile(start_gateway: Any, upstreams: Any) -> None:
    torrent = Torrent()
    upstreams[0].behaviour = torrent
    gateway = await start_gateway(alone=True)
    slow = await gateway.ask(stream=True, receive_buffer=64 << 10)
    await slow.head()
    await torrent.settled()
    upstreams[0].behaviour = lambda call: call.answer()
    for _ in range(20):
        assert (await gateway.get(stream=True)).text() == "hello"
    slow.leave()
    await gateway.until_idle()


async def test_slow_client_that_leaves(start_gateway: Any, upstreams: Any) -> None:
    """The gateway is stuck in a write then, and must not stay there."""
    torrent = Torrent()
    upstreams[0].behaviour = torrent
    gateway = await start_gateway(alone=True)
    exchange = await gateway.ask(stream=True, receive_buffer=64 << 10)
    await exchange.head()
    await torrent.settled()
    exchange.leave()
    await asyncio.wait_for(gateway.until_idle(), 5)
    await asyncio.wait_for(upstreams[0].calls[0].gone.wait(), 5)
