"""Paged KV blocks: who holds which, and which hold a prefix that can be used again.

A block is free, held (by one or more sequences), or cached: full, published under the hash of its
whole prefix, and held by nobody. Cached blocks are handed out again, least recently used first,
once the free ones are gone. The hash of a block covers its tokens and the hash of the block before
it, so that equal hashes mean equal prefixes; it is keyed with a secret of this pool, and the tokens
are compared on every hit, so neither accident nor adversary can pass one prefix for another.
"""

from __future__ import annotations

import secrets
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Items
from dataclasses import dataclass
from hashlib import blake2b

#: Bytes of a prefix hash; 16 keeps accidental collisions below 1e-20 for 1e9 blocks.
DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class _Content:
    """What a published block holds."""

    digest: bytes
    parent: bytes
    tokens: bytes


class BlockPool:
    """``num_blocks`` blocks of ``block_size`` tokens, numbered from 0."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"a pool needs blocks: num_blocks={num_blocks}, block_size={block_size}"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._key = secrets.token_bytes(32)
        self._holders = [0] * num_blocks
        # Popped from the end: block 0 is handed out first.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._content: dict[int, _Content] = {}
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

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_size)

    def root(self, salt: bytes = b"") -> bytes:
        """The hash before the first block; prefixes are only shared among equal salts."""
        return self._digest(salt, b"salt")

    def allocate(self, count: int) -> list[int] | None:
        """Take ``count`` blocks, evicting cached ones as needed; None if there are too few."""
        if count > self.available:
            return None
        return [self._take() for _ in range(count)]

    def match(self, tokens: Items[int], root: bytes) -> tuple[list[int], bytes]:
        """The blocks, not yet held, of the longest published prefix, and the hash at its end."""
        blocks: list[int] = []
        parent = root
        for start in range(0, len(tokens) - self.block_size + 1, self.block_size):
            content = self._describe(parent, tokens[start : start + self.block_size])
            block = self._by_digest.get(content.digest)
            if block is None or self._content[block] != content:
                break
            blocks.append(block)
            parent = content.digest
        return blocks, parent

    def hold(self, blocks: Items[int]) -> None:
        """Hold blocks that :meth:`match` has just found."""
        for block in blocks:
            self._idle.pop(block, None)
            self._holders[block] += 1

    def idle(self, blocks: Items[int]) -> int:
        """How many of these blocks nobody holds: holding them makes them unavailable."""
        return sum(block in self._idle for block in blocks)

    def publish(self, block: int, parent: bytes, tokens: Items[int]) -> bytes:
        """Offer a held block, now full of computed tokens, for reuse; the prefix hash at its end.

        A prefix that is already published keeps its first block, so block tables only ever grow.
        """
        if self._holders[block] == 0 or len(tokens) != self.block_size:
            raise ValueError(f"block {block} is not held, or not full: {len(tokens)} tokens")
        if not self.prefix_cache:
            return parent
        content = self._describe(parent, tokens)
        if content.digest not in self._by_digest:
            self._content[block] = content
            self._by_digest[content.digest] = block
        return content.digest

    def release(self, blocks: list[int]) -> None:
        """Give up a sequence's blocks and empty its table, so that a second call does nothing.

        The last goes first: a tail is of use only with its head, so it is evicted before it.
        """
        while blocks:
            block = blocks.pop()
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
                held[block] += 1
        free, idle = set(self._free), set(self._idle)
        problems = [
            (held != self._holders, f"holders {self._holders} but tables hold {held}"),
            (len(free) != len(self._free), "a block is free twice"),
            (bool(free & idle), "a block is free and cached"),
            (
                free | idle != {b for b in range(self.num_blocks) if not held[b]},
                "a block is lost, or held and available",
            ),
            (not idle <= self._content.keys(), "a cached block has no content"),
            (bool(free & self._content.keys()), "a free block is published"),
            (
                {c.digest: b for b, c in self._content.items()} != self._by_digest,
                "the hash index disagrees with the contents",
            ),
        ]
        for broken, sentence in problems:
            if broken:
                raise AssertionError(sentence)

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._by_digest[self._content.pop(block).digest]
        self._holders[block] = 1
        return block

    def _retire(self, block: int) -> None:
        if block in self._content:
            self._idle[block] = None
        else:
            self._free.append(block)

    def _describe(self, parent: bytes, tokens: Items[int]) -> _Content:
        packed = array("q", tokens).tobytes()
        return _Content(self._digest(parent + packed, b"block"), parent, packed)

    def _digest(self, data: bytes, domain: bytes) -> bytes:
        return blake2b(data, digest_size=DIGEST_BYTES, key=self._key, person=domain).digest()
