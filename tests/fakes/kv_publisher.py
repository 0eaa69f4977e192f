"""A publisher of KV-cache events, as vLLM's and SGLang's, on real ZeroMQ sockets."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import Any

import msgspec
import zmq
import zmq.asyncio


class Publisher:
    """``old``: events are arrays, and replays come without a topic."""

    def __init__(
        self,
        address: str,
        replay: str = "",
        *,
        topic: str = "kv",
        kept: int = 1000,
        old: bool = False,
        connects: bool = False,
    ) -> None:
        self.address, self.replay, self.topic = address, replay, topic.encode()
        self.old, self.connects = old, connects
        self.buffer: deque[tuple[int, bytes]] = deque(maxlen=kept)
        self.number = 0
        #: Numbers from which on replays were asked for.
        self.asked: list[int] = []
        self._context = zmq.asyncio.Context()

    async def start(self) -> None:
        self._pub = self._context.socket(zmq.XPUB)
        self._pub.linger = 0
        self._bind(self._pub, self.address)
        if self.replay:
            self._router = self._context.socket(zmq.ROUTER)
            self._router.linger = 0
            self._bind(self._router, self.replay)
            self._replaying = asyncio.create_task(self._serve())

    def _bind(self, socket: zmq.asyncio.Socket, address: str) -> None:
        if self.connects and socket is self._pub:
            socket.connect(address)
        else:
            socket.bind(address)

    async def subscribed(self) -> None:
        """Somebody listens; what was published before he did not hear."""
        async with asyncio.timeout(10):
            while not (await self._pub.recv()).startswith(b"\x01"):
                pass

    async def publish(self, *events: dict[str, Any], lost: bool = False) -> int:
        """``lost``: it is kept for replays, but nobody hears it now."""
        rows = [list(event.values()) if self.old else event for event in events]
        return await self.send(msgspec.msgpack.encode([1.5, rows, 0]), lost)

    async def send(self, payload: bytes, lost: bool = False) -> int:
        number, self.number = self.number, self.number + 1
        self.buffer.append((number, payload))
        if not lost:
            await self._pub.send_multipart([self.topic, number.to_bytes(8, "big"), payload])
        return number

    async def _serve(self) -> None:
        while True:
            client, empty, start = await self._router.recv_multipart()
            assert empty == b""
            first = int.from_bytes(start, "big")
            self.asked.append(first)
            topic = [] if self.old else [self.topic]
            for number, payload in self.buffer:
                if number >= first:
                    head = [client, b"", *topic, number.to_bytes(8, "big")]
                    await self._router.send_multipart([*head, payload])
            end = (-1).to_bytes(8, "big", signed=True)
            await self._router.send_multipart([client, b"", *([] if self.old else [b""]), end, b""])

    async def stop(self) -> None:
        """As when its process ends: connections break, and all it kept is gone."""
        if self.replay:
            self._replaying.cancel()
            with suppress(asyncio.CancelledError):
                await self._replaying
            self._router.close()
        self._pub.close()
        self.buffer.clear()
        self.number = 0

    async def restart(self) -> None:
        await self.stop()
        async with asyncio.timeout(5):
            while True:  # ZeroMQ lets go of an address in the background
                try:
                    return await self.start()
                except zmq.ZMQError:
                    await asyncio.sleep(0.01)

    async def aclose(self) -> None:
        await self.stop()
        self._context.destroy(linger=0)


def stored(*hashes: int | bytes, size: int = 2, parent: Any = None, **more: Any) -> dict[str, Any]:
    """In the order of the array's fields."""
    return {
        "type": "BlockStored",
        "block_hashes": list(hashes),
        "parent_block_hash": parent,
        "token_ids": list(range(size * len(hashes))),
        "block_size": size,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        **more,
    }


def removed(*hashes: int | bytes, **more: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": "GPU", **more}


CLEARED = {"type": "AllBlocksCleared"}
