"""Paged KV blocks: who holds which, and which hold a prefix that can be used again.

A block is free, held (by one or more sequences), or cached: full, published under the hash of its
whole prefix, and held by nobody. Cached blocks are handed out again, least recently used first,
once the free ones are gone. The hash of a block covers its tokens and the hash of the block before
it, so that equal hashes mean equal prefixes; it is keyed with a secret of this process, and the
tokens are compared on every hit, so neither accident nor adversary can pass one prefix for another.
"""

from __future__ import annotations

import secrets
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Items
from hashlib import blake2b

from msgspec import Struct

#: Bytes of a prefix hash; 16 keeps accidental collisions below 1e-20 for 1e9 blocks.
DIGEST_BYTES = 16
#: In a block table: the block of positions that no later token sees has been given back.
RELEASED = -1


class Content(Struct, frozen=True, gc=False):
    """The tokens of a full block, and the hash of all before them."""

    digest: bytes
    parent: bytes
    tokens: bytes


class PrefixHash:
    """Names prefixes; ``root`` is the name of the empty one."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def root(self, *keys: tuple[str, bytes]) -> bytes:
        """Prefixes are only shared among equal keys, each a kind (``salt``, …) and its value.

        Kind and value go in behind their lengths, so that a value of one kind, whatever a client
        puts there, is never taken for one of another, nor two values for one.
        """
        parts = [part for kind, value in keys for part in (kind.encode(), value)]
        return self._digest(b"".join(len(p).to_bytes(8, "big") + p for p in parts), b"root")

    def content(self, parent: bytes, tokens: Items[int]) -> Content:
        """What a block of ``tokens`` holds behind the prefix ``parent``."""
        packed = array("q", tokens).tobytes()
        return Content(self._digest(parent + packed, b"block"), parent, packed)

    def _digest(self, data: bytes, domain: bytes) -> bytes:
        return blake2b(data, digest_size=DIGEST_BYTES, key=self._key, person=domain).digest()


class BlockPool:
    """``num_blocks`` blocks, numbered from 0.

    ``keep``: published blocks stay when nobody holds them, until they are evicted. Without it a
    prefix can be shared only while somebody holds it.
    """

    def __init__(self, num_blocks: int, *, keep: bool = True) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs blocks: num_blocks={num_blocks}")
        self.num_blocks = num_blocks
        #: Cached blocks that were handed out again.
        self.evicted = 0
        self._keep = keep
        self._holders = [0] * num_blocks
        # Popped from the end: block 0 is handed out first.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._content: dict[int, Content] = {}
        self._by_digest: dict[bytes, int] = {}
        #: Cached blocks that nobody holds, least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that can be allocated now: free, or cached and held by nobody."""
        return len(self._free) + len(self._idle)

    @property
    def in_use(self) -> int:
        """Blocks that some sequence holds."""
        return self.num_blocks - self.available

    @property
    def cached(self) -> int:
        """Blocks that hold a prefix and are held by nobody."""
        return len(self._idle)

    def allocate(self, count: int) -> list[int] | None:
        """Take ``count`` blocks, evicting cached ones as needed; None if there are too few."""
        if count > self.available:
            return None
        return [self._take() for _ in range(count)]

    def find(self, content: Content) -> int | None:
        """The block, not yet held, that was published with this content."""
        block = self._by_digest.get(content.digest)
        return block if block is not None and self._content[block] == content else None

    def hold(self, blocks: Items[int]) -> None:
        """Hold blocks that :meth:`find` has just found; released ones are passed over."""
        for block in blocks:
            if block != RELEASED:
                self._idle.pop(block, None)
                self._holders[block] += 1

    def idle(self, blocks: Items[int]) -> int:
        """How many of these blocks nobody holds: holding them makes them unavailable."""
        return sum(block in self._idle for block in blocks)

    def publish(self, block: int, content: Content) -> None:
        """Offer a held block, full of computed tokens, for reuse.

        A prefix that is already published keeps its first block, so block tables only ever grow.
        """
        if self._holders[block] == 0:
            raise ValueError(f"block {block} is published but nobody holds it")
        if content.digest not in self._by_digest:
            self._content[block] = content
            self._by_digest[content.digest] = block

    def release(self, block: int) -> None:
        """Give up a block."""
        if self._holders[block] == 0:
            raise ValueError(f"block {block} is released but nobody holds it")
        self._holders[block] -= 1
        if self._holders[block] == 0:
            self._retire(block)

    def check(self, tables: Items[Items[int]]) -> None:
        """Raise AssertionError unless the books agree with the block tables of all sequences."""
        held = [0] * self.num_blocks
        for table in tables:
            for block in table:
                if block != RELEASED:
                    held[block] += 1
        wrong = [b for b in range(self.num_blocks) if held[b] != self._holders[b]]
        free, idle = set(self._free), set(self._idle)
        problems = [
            (wrong, "holders are not those whose tables hold the block"),
            (len(self._free) - len(free), "a block is free twice"),
            (free & idle, "a block is free and cached"),
            (
                (free | idle) ^ {b for b in range(self.num_blocks) if not held[b]},
                "a block is lost, or held and available",
            ),
            (idle - self._content.keys(), "a cached block has no content"),
            (free & self._content.keys(), "a free block is published"),
            (
                len(self._by_digest) != len(self._content)
                or any(self._by_digest.get(c.digest) != b for b, c in self._content.items()),
                "the hash index disagrees with the contents",
            ),
        ]
        for found, sentence in problems:
            if found:
                blocks = sorted(found)[:8] if isinstance(found, (list, set)) else found
                raise AssertionError(
                    f"{sentence}: {blocks}; {sum(map(bool, held))} of {self.num_blocks} blocks are "
                    f"in tables, {self.in_use} in use, {len(self._free)} free, {self.cached} cached"
                )

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
            self.evicted += 1
        self._holders[block] = 1
        return block

    def _retire(self, block: int) -> None:
        if block in self._content and self._keep:
            self._idle[block] = None
            return
        if block in self._content:
            self._forget(block)
        self._free.append(block)

    def _forget(self, block: int) -> None:
        del self._by_digest[self._content.pop(block).digest]
