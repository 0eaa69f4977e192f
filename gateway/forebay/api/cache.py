"""What a backend tells of its prefix cache: which blocks of tokens it holds, and no longer holds.

An adapter whose backend tells gives them through ``Adapter.cache_events``, in the order in which
they happened.
"""

from __future__ import annotations

from msgspec import Struct

__all__ = ["BlocksRemoved", "BlocksStored", "CacheBatch", "CacheCleared", "CacheEvent"]


class BlocksStored(Struct, frozen=True, kw_only=True):
    """Blocks that follow each other in one prefix are in the cache.

    A block's hash stands for its tokens and all before them. It is the backend's own: opaque, equal
    on two backends only if they are of one kind, version and configuration.
    """

    #: One for each block, in order; unsigned, 64 bits. Longer ones are cut to their last 64 bits.
    hashes: tuple[int, ...]
    #: Tokens in each of the blocks.
    block_size: int
    #: Hash of the block before the first; None: the prefix begins here, or it is not said.
    parent: int | None = None
    #: Of all blocks one after another; empty: not said.
    tokens: tuple[int, ...] = ()
    #: Where they lie, in the backend's word (``GPU``, ``CPU``); empty: it does not say.
    medium: str = ""
    #: Blocks of different groups of layers (KV-cache groups) come and go independently.
    group: int = 0
    #: Name of the LoRA adapter under which they were computed; empty: none.
    lora: str = ""
    #: For each block what its hash holds besides tokens (images, a cache's salt), in the backend's
    #: own terms; empty: nothing, or not said.
    extra_keys: tuple[object, ...] = ()


class BlocksRemoved(Struct, frozen=True, kw_only=True):
    """Blocks have left a medium; what was never stored there is none of ours."""

    hashes: tuple[int, ...]
    medium: str = ""
    group: int = 0


class CacheCleared(Struct, frozen=True, kw_only=True):
    """Nothing that was told before holds any longer."""

    #: Why it cannot be relied on (events were lost); empty: the backend emptied its cache itself.
    lost: str = ""


CacheEvent = BlocksStored | BlocksRemoved | CacheCleared


class CacheBatch(Struct, frozen=True, kw_only=True):
    """Events that hold together: a view of the cache is right before and after all of them."""

    events: tuple[CacheEvent, ...]
    #: The backend's number of its last message; None: it has sent none.
    sequence: int | None = None
    #: It had been missed and was asked for again.
    replayed: bool = False
