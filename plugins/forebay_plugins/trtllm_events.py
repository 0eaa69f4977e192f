"""KV-cache events of trtllm-serve, as `POST /kv_cache_events` hands them out, each only once.

Read at TensorRT-LLM's state of 2026 (``_utils.py``, ``serve/kv_event_fanout.py``). Events are
numbered without gaps; blocks may move between levels of memory (``updated``) and remain cached.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import Struct

from forebay.api import BlocksRemoved, BlocksStored, CacheBatch, CacheCleared, CacheEvent
from forebay_plugins.kv_event_format import block_hash

__all__ = ["CacheEventItem", "EventReader"]


class Token(Struct):
    token_id: int


class Block(Struct):
    block_hash: int
    tokens: list[Token]
    cache_salt: str | None = None


class Stored(Struct, tag="stored"):
    blocks: list[Block]
    parent_hash: int | None = None


class Removed(Struct, tag="removed"):
    block_hashes: list[int]


class Updated(Struct, tag="updated"):
    pass


class Created(Struct, tag="created"):
    pass


class CacheEventItem(Struct):
    """An item of the answer's list."""

    event_id: int
    data: Stored | Removed | Updated | Created
    window_size: int | None = None
    attention_dp_rank: int | None = None


class EventReader:
    """Of one server: what its events say, in order.

    Followed are the layers with the longest attention window: those with shorter ones let go of
    what is behind. With data-parallel attention, the first rank.
    """

    def __init__(self) -> None:
        self._next: int | None = None
        self._window = 0
        self._told = False

    def batch(self, items: Sequence[CacheEventItem]) -> CacheBatch | None:
        """None: they say nothing."""
        own = [item for item in items if not item.attention_dp_rank]
        if not own:
            return None
        events = tuple(event for item in own for event in self._events(item))
        return CacheBatch(events=events, sequence=own[-1].event_id)

    def _events(self, item: CacheEventItem) -> Iterator[CacheEvent]:
        if self._next is not None and item.event_id != self._next:
            yield CacheCleared(lost=f"event {self._next} was awaited, {item.event_id} came")
        self._next = item.event_id + 1
        window = item.window_size or 0
        if window > self._window and self._told:
            yield CacheCleared(lost="layers with a longer attention window have come up")
        self._window = max(self._window, window)
        if window < self._window:
            return
        if isinstance(item.data, Stored):
            self._told = True
            yield from _stored(item.data)
        elif isinstance(item.data, Removed):
            yield BlocksRemoved(hashes=tuple(map(block_hash, item.data.block_hashes)))


def _stored(event: Stored) -> Iterator[BlocksStored]:
    parent = None if event.parent_hash is None else block_hash(event.parent_hash)
    for block in event.blocks:
        yield BlocksStored(
            hashes=(block_hash(block.block_hash),),
            block_size=len(block.tokens),
            parent=parent,
            tokens=tuple(token.token_id for token in block.tokens),
            extra_keys=() if block.cache_salt is None else ((block.cache_salt,),),
        )
        parent = block_hash(block.block_hash)
