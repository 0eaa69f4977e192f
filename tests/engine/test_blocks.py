"""Pools and cache: cases, then a state machine against the simplest possible model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forebay_engine.blocks import RELEASED, BlockPool, PrefixHash
from forebay_engine.cache import CacheGroup, KVCache, Pages

SIZE = 2


def one_group(blocks: int, prefix_cache: bool = True) -> KVCache:
    return KVCache([CacheGroup(blocks)], SIZE, prefix_cache=prefix_cache)


def filled(cache: KVCache, tokens: list[int], salt: bytes = b"") -> Pages:
    """A sequence whose tokens are all computed."""
    pages = cache.open(cache.root(salt))
    assert cache.reserve(pages, len(tokens))
    cache.advance(pages, tokens, len(tokens))
    return pages


def matched(cache: KVCache, tokens: list[int], salt: bytes = b"") -> list[int]:
    return cache.match(cache.open(cache.root(salt)), tokens)[0]


def test_a_prefix_is_found_up_to_where_it_differs() -> None:
    cache = one_group(8)
    (blocks,) = filled(cache, [1, 2, 3, 4, 5, 6]).tables
    assert matched(cache, [1, 2, 3, 4, 9, 9]) == blocks[:2]
    assert matched(cache, [1, 2, 3]) == blocks[:1]
    assert matched(cache, [9, 2, 3, 4]) == []
    # Equal tokens behind another prefix are other content.
    assert matched(cache, [3, 4]) == []


def test_prefixes_are_shared_within_a_salt_only() -> None:
    cache = one_group(8)
    (blocks,) = filled(cache, [1, 2], b"tenant a").tables
    assert matched(cache, [1, 2], b"tenant a") == blocks
    assert matched(cache, [1, 2], b"tenant b") == []
    assert matched(cache, [1, 2]) == []


keys = st.lists(st.tuples(st.sampled_from(["a", "aa", "salt"]), st.binary(max_size=4)), max_size=3)


@given(keys, keys)
def test_keys_of_one_kind_are_never_taken_for_another(
    some: list[tuple[str, bytes]], others: list[tuple[str, bytes]]
) -> None:
    names = PrefixHash()
    assert (names.root(*some) == names.root(*others)) == (some == others)


def test_a_salt_cannot_be_made_to_look_like_another_key() -> None:
    names = PrefixHash()
    assert names.root(("salt", b"a"), ("adapter", b"b")) != names.root(("salt", b"aadapterb"))
    assert names.root(("salt", b"x")) != names.root(("adapter", b"x"))


def test_a_hash_collision_is_not_a_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixHash, "_digest", lambda self, data, domain: b"same")
    cache = one_group(4)
    filled(cache, [1, 2])
    assert matched(cache, [3, 4]) == []


def test_cached_blocks_are_evicted_oldest_first_and_tails_before_heads() -> None:
    cache = one_group(4)
    first, second = filled(cache, [1, 2, 3, 4]), filled(cache, [5, 6, 7, 8])
    head, other = first.tables[0][0], second.tables[0][:]
    cache.release(first)
    cache.release(second)
    (pool,) = cache.pools
    assert pool.allocate(1) is not None
    assert matched(cache, [1, 2, 3, 4]) == [head]
    assert matched(cache, [5, 6, 7, 8]) == other
    assert pool.allocate(1) == [head]
    assert matched(cache, [5, 6, 7, 8]) == other
    assert cache.evicted == 2


def test_without_prefix_cache_only_choices_of_a_prompt_share() -> None:
    cache = one_group(8, prefix_cache=False)
    root = cache.root(b"")
    first, second = cache.open(root), cache.open(root)
    tokens = [1, 2, 3, 4, 5]
    assert cache.reserve(first, 5)
    cache.advance(first, tokens, 5)
    hit = cache.match(second, tokens[:-1])
    assert hit == (first.tables[0][:2],)
    assert matched(cache, tokens) == []
    cache.enter(second, hit)
    cache.release(first)
    cache.check([first, second])
    assert cache.match(cache.open(root), tokens) == hit
    cache.release(second)
    # Nobody holds them any more, so nobody will find them.
    assert cache.match(cache.open(root), tokens) == ([],)
    assert cache.pools[0].available == 8
    cache.check([])


def test_all_or_nothing_is_allocated() -> None:
    pool = BlockPool(3)
    assert pool.allocate(4) is None
    assert pool.available == 3
    assert pool.allocate(3) is not None
    assert pool.allocate(1) is None
    # Of two groups, the second has no room: the first takes nothing either.
    cache = KVCache([CacheGroup(8), CacheGroup(2, window=2)], SIZE)
    assert not cache.reserve(cache.open(cache.root(b"")), 6)
    assert cache.in_use == 0


def test_misuse_is_refused() -> None:
    pool = BlockPool(2)
    with pytest.raises(ValueError, match="nobody holds it"):
        pool.release(0)
    with pytest.raises(ValueError, match="nobody holds it"):
        pool.publish(0, PrefixHash().content(b"", [1, 2]))
    with pytest.raises(ValueError, match="needs blocks"):
        BlockPool(0)
    with pytest.raises(ValueError, match="needs groups"):
        KVCache([], 2)


def sliding(blocks: int = 20, window: int = 4) -> KVCache:
    return KVCache([CacheGroup(20), CacheGroup(blocks, window)], SIZE)


def test_layers_with_a_window_give_back_what_they_no_longer_see() -> None:
    cache = sliding()
    tokens = list(range(13))
    pages = filled(cache, tokens)
    full, windowed = pages.tables
    assert RELEASED not in full
    # Token 13 sees 10 to 13: pages 5 and 6; one more is kept.
    assert [page == RELEASED for page in windowed] == [True] * 4 + [False] * 3
    assert [pool.in_use for pool in cache.pools] == [7, 3]
    assert cache.usage == 7 / 20
    cache.check([pages])
    cache.release(pages)
    cache.release(pages)
    cache.check([])


def test_a_prefix_is_reused_where_its_last_window_is_still_there() -> None:
    cache = sliding()
    tokens = list(range(12))
    pages = filled(cache, tokens)
    full, windowed = ([*table] for table in pages.tables)
    cache.release(pages)
    again = cache.open(cache.root(b""))
    # Token 12 sees 9 to 12, so pages 4 and 5 of the second group are needed, and only they.
    gone = [RELEASED] * 4
    assert cache.match(again, tokens) == (full, [*gone, *windowed[4:]])
    # Without page 4 the longest prefix that has its window ends where page 4 begins.
    evict(cache, 1, windowed[4])
    shorter = cache.match(again, tokens)
    assert len(shorter[0]) == len(shorter[1]) == 4
    assert shorter[1][:2] == [RELEASED] * 2
    assert RELEASED not in shorter[1][2:]
    cache.enter(again, shorter)
    cache.check([again])


def evict(cache: KVCache, group: int, block: int) -> None:
    pool = cache.pools[group]
    pool._idle.move_to_end(block, last=False)
    taken: list[int] = []
    while block not in taken:
        taken += pool.allocate(1) or ()
    for other in taken:
        pool.release(other)


@given(
    window=st.integers(1, 9),
    size=st.integers(1, 4),
    chunk=st.integers(1, 9),
    computed=st.integers(0, 40),
)
def test_a_window_holds_no_more_pages_than_reckoned(
    window: int, size: int, chunk: int, computed: int
) -> None:
    """And in a pool of just so many, the longest chunk is no shorter than the one reckoned with."""
    whole = computed + chunk
    group = CacheGroup(1000, window)
    cache = KVCache([group], size)
    pages = cache.open(cache.root(b""))
    tokens = list(range(whole))
    for start in range(0, whole, chunk):
        end = min(whole, start + chunk)
        assert cache.reserve(pages, end)
        (table,) = pages.tables
        held = len(table) - table.count(RELEASED)
        assert held <= group.most_pages(whole, chunk, size)
        cache.advance(pages, tokens, end)
    most = group.most_pages(10_000, chunk, size)
    assert CacheGroup(most, window).longest_chunk(10_000, size) >= chunk
    assert CacheGroup(most - 1, window).longest_chunk(10_000, size) < chunk


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda pool: pool._free.append(pool._free[0]), "free twice"),
        (lambda pool: pool._free.pop(), "lost"),
        (lambda pool: pool._holders.__setitem__(0, 2), "holders are not those"),
        (lambda pool: pool._by_digest.clear(), "index disagrees"),
        (lambda pool: pool._idle.update({pool._free[0]: None}), "free and cached"),
    ],
)
def test_the_integrity_check_sees_damage(
    damage: Callable[[BlockPool], object], sentence: str
) -> None:
    cache = one_group(6)
    pages = filled(cache, [1, 2])
    cache.check([pages])
    damage(cache.pools[0])
    with pytest.raises(AssertionError, match=sentence):
        cache.check([pages])


class Caching(RuleBasedStateMachine):
    """Sequences enter, grow, share and leave; the model is what each page of each group holds."""

    @initialize(
        windows=st.sampled_from([(None,), (3,), (None, 1), (None, 4)]), prefix_cache=st.booleans()
    )
    def boot(self, windows: tuple[int | None, ...], prefix_cache: bool) -> None:
        groups = [CacheGroup(7 - number, window) for number, window in enumerate(windows)]
        self.cache = KVCache(groups, SIZE, prefix_cache=prefix_cache)
        self.roots = [self.cache.root(b"") for _ in range(2)]
        #: What was last written into each page: root and whole prefix.
        self.content: dict[tuple[int, int], tuple[Any, ...]] = {}
        self.there: list[tuple[Pages, list[int], int]] = []

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        root=st.integers(0, 1),
        chunk=st.integers(1, 9),
    )
    def start(self, tokens: list[int], root: int, chunk: int) -> None:
        """Come in as the scheduler lets sequences in, and compute the first chunk."""
        cache, pages = self.cache, self.cache.open(self.roots[root])
        hit = cache.match(pages, tokens[:-1])
        for group, table in enumerate(hit):
            for page, block in enumerate(table):
                if block != RELEASED:
                    end = (page + 1) * SIZE
                    assert self.content[group, block] == (pages.root, *tokens[:end])
        running = [(other, len(its)) for other, its, _ in self.there]
        if not cache.admits(hit, len(tokens), chunk, running):
            return
        cache.enter(pages, hit)
        self.there.append((pages, tokens, len(hit[0]) * SIZE))
        self.compute(len(self.there) - 1, chunk)

    @precondition(lambda self: self.there)
    @rule(data=st.data(), chunk=st.integers(1, 4), more=st.integers(0, 3))
    def grow(self, data: st.DataObject, chunk: int, more: int) -> None:
        number = data.draw(st.integers(0, len(self.there) - 1))
        self.there[number][1].extend([1] * more)
        self.compute(number, chunk)

    def compute(self, number: int, chunk: int) -> None:
        pages, tokens, start = self.there[number]
        end = min(len(tokens), start + chunk)
        before = [[*table] for table in pages.tables]
        if not self.cache.reserve(pages, end):
            assert [[*table] for table in pages.tables] == before
            return
        for group, table in enumerate(pages.tables):
            for page in range(start // SIZE, -(-end // SIZE)):
                # Nobody else may write into a page that is written now.
                assert sum(table[page] == t for p, _, _ in self.there for t in p.tables[group]) == 1
                upto = min(end, (page + 1) * SIZE)
                self.content[group, table[page]] = (pages.root, *tokens[:upto])
        self.cache.advance(pages, tokens, end)
        self.there[number] = (pages, tokens, end)

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        pages, _, _ = self.there.pop(data.draw(st.integers(0, len(self.there) - 1)))
        self.cache.release(pages)
        self.cache.release(pages)

    @invariant()
    def books_agree(self) -> None:
        self.cache.check([pages for pages, _, _ in self.there])

    @invariant()
    def everyone_sees_its_own_prefix(self) -> None:
        for pages, tokens, computed in self.there:
            for number, group in enumerate(self.cache.groups):
                for page in range(group.first_page(computed, SIZE), -(-computed // SIZE)):
                    upto = min(computed, (page + 1) * SIZE)
                    held = self.content[number, pages.tables[number][page]]
                    assert held[: upto + 1] == (pages.root, *tokens[:upto])

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        for pages, _, _ in self.there:
            self.cache.release(pages)
        self.cache.check([])
        assert self.cache.in_use == 0


TestCaching = Caching.TestCase
TestCaching.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
