"""What is known to lie in a backend's prefix cache, from the events that it tells.

The view is never more than the truth: whoever misses an event withdraws all, and where memory is
short the oldest blocks are forgotten. It may be less: what was cached before it was listened to.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

import structlog
from msgspec import Struct

from forebay.api import (
    Adapter,
    BackendError,
    BlocksRemoved,
    BlocksStored,
    CacheBatch,
    CacheCleared,
)

log = structlog.get_logger("forebay.cached_blocks")

#: Most blocks known of one backend: about 20 MiB, and 4 million tokens in blocks of 16.
LIMIT = 1 << 18


class CacheStatus(Struct, frozen=True, kw_only=True):
    """The view at one moment; a block on two media counts twice."""

    blocks: int = 0
    tokens: int = 0
    #: Events so far.
    events: int = 0
    #: Times that all had to be withdrawn because events were lost.
    gaps: int = 0
    #: Messages that had been missed and were asked for again.
    replayed: int = 0
    #: The backend's number of its last message, and the seconds since it came.
    sequence: int | None = None
    age: float | None = None


class CachedBlocks:
    """Of one backend: hashes of the blocks it holds, with the tokens in each."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        #: By group and medium, in order of their coming.
        self._places: dict[tuple[int, str], dict[int, int]] = {}
        self._blocks = self._tokens = 0
        self._events = self._gaps = self._replayed = 0
        self._sequence: int | None = None
        self._heard_at: float | None = None

    def __contains__(self, block: int) -> bool:
        return any(block in place for place in self._places.values())

    def status(self) -> CacheStatus:
        return CacheStatus(
            blocks=self._blocks,
            tokens=self._tokens,
            events=self._events,
            gaps=self._gaps,
            replayed=self._replayed,
            sequence=self._sequence,
            age=None if self._heard_at is None else time.monotonic() - self._heard_at,
        )

    def apply(self, batch: CacheBatch) -> None:
        for event in batch.events:
            if isinstance(event, BlocksStored):
                self._store(event)
            elif isinstance(event, BlocksRemoved):
                self._remove(event)
            else:
                self._clear(event)
        self._events += len(batch.events)
        self._replayed += batch.replayed
        if batch.sequence is not None:
            self._sequence, self._heard_at = batch.sequence, time.monotonic()

    def _store(self, event: BlocksStored) -> None:
        place = self._places.setdefault((event.group, event.medium), {})
        for block in event.hashes:
            self._drop(place, block)
            place[block] = event.block_size
            self._blocks += 1
            self._tokens += event.block_size
        while self._blocks > self._limit:
            oldest = next(place for place in self._places.values() if place)
            self._drop(oldest, next(iter(oldest)))

    def _remove(self, event: BlocksRemoved) -> None:
        place = self._places.get((event.group, event.medium), {})
        for block in event.hashes:
            self._drop(place, block)

    def _drop(self, place: dict[int, int], block: int) -> None:
        tokens = place.pop(block, None)
        if tokens is not None:
            self._blocks -= 1
            self._tokens -= tokens

    def _clear(self, event: CacheCleared) -> None:
        self._places.clear()
        self._blocks = self._tokens = 0
        self._gaps += bool(event.lost)


async def follow(name: str, adapter: Adapter, view: CachedBlocks, pause: float) -> None:
    """Keep the view of a backend that tells; begin again ``pause`` seconds after it fails."""
    while (batches := adapter.cache_events()) is not None:
        try:
            async with aclosing(batches):
                async for batch in batches:
                    view.apply(batch)
                    _tell(name, batch)
            lost = "its events have ended"
        except BackendError as error:
            lost = error.message
        except Exception:  # a plugin's bug must not end the following
            log.exception("cache events raised", backend=name)
            lost = "the adapter failed"
        failed = CacheBatch(events=(CacheCleared(lost=lost),))
        view.apply(failed)
        _tell(name, failed)
        await asyncio.sleep(pause)


def _tell(name: str, batch: CacheBatch) -> None:
    for event in batch.events:
        if isinstance(event, CacheCleared) and event.lost:
            log.warning("cache events lost", backend=name, reason=event.lost)
