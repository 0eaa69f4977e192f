"""What is known of a backend's cache: a bounded view, and what operators see of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from forebay.api import (
    Adapter,
    AdapterKind,
    Attempt,
    BackendFailed,
    BackendSettings,
    BlocksRemoved,
    BlocksStored,
    CacheBatch,
    CacheCleared,
    CacheEvent,
    Capabilities,
    Event,
    GenerateRequest,
    hookimpl,
)
from forebay.cached_blocks import CachedBlocks, follow
from forebay.config import Config, Model

HASHES = st.lists(st.integers(0, 12), min_size=1, max_size=4, unique=True).map(tuple)
MEDIA = st.sampled_from(["GPU", "CPU"])
GROUPS = st.integers(0, 1)
EVENTS = st.lists(
    st.one_of(
        st.builds(
            BlocksStored, hashes=HASHES, block_size=st.integers(1, 9), medium=MEDIA, group=GROUPS
        ),
        st.builds(BlocksRemoved, hashes=HASHES, medium=MEDIA, group=GROUPS),
        st.builds(CacheCleared, lost=st.sampled_from(["", "lost"])),
    ),
    max_size=40,
)


@given(events=EVENTS, limit=st.sampled_from([3, 100]))
def test_the_view_is_what_the_events_say_and_within_its_bound(
    events: list[CacheEvent], limit: int
) -> None:
    view, gaps = CachedBlocks(limit), 0
    truth: dict[tuple[int, str, int], int] = {}
    for event in events:
        view.apply(CacheBatch(events=(event,)))
        if isinstance(event, CacheCleared):
            truth.clear()
            gaps += bool(event.lost)
        else:
            keys = [(event.group, event.medium, block) for block in event.hashes]
            for key in keys:
                truth.pop(key, None)
            if isinstance(event, BlocksStored):
                truth |= dict.fromkeys(keys, event.block_size)
        status = view.status()
        assert status.blocks <= limit
        assert {block for block in range(13) if block in view} <= {key[2] for key in truth}
        if limit == 100:
            assert (status.blocks, status.tokens) == (len(truth), sum(truth.values()))
            assert {block for block in range(13) if block in view} == {key[2] for key in truth}
    assert (view.status().gaps, view.status().events) == (gaps, len(events))


def test_what_came_first_is_forgotten_first() -> None:
    view = CachedBlocks(limit=3)
    view.apply(CacheBatch(events=(BlocksStored(hashes=(1, 2, 3), block_size=16),)))
    view.apply(CacheBatch(events=(BlocksStored(hashes=(1, 4), block_size=16),)))
    assert [block for block in range(6) if block in view] == [1, 3, 4]
    assert view.status().tokens == 48


STORED = CacheBatch(events=(BlocksStored(hashes=(1, 2), block_size=16),), sequence=7)


class Telling(Adapter):
    """Tells of its cache; each time it is asked, what comes next in ``lives``."""

    def __init__(self) -> None:
        self.lives: Iterator[list[CacheBatch | Exception]] = iter(())
        self.told = 0
        self.closed = 0

    async def stream(self, request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        raise BackendFailed("it only tells")
        yield

    async def probe(self) -> Capabilities:
        return Capabilities()

    def cache_events(self) -> AsyncGenerator[CacheBatch, None] | None:
        return self._tell()

    async def _tell(self) -> AsyncGenerator[CacheBatch, None]:
        self.told += 1
        try:
            for batch in next(self.lives, []):
                if isinstance(batch, Exception):
                    raise batch
                yield batch
            await asyncio.Event().wait()
        finally:
            self.closed += 1


class Plugin:
    def __init__(self, adapter: Telling) -> None:
        self._adapter = adapter

    @hookimpl
    def adapters(self) -> list[AdapterKind]:
        return [
            AdapterKind(name="telling", settings=BackendSettings, build=lambda *_: self._adapter)
        ]


async def test_operators_see_what_is_known(serve_gateway: Any) -> None:
    adapter = Telling()
    adapter.lives = iter([[STORED]])
    config = Config(
        backends={name: BackendSettings(adapter=name) for name in ("telling", "scripted")},
        models={"m": Model(backends=["telling", "scripted"])},
    )
    gateway = await serve_gateway(config, extra={"telling": Plugin(adapter)})
    async with gateway.admin() as admin:
        rows = {row["name"]: row for row in (await admin.get("/backends")).json()["backends"]}
        assert rows["scripted"]["cache"] is None
        cache = rows["telling"]["cache"]
        assert cache.pop("age") >= 0
        expected = {"blocks": 2, "tokens": 32, "events": 1, "gaps": 0, "replayed": 0, "sequence": 7}
        assert cache == expected
        page = (await admin.get("/metrics")).text
    assert 'forebay_backend_cached_blocks{backend="telling"} 2.0' in page
    assert 'forebay_backend_cached_tokens{backend="telling"} 32.0' in page
    assert 'cached_blocks{backend="scripted"}' not in page
    await gateway.app.fleet.aclose()
    assert adapter.closed == adapter.told == 1


async def test_after_a_failure_nothing_is_believed_and_it_is_asked_again() -> None:
    adapter, view = Telling(), CachedBlocks()
    ends = [BackendFailed("the server has gone"), ValueError("a bug")]
    adapter.lives = iter([[STORED, ends[0]], [STORED, ends[1]], [STORED]])
    following = asyncio.create_task(follow("a", adapter, view, pause=0.0))
    async with asyncio.timeout(10):
        while adapter.told < 3 or 1 not in view:
            await asyncio.sleep(0.001)
    assert (view.status().gaps, view.status().events, view.status().blocks) == (2, 5, 2)
    assert adapter.closed == 2
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    assert adapter.closed == 3


async def test_a_backend_that_does_not_tell_is_not_followed() -> None:
    class Mute(Telling):
        def cache_events(self) -> AsyncGenerator[CacheBatch, None] | None:
            return Adapter.cache_events(self)

    await follow("a", Mute(), CachedBlocks(), pause=60)
