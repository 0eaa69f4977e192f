"""The paged KV cache as the scheduler sees it: block tables of sequences, by groups of layers.

Layers that see all positions, and layers that see a sliding window, are groups with tables and a
pool of their own: the second kind gives back what no later token sees, so a long sequence costs it
a window and no more. A page is found again in both groups by one hash chain; a prefix is reused up
to where the first group still has all of it, and the second the last window of it.

Choices of one prompt share its full pages like any other prefix. The page that is not full they
compute again, at most a page's tokens each: all would write their first token into it, so each
needs one of its own in any case, and copying pages would be one more thing for a step to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import count

from forebay_engine.blocks import RELEASED, BlockPool, Content, PrefixHash


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers that share block tables."""

    num_blocks: int
    #: Positions that a token sees, its own among them; None: all before it.
    window: int | None = None

    def first_page(self, position: int, block_size: int) -> int:
        """The first page that the token at ``position``, or a later one, sees."""
        return 0 if self.window is None else max(0, position - self.window + 1) // block_size

    def most_pages(self, tokens: int, chunk: int, block_size: int) -> int:
        """Pages that a sequence of ``tokens`` holds at once if ``chunk`` are run in a step."""
        whole = -(-tokens // block_size)
        if self.window is None:
            return whole
        # What the chunk's first token sees, the page that is kept behind it, and the chunk: so
        # many positions touch one page more than they fill if they begin at a page's last slot.
        positions = self.window - 1 + block_size + chunk
        return min(whole, (positions + block_size - 2) // block_size + 1)

    def longest_chunk(self, tokens: int, block_size: int) -> int:
        """Tokens that a sequence of ``tokens`` may run in a step with this pool to itself."""
        if self.window is None or self.num_blocks * block_size >= tokens:
            return tokens
        return (self.num_blocks - 1) * block_size + 2 - self.window - block_size

    def longest_sequence(self, tokens: int, block_size: int) -> int:
        """Tokens, of those asked for, that one sequence can have with this pool to itself."""
        fits = self.longest_chunk(tokens, block_size) > 0 and self.window is not None
        return tokens if fits else min(tokens, self.num_blocks * block_size)


class Pages:
    """One sequence's place in the cache."""

    __slots__ = ("chain", "due", "end", "published", "root", "tables")

    def __init__(self, root: bytes, groups: int) -> None:
        self.root = root
        #: What its full pages hold, as far as anybody has asked: its tokens never change.
        self.chain: list[Content] = []
        #: Full pages that have been offered for reuse.
        self.published = 0
        #: Positions that the tables reach.
        self.end = 0
        #: Computed tokens from which on there is something for :meth:`KVCache.advance` to do.
        self.due = 0
        #: Of each group: physical pages in order of position, ``RELEASED`` where given back.
        self.tables: tuple[list[int], ...] = tuple([] for _ in range(groups))


#: A prefix that is in the cache: its pages in each group.
Hit = tuple[list[int], ...]


class KVCache:
    """Pools of pages, one for each group of layers, all with pages of ``block_size`` tokens."""

    def __init__(
        self, groups: Items[CacheGroup], block_size: int, *, prefix_cache: bool = True
    ) -> None:
        if not groups or block_size < 1:
            raise ValueError(f"a cache needs groups and pages: {groups}, block_size={block_size}")
        self.groups = tuple(groups)
        self.block_size = block_size
        self.pools = [BlockPool(group.num_blocks, keep=prefix_cache) for group in groups]
        #: Groups with a window.
        self._sliding = [i for i, group in enumerate(self.groups) if group.window is not None]
        self._prefix_cache = prefix_cache
        self._hash = PrefixHash()
        self._families = count()

    @property
    def in_use(self) -> int:
        """Pages that sequences hold, in all groups."""
        return sum(pool.in_use for pool in self.pools)

    @property
    def usage(self) -> float:
        """Share of the pages that sequences hold in the fullest group, 0 to 1."""
        return max(pool.in_use / pool.num_blocks for pool in self.pools)

    @property
    def cached(self) -> float:
        """Share of the pages that hold a prefix and are held by nobody, 0 to 1."""
        pages = sum(pool.num_blocks for pool in self.pools)
        return sum(pool.cached for pool in self.pools) / pages

    @property
    def evicted(self) -> int:
        return sum(pool.evicted for pool in self.pools)

    def root(self, salt: bytes) -> bytes:
        """Where the prefixes of a prompt begin; its choices are opened with the same.

        Without a prefix cache no two prompts begin alike, so only choices of one share pages.
        """
        if self._prefix_cache:
            return self._hash.root(("salt", salt))
        return self._hash.root(("salt", salt), ("prompt", str(next(self._families)).encode()))

    def open(self, root: bytes) -> Pages:
        """The place of a sequence; it holds nothing yet."""
        return Pages(root, len(self.groups))

    def longest_chunk(self, tokens: int) -> int:
        """Tokens that a sequence of ``tokens`` may run in a step, whatever the pools hold."""
        return min(group.longest_chunk(tokens, self.block_size) for group in self.groups)

    def lacking(self, tokens: int, chunk: int) -> tuple[int, int] | None:
        """Pages that a sequence needs at once, and those there are, of a group with too few."""
        for group in self.groups:
            needed = group.most_pages(tokens, chunk, self.block_size)
            if needed > group.num_blocks:
                return needed, group.num_blocks
        return None

    def content(self, pages: Pages, tokens: Items[int], page: int) -> Content:
        """What the sequence's full page of this number holds."""
        chain, size = pages.chain, self.block_size
        while len(chain) <= page:
            parent = chain[-1].digest if chain else pages.root
            start = len(chain) * size
            chain.append(self._hash.content(parent, tokens[start : start + size]))
        return chain[page]

    def match(self, pages: Pages, tokens: Items[int]) -> Hit:
        """The longest prefix, in whole pages, that can be reused. Nothing is held yet."""
        found: list[list[int | None]] = [[] for _ in self.groups]
        length = 0
        for page in range(len(tokens) // self.block_size):
            content = self.content(pages, tokens, page)
            for blocks, pool in zip(found, self.pools, strict=True):
                blocks.append(pool.find(content))
            if any(
                group.window is None and blocks[page] is None
                for group, blocks in zip(self.groups, found, strict=True)
            ):
                break
            length = page + 1
        length = self._reusable(found, length)
        return tuple(
            _from(group.first_page(length * self.block_size, self.block_size), blocks[:length])
            for group, blocks in zip(self.groups, found, strict=True)
        )

    def admits(
        self, hit: Hit, tokens: int, chunk: int, running: Iterable[tuple[Pages, int]]
    ) -> bool:
        """Whether a sequence of ``tokens`` can come in beside those that are running.

        ``running``: their places and tokens. What they still lack for these, and a page for each,
        is left to them, or they would soon preempt what is admitted now.
        """
        there = list(running)
        for number, (group, pool) in enumerate(zip(self.groups, self.pools, strict=True)):
            promised = sum(self._outstanding(number, *other, chunk) + 1 for other in there)
            table = hit[number]
            held = len(table) - table.count(RELEASED)
            fresh = group.most_pages(tokens, chunk, self.block_size) - held
            if max(0, fresh) + pool.idle(table) + promised > pool.available:
                return False
        return True

    def enter(self, pages: Pages, hit: Hit) -> None:
        """Hold a prefix that :meth:`match` has just found."""
        for table, pool, found in zip(pages.tables, self.pools, hit, strict=True):
            pool.hold(found)
            table[:] = found
        pages.published = len(hit[0])
        pages.end = pages.published * self.block_size

    def reserve(self, pages: Pages, end: int, leave: int = 0) -> bool:
        """Pages up to position ``end``, in all groups or in none; ``leave`` stay available."""
        needed = -(-(end - pages.end) // self.block_size)
        if needed <= 0:
            return True
        if any(pool.available < needed + leave for pool in self.pools):
            return False
        for table, pool in zip(pages.tables, self.pools, strict=True):
            table.extend(pool.allocate(needed) or ())
        pages.end += needed * self.block_size
        return True

    def reserve_next(self, many: Items[Pages]) -> bool:
        """Another page for each, in all groups, or for none of them."""
        if any(pool.available < len(many) for pool in self.pools):
            return False
        for number, pool in enumerate(self.pools):
            for pages, block in zip(many, pool.allocate(len(many)) or (), strict=True):
                pages.tables[number].append(block)
        for pages in many:
            pages.end += self.block_size
        return True

    def advance(self, pages: Pages, tokens: Items[int], computed: int) -> None:
        """Offer the pages that are full now for reuse, and give back what is out of sight.

        One page more than the next token sees is kept: choices of the prompt that was just
        computed begin at its last full page, and find the whole window before it.
        """
        size = self.block_size
        for page in range(pages.published, computed // size):
            content = self.content(pages, tokens, page)
            for table, pool in zip(pages.tables, self.pools, strict=True):
                pool.publish(table[page], content)
            pages.published = page + 1
        pages.due = 0 if self._sliding else (pages.published + 1) * size
        for number in self._sliding:
            table, pool = pages.tables[number], self.pools[number]
            unseen = self.groups[number].first_page(computed, size) - 1
            for page in range(unseen - 1, -1, -1):
                if table[page] == RELEASED:
                    break
                pool.release(table[page])
                table[page] = RELEASED

    def release(self, pages: Pages) -> None:
        """Give up all pages, so that a second call does nothing.

        The last goes first: a tail is of use only with its head, so it is evicted before it.
        """
        for table, pool in zip(pages.tables, self.pools, strict=True):
            while table:
                block = table.pop()
                if block != RELEASED:
                    pool.release(block)
        pages.published = pages.end = pages.due = 0

    def unfilled(self, pages: Pages, computed: int) -> int:
        """Slots of a sequence's pages that hold no token yet, in all groups."""
        return sum(len(table) * self.block_size - computed for table in pages.tables if table)

    def check(self, sequences: Items[Pages]) -> None:
        """Raise AssertionError unless the books of every pool agree with the sequences' tables."""
        for number, pool in enumerate(self.pools):
            pool.check([pages.tables[number] for pages in sequences])

    def _reusable(self, found: list[list[int | None]], length: int) -> int:
        """Pages of the longest prefix whose last window is there in every group with a window."""
        while length:
            missing = [
                page
                for group, blocks in zip(self.groups, found, strict=True)
                for page in range(
                    group.first_page(length * self.block_size, self.block_size), length
                )
                if blocks[page] is None
            ]
            if not missing:
                return length
            # No longer prefix than the one before the last gap can have its window.
            length = max(missing)
        return 0

    def _outstanding(self, number: int, pages: Pages, tokens: int, chunk: int) -> int:
        """Pages that a running sequence may still take in a group for the tokens it has."""
        group, table = self.groups[number], pages.tables[number]
        most = group.most_pages(tokens, chunk, self.block_size)
        missing = -(-tokens // self.block_size) - len(table)
        return max(0, min(missing, most - (len(table) - table.count(RELEASED))))


def _from(first: int, blocks: list[int | None]) -> list[int]:
    """A table of these blocks in which all before ``first`` are given back."""
    return [
        RELEASED if block is None or page < first else block for page, block in enumerate(blocks)
    ]
