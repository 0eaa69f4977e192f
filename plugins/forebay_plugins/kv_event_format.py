"""KV-cache events as vLLM and SGLang publish them, in each of their layouts.

A message's payload is msgpack: ``[time, [event…], rank]``, the rank left out or null where there is
only one. An event is a map with a ``type``; of older servers an array that begins with it, whose
fields grew at the end. Read at vLLM 0.32 (``distributed/kv_events.py``) and SGLang 0.5.23
(``disaggregation/kv_events.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Raw, Struct

from forebay.api import BackendGarbage, BlocksRemoved, BlocksStored, CacheCleared, CacheEvent

__all__ = ["KvEventDecoder", "block_hash"]

_64_BITS = (1 << 64) - 1
#: Groups of layers that keep every token, so that a block they hold can be used again whatever
#: follows. The others (sliding windows, state-space layers) let go of what is behind.
_FULL = frozenset({None, "full_attention", "mla_attention", "sink_full_attention"})


class _Stored(Struct, tag="BlockStored"):
    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None


class _Removed(Struct, tag="BlockRemoved"):
    block_hashes: list[int | bytes]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None


class _Cleared(Struct, tag="AllBlocksCleared"):
    pass


class _StoredRow(_Stored, tag="BlockStored", array_like=True):
    pass


class _RemovedRow(_Removed, tag="BlockRemoved", array_like=True):
    pass


class _ClearedRow(_Cleared, tag="AllBlocksCleared", array_like=True):
    pass


class _Batch(Struct, array_like=True):
    at: float
    events: list[Raw]


_BATCH = msgspec.msgpack.Decoder(_Batch)
_MAP = msgspec.msgpack.Decoder(_Stored | _Removed | _Cleared)
_ROW = msgspec.msgpack.Decoder(_StoredRow | _RemovedRow | _ClearedRow)


class KvEventDecoder:
    """Of one publisher: it remembers which of its groups of layers are not to be followed."""

    def __init__(self) -> None:
        self._others: set[int] = set()

    def decode(self, payload: bytes) -> tuple[CacheEvent, ...]:
        """The events of one message, those of the groups that keep every token.

        :raises BackendGarbage: it is of no known layout, or holds an event of a kind unknown here.
        """
        try:
            return tuple(self._events(_BATCH.decode(payload)))
        except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
            raise BackendGarbage(f"a KV-cache event of the backend is unknown: {wrong}") from None

    def _events(self, batch: _Batch) -> Iterator[CacheEvent]:
        for raw in batch.events:
            event = (_MAP if _is_map(raw) else _ROW).decode(raw)
            if isinstance(event, _Cleared):
                yield CacheCleared()
            elif event.block_hashes and self._follows(event):
                yield _stored(event) if isinstance(event, _Stored) else _removed(event)

    def _follows(self, event: _Stored | _Removed) -> bool:
        group = event.group_idx or 0
        if isinstance(event, _Stored):
            if event.kv_cache_spec_kind not in _FULL:
                self._others.add(group)
            elif event.kv_cache_spec_kind is not None:
                self._others.discard(group)
        # What a tier shared by several servers holds is not in this server's cache.
        return group not in self._others and event.locality != "REMOTE"


def _is_map(value: Raw) -> bool:
    """By msgpack's first byte: fixmap, map 16 or map 32."""
    first = bytes(memoryview(value)[:1])
    return b"\x80" <= first <= b"\x8f" or first in (b"\xde", b"\xdf")


def _stored(event: _Stored) -> BlocksStored:
    parent = event.parent_block_hash
    return BlocksStored(
        hashes=tuple(map(block_hash, event.block_hashes)),
        block_size=event.block_size,
        parent=None if parent is None else block_hash(parent),
        tokens=tuple(event.token_ids),
        medium=event.medium or "",
        group=event.group_idx or 0,
        lora=event.lora_name or "",
        extra_keys=tuple(event.extra_keys or ()),
    )


def _removed(event: _Removed) -> BlocksRemoved:
    return BlocksRemoved(
        hashes=tuple(map(block_hash, event.block_hashes)),
        medium=event.medium or "",
        group=event.group_idx or 0,
    )


def block_hash(value: int | bytes) -> int:
    """As one unsigned number of 64 bits: of a digest its end, as vLLM itself shortens them."""
    if isinstance(value, bytes):
        return int.from_bytes(value[-8:], "big")
    return value & _64_BITS
