"""The block pool: a table of cases, then a state machine against the simplest possible model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from forebay_engine.blocks import BlockPool

SIZE = 2


def publish_all(pool: BlockPool, tokens: list[int], salt: bytes = b"") -> list[int]:
    blocks = pool.allocate(len(tokens) // SIZE)
    assert blocks is not None
    digest = pool.root(salt)
    for index, block in enumerate(blocks):
        digest = pool.publish(block, digest, tokens[index * SIZE : (index + 1) * SIZE])
    return blocks


def matched(pool: BlockPool, tokens: list[int], salt: bytes = b"") -> list[int]:
    return pool.match(tokens, pool.root(salt))[0]


def test_a_prefix_is_found_up_to_where_it_differs() -> None:
    pool = BlockPool(8, SIZE)
    blocks = publish_all(pool, [1, 2, 3, 4, 5, 6])
    assert matched(pool, [1, 2, 3, 4, 9, 9]) == blocks[:2]
    assert matched(pool, [1, 2, 3]) == blocks[:1]
    assert matched(pool, [9, 2, 3, 4]) == []
    # Equal tokens behind another prefix are other content.
    assert matched(pool, [3, 4]) == []


def test_prefixes_are_shared_within_a_salt_only() -> None:
    pool = BlockPool(8, SIZE)
    blocks = publish_all(pool, [1, 2], b"tenant a")
    assert matched(pool, [1, 2], b"tenant a") == blocks
    assert matched(pool, [1, 2], b"tenant b") == []
    assert matched(pool, [1, 2]) == []


def test_a_hash_collision_is_not_a_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockPool, "_digest", lambda self, data, domain: b"same")
    pool = BlockPool(4, SIZE)
    publish_all(pool, [1, 2])
    assert matched(pool, [3, 4]) == []


def test_cached_blocks_are_evicted_oldest_first_and_tails_before_heads() -> None:
    pool = BlockPool(4, SIZE)
    first, second = publish_all(pool, [1, 2, 3, 4]), publish_all(pool, [5, 6, 7, 8])
    head, other = first[0], second[:]
    pool.release(first)
    pool.release(second)
    assert pool.allocate(1) is not None
    assert matched(pool, [1, 2, 3, 4]) == [head]
    assert matched(pool, [5, 6, 7, 8]) == other
    assert pool.allocate(1) == [head]
    assert matched(pool, [5, 6, 7, 8]) == other


def test_without_prefix_cache_nothing_is_ever_found() -> None:
    pool = BlockPool(4, SIZE, prefix_cache=False)
    publish_all(pool, [1, 2])
    assert matched(pool, [1, 2]) == []


def test_all_or_nothing_is_allocated() -> None:
    pool = BlockPool(3, SIZE)
    assert pool.allocate(4) is None
    assert pool.available == 3
    assert pool.allocate(3) is not None
    assert pool.allocate(1) is None


def test_misuse_is_refused() -> None:
    pool = BlockPool(2, SIZE)
    with pytest.raises(ValueError, match="nobody holds it"):
        pool.release([0])
    with pytest.raises(ValueError, match="not held"):
        pool.publish(0, pool.root(), [1, 2])
    with pytest.raises(ValueError, match="needs blocks"):
        BlockPool(0, SIZE)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda pool: pool._free.append(pool._free[0]), "free twice"),
        (lambda pool: pool._free.pop(), "lost"),
        (lambda pool: pool._holders.__setitem__(0, 2), "tables hold"),
        (lambda pool: pool._by_digest.clear(), "index disagrees"),
        (lambda pool: pool._idle.update({pool._free[0]: None}), "free and cached"),
    ],
)
def test_the_integrity_check_sees_damage(
    damage: Callable[[BlockPool], object], sentence: str
) -> None:
    pool = BlockPool(6, SIZE)
    table = publish_all(pool, [1, 2])
    pool.check([table])
    damage(pool)
    with pytest.raises(AssertionError, match=sentence):
        pool.check([table])


class Pool(RuleBasedStateMachine):
    """Sequences take, fill, share and give back blocks; the model is what each block holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6, SIZE)
        self.tables: list[tuple[list[int], list[int]]] = []
        #: What was last published in each block: its whole prefix.
        self.content: dict[int, tuple[int, ...]] = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=SIZE, max_size=4 * SIZE))
    def start(self, tokens: list[int]) -> None:
        """Admit a sequence as the scheduler does, and fill all its whole blocks."""
        whole = len(tokens) // SIZE
        cached, digest = self.pool.match(tokens, self.pool.root())
        for index, block in enumerate(cached):
            assert self.content[block] == tuple(tokens[: (index + 1) * SIZE])
        fits = whole - len(cached) + self.pool.idle(cached) <= self.pool.available
        if not fits:
            return
        self.pool.hold(cached)
        fresh = self.pool.allocate(whole - len(cached))
        assert fresh is not None
        table = [*cached, *fresh]
        for index in range(len(cached), whole):
            chunk = tokens[index * SIZE : (index + 1) * SIZE]
            digest = self.pool.publish(table[index], digest, chunk)
            self.content[table[index]] = tuple(tokens[: (index + 1) * SIZE])
        self.tables.append((table, tokens))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        table, _ = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        self.pool.release(table)

    @invariant()
    def books_agree(self) -> None:
        self.pool.check([table for table, _ in self.tables])

    @invariant()
    def held_blocks_keep_their_content(self) -> None:
        for table, tokens in self.tables:
            for index, block in enumerate(table):
                assert self.content[block] == tuple(tokens[: (index + 1) * SIZE])

    def teardown(self) -> None:
        for table, _ in self.tables:
            self.pool.release(table)
        self.pool.check([])
        assert self.pool.available == self.pool.num_blocks


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30)
