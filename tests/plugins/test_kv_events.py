"""KV-cache events: each layout, and a view that is never wrong, whatever is lost on the way."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.api import (
    Adapter,
    BackendFailed,
    BackendGarbage,
    BlocksRemoved,
    BlocksStored,
    CacheBatch,
    CacheCleared,
    ConfigError,
)
from forebay.cached_blocks import CachedBlocks
from forebay.testing import adapter_context
from forebay_plugins.kv_event_format import KvEventDecoder
from forebay_plugins.kv_events import KvEvents, KvEventSettings, Numbered
from forebay_plugins.sglang import SglangAdapter, SglangSettings
from forebay_plugins.vllm import VllmAdapter, VllmSettings

DIGEST = bytes(range(32))
SHORT = int.from_bytes(DIGEST[-8:], "big")
HEAD: list[object] = ["BlockStored", [DIGEST, -1], 7, [5, 6, 7, 8], 2, None]
BOTH = BlocksStored(
    hashes=(SHORT, (1 << 64) - 1), block_size=2, parent=7, tokens=(5, 6, 7, 8), medium="GPU"
)
MAP: dict[str, object] = {
    "type": "BlockStored",
    "block_hashes": [DIGEST, -1],
    "parent_block_hash": 7,
    "token_ids": [5, 6, 7, 8],
    "block_size": 2,
    "lora_id": None,
    "medium": "GPU",
    "lora_name": None,
}
REPLACE = msgspec.structs.replace


def decoded(*events: object, tail: tuple[object, ...] = (0,)) -> tuple[object, ...]:
    return KvEventDecoder().decode(msgspec.msgpack.encode([1.5, events, *tail]))


@pytest.mark.parametrize("tail", [(), (None,), (3,), (3, "more")])
@pytest.mark.parametrize(
    ("event", "meaning"),
    [
        (HEAD, REPLACE(BOTH, medium="")),
        ([*HEAD, "GPU"], BOTH),
        ([*HEAD, "GPU", "ada"], REPLACE(BOTH, lora="ada")),
        (
            [*HEAD, "GPU", None, [["salt"], None], 4],
            REPLACE(BOTH, extra_keys=(["salt"], None), group=4),
        ),
        (
            [*HEAD, "CPU", None, None, 0, "full_attention", None, "LOCAL", None, "s", "more"],
            REPLACE(BOTH, medium="CPU"),
        ),
        (MAP, BOTH),
        (
            {**MAP, "kv_cache_spec_kind": "mla_attention", "group_idx": 2, "session_id": "s"},
            REPLACE(BOTH, group=2),
        ),
        ({**MAP, "cache_salt": "s", "medium": "CPU_PINNED"}, REPLACE(BOTH, medium="CPU_PINNED")),
        (["BlockRemoved", [DIGEST]], BlocksRemoved(hashes=(SHORT,))),
        (["BlockRemoved", [1], "GPU", 3], BlocksRemoved(hashes=(1,), medium="GPU", group=3)),
        (
            {"type": "BlockRemoved", "block_hashes": [1], "medium": "GPU", "more": 1},
            BlocksRemoved(hashes=(1,), medium="GPU"),
        ),
        (["AllBlocksCleared"], CacheCleared()),
        ({"type": "AllBlocksCleared"}, CacheCleared()),
    ],
)
def test_layouts(event: object, meaning: object, tail: tuple[object, ...]) -> None:
    assert decoded(event, tail=tail) == (meaning,)
    many = {f"field_{i}": i for i in range(20)}  # a map that is written with a length of 16 bits
    if isinstance(event, dict):
        assert decoded({**event, **many}, tail=tail) == (meaning,)


def test_only_groups_that_keep_every_token_are_followed() -> None:
    window = {**MAP, "group_idx": 1, "kv_cache_spec_kind": "sliding_window"}
    full = {**MAP, "group_idx": 5, "kv_cache_spec_kind": "full_attention"}
    gone = {"type": "BlockRemoved", "block_hashes": [9], "medium": "GPU"}
    found = decoded(window, full, {**gone, "group_idx": 1}, {**gone, "group_idx": 5})
    assert found == (
        REPLACE(BOTH, group=5),
        BlocksRemoved(hashes=(9,), medium="GPU", group=5),
    )
    assert decoded({**MAP, "block_hashes": []}, {**MAP, "locality": "REMOTE"}) == ()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"events": []}),
        msgspec.msgpack.encode([1.5, [["BlockMoved", [1]]]]),
        msgspec.msgpack.encode([1.5, [{"type": "BlockStored"}]]),
        msgspec.msgpack.encode([1.5, [{**MAP, "block_hashes": ["x"]}]]),
        msgspec.msgpack.encode([1.5, [7]]),
    ],
)
def test_what_is_unknown_is_said_to_be(payload: bytes) -> None:
    with pytest.raises(BackendGarbage, match="KV-cache event"):
        KvEventDecoder().decode(payload)


class Listener:
    """What comes of a publisher, and the view that it makes."""

    def __init__(self, events: KvEvents) -> None:
        self.view = CachedBlocks()
        self.batches: list[CacheBatch] = []
        self.check: Callable[[CacheBatch], None] = lambda batch: None
        self._task = asyncio.create_task(self._listen(events))

    async def _listen(self, events: KvEvents) -> None:
        async for batch in events.batches():
            self.view.apply(batch)
            self.batches.append(batch)
            self.check(batch)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                if self._task.done():
                    await self._task
                await asyncio.sleep(0.002)

    async def reaches(self, number: int) -> None:
        await self.until(lambda: self.view.status().sequence == number)

    @property
    def losses(self) -> list[str]:
        events = [event for batch in self.batches for event in batch.events]
        return [event.lost for event in events if isinstance(event, CacheCleared) and event.lost]

    async def aclose(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def settings_of(publisher: Any, **changes: Any) -> KvEventSettings:
    given: dict[str, Any] = {
        "adapter": "vllm",
        "url": "http://127.0.0.1:9",
        "kv_events": publisher.address,
        "kv_events_replay": publisher.replay,
        "kv_events_topic": "kv",
    }
    return KvEventSettings(**{**given, **changes})


@asynccontextmanager
async def listening(publisher: Any, **changes: Any) -> AsyncIterator[Listener]:
    listener = Listener(KvEvents(settings_of(publisher, **changes)))
    try:
        yield listener
    finally:
        await listener.aclose()
        await publisher.aclose()


@pytest.fixture(scope="session")
def kv(load_fake: Callable[[str], ModuleType]) -> ModuleType:
    return load_fake("kv_publisher")


Make = Callable[..., Awaitable[Any]]


@pytest.fixture
def publisher(kv: ModuleType, tmp_path: Path) -> Make:
    async def make(**options: Any) -> Any:
        given = {"address": f"ipc://{tmp_path}/e", "replay": f"ipc://{tmp_path}/r", **options}
        made = kv.Publisher(**given)
        await made.start()
        return made

    return make


@pytest.mark.parametrize("old", [False, True])
async def test_who_comes_late_and_who_misses_some_asks_again(
    publisher: Make, kv: ModuleType, old: bool
) -> None:
    server = await publisher(old=old)
    await server.publish(kv.stored(1, 2))
    await server.publish(kv.removed(1))
    async with listening(server) as heard:
        await heard.reaches(1)
        await server.subscribed()
        assert (1 in heard.view, 2 in heard.view) == (False, True)
        await server.publish(kv.stored(3), lost=True)
        await server.publish(kv.removed(2), lost=True)
        await server.publish(kv.stored(4))
        await heard.reaches(4)
        assert [block for block in range(6) if block in heard.view] == [3, 4]
        status = heard.view.status()
        assert (status.blocks, status.tokens, status.gaps) == (2, 4, 0)
        assert [batch.sequence for batch in heard.batches] == [0, 1, 2, 3, 4]
        assert server.asked == [0, 2]
        await server.publish(kv.CLEARED)
        await heard.reaches(5)
        assert heard.view.status().blocks == 0
        assert heard.losses == []


@pytest.mark.parametrize("replay", [True, False])
async def test_what_cannot_be_had_again_empties_the_view(
    publisher: Make, kv: ModuleType, replay: bool
) -> None:
    server = await publisher(kept=1, **({} if replay else {"replay": ""}))
    async with listening(server) as heard:
        await server.subscribed()
        await server.publish(kv.stored(1))
        await heard.reaches(0)
        await server.publish(kv.removed(1), lost=True)
        await server.publish(kv.stored(2))
        await heard.reaches(2)
        assert [block for block in range(4) if block in heard.view] == [2]
        assert heard.losses == ["messages 1 to 1 cannot be had"]
        assert heard.view.status().gaps == 1


@pytest.mark.parametrize("replay", [True, False])
async def test_a_publisher_that_restarts_begins_with_an_empty_view(
    publisher: Make, kv: ModuleType, replay: bool
) -> None:
    server = await publisher(**({} if replay else {"replay": ""}))
    async with listening(server) as heard:
        await server.subscribed()
        for block in range(3):
            await server.publish(kv.stored(block))
        await heard.reaches(2)
        await server.restart()
        await heard.until(lambda: heard.losses != [])
        assert heard.view.status().blocks == 0
        # Its messages get on as far as the old one's: by their numbers nothing is missing.
        for block in range(3):
            await server.publish(kv.stored(10 + block), lost=True)
        await server.subscribed()
        await server.publish(kv.stored(13))
        await heard.reaches(3)
        expected = [10, 11, 12, 13] if replay else [13]
        assert [block for block in range(20) if block in heard.view] == expected


async def test_a_number_that_goes_back_is_a_restart(publisher: Make, kv: ModuleType) -> None:
    server = await publisher()
    async with listening(server) as heard:
        await server.subscribed()
        await server.publish(kv.stored(1))
        await server.publish(kv.stored(2))
        await heard.reaches(1)
        server.number = 0
        server.buffer.clear()
        await server.publish(kv.stored(3))
        await heard.until(lambda: 3 in heard.view)
        assert 1 not in heard.view
        assert heard.losses == ["the connection was lost"]


async def test_a_publisher_that_connects(publisher: Make, kv: ModuleType, free: str) -> None:
    server = await publisher(address=free, connects=True)
    async with listening(server, kv_events_bind=True) as heard:
        await server.subscribed()
        await server.publish(kv.stored(1))
        await heard.until(lambda: 1 in heard.view)
        await server.restart()
        await server.subscribed()
        await server.publish(kv.stored(2))
        await heard.until(lambda: 2 in heard.view)
        assert 1 not in heard.view


@pytest.fixture
def free(unused_tcp_port: int) -> str:
    return f"tcp://127.0.0.1:{unused_tcp_port}"


async def test_other_topics_are_left_alone(publisher: Make, kv: ModuleType) -> None:
    server = await publisher()
    async with listening(server) as heard:
        await server.subscribed()
        other = msgspec.msgpack.encode([1.5, [kv.stored(1)]])
        await server._pub.send_multipart([b"kv-other", bytes(8), other])
        await server.publish(kv.stored(2))
        await heard.until(lambda: 2 in heard.view)
        assert 1 not in heard.view


async def test_events_of_an_unknown_kind_empty_the_view(publisher: Make, kv: ModuleType) -> None:
    server = await publisher()
    async with listening(server) as heard:
        await server.subscribed()
        await server.publish(kv.stored(1))
        await server.publish({"type": "BlockMoved", "block_hashes": [1]})
        await server.publish(kv.stored(2))
        await heard.reaches(2)
        assert (1 in heard.view, 2 in heard.view) == (False, True)
        (lost,) = heard.losses
        assert "BlockMoved" in lost


async def test_what_is_no_publisher_of_events(publisher: Make, free: str) -> None:
    server = await publisher()
    async with listening(server) as heard:
        await server.subscribed()
        await server._pub.send_multipart([b"kv", b"7", b""])
        with pytest.raises(BackendGarbage, match="kv_events"):
            await heard.until(lambda: False)
    for wrong in ({"kv_events": "tcp://nowhere"}, {"kv_events": free, "kv_events_bind": True}):
        taken = await publisher(address=free)
        async with listening(taken, **wrong) as heard:
            with pytest.raises(BackendFailed, match="kv_events: tcp://"):
                await heard.until(lambda: False)


CHANGES = st.tuples(
    st.sampled_from(["store", "store", "remove", "clear"]), st.integers(0, 3), st.booleans()
)


@given(changes=st.lists(CHANGES, max_size=30), kept=st.sampled_from([1, 2, 100]))
def test_whatever_is_lost_the_view_is_never_wrong(
    kv: ModuleType, changes: list[tuple[str, int, bool]], kept: int
) -> None:
    """A cache, its publisher that keeps the last messages, and a listener who misses some."""
    numbered, view, whole = Numbered(), CachedBlocks(), True
    history: list[set[int]] = []
    buffer: deque[tuple[int, bytes]] = deque(maxlen=kept)

    def take(number: int, payload: bytes, **replayed: bool) -> None:
        nonlocal whole
        batch = numbered.take(number, payload, **replayed)
        if batch is None:
            return
        view.apply(batch)
        whole &= not any(isinstance(one, CacheCleared) and one.lost for one in batch.events)
        shown = {block for block in range(4) if block in view}
        assert shown <= history[number]
        assert shown == history[number] or not whole

    for number, (what, block, lost) in enumerate(changes):
        truth = history[-1] if history else set()
        if what == "clear":
            history.append(set())
            event = kv.CLEARED
        else:
            history.append(truth | {block} if what == "store" else truth - {block})
            event = kv.stored(block) if what == "store" else kv.removed(block)
        buffer.append((number, msgspec.msgpack.encode([1.5, [event]])))
        if lost:
            continue
        missing = numbered.misses(number)
        if missing is not None:
            whole &= (
                numbered.begun or buffer[0][0] == 0
            )  # of what was before it began it knows less
            for old, payload in list(buffer):
                if old >= missing:
                    take(old, payload, replayed=True)
        take(*buffer[-1])


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("store"), st.integers(0, 2), st.booleans()),
        st.tuples(st.just("remove"), st.integers(0, 2), st.booleans()),
        st.tuples(st.just("clear"), st.just(0), st.booleans()),
        st.tuples(st.just("restart"), st.just(0), st.just(False)),
    ),
    max_size=15,
)


@settings(max_examples=6)
@given(steps=STEPS, kept=st.sampled_from([1, 1000]), late=st.booleans())
def test_the_view_is_the_truth_or_less(
    kv: ModuleType, steps: list[tuple[str, int, bool]], kept: int, late: bool
) -> None:
    """``late``: the listener comes after all steps but the last."""
    asyncio.run(_live_through(kv, steps, kept, late))


async def _live_through(
    kv: ModuleType, steps: list[tuple[str, int, bool]], kept: int, late: bool
) -> None:
    with TemporaryDirectory() as folder:
        server = kv.Publisher(f"ipc://{folder}/e", f"ipc://{folder}/r", kept=kept)
        await server.start()
        life = _Life(kv, server)
        if late:
            await life.go(steps)
        async with listening(server) as heard:
            heard.check = lambda _: life.check(heard.view)
            await server.subscribed()
            if not late:
                await life.go(steps)
            await life.last(heard)
            assert life.shown(heard.view) <= life.truth
            if kept == 1000:
                # Where a session began with a publisher that was just ending, its end is told late,
                # and what the next one sent is withdrawn once more until it has been replayed.
                await heard.until(lambda: life.shown(heard.view) == life.truth)
                assert not [lost for lost in heard.losses if "cannot be had" in lost]


class _Life:
    """A cache and its publisher; blocks bear the number of the life that they belong to."""

    def __init__(self, kv: ModuleType, server: Any) -> None:
        self._kv, self._server = kv, server
        self.life = 0
        self.truth: set[int] = set()
        #: What was in the cache after each message of each life.
        self._history: dict[tuple[int, int], set[int]] = {}

    async def go(self, steps: list[tuple[str, int, bool]]) -> None:
        for what, number, lost in steps:
            block = self.life * 100 + number
            if what == "restart":
                await self._server.restart()
                self.life += 1
                self.truth = set()
            elif what == "store":
                self.truth = self.truth | {block}
                await self._publish(self._kv.stored(block), lost)
            elif what == "remove":
                self.truth = self.truth - {block}
                await self._publish(self._kv.removed(block), lost)
            else:
                self.truth = set()
                await self._publish(self._kv.CLEARED, lost)

    async def _publish(self, event: dict[str, Any], lost: bool) -> None:
        number = self._server.number
        self._history[self.life, number] = self.truth
        await self._server.publish(event, lost=lost)

    async def last(self, heard: Listener) -> None:
        """Messages until the listener has the newest: those sent before he was back, he missed."""
        async with asyncio.timeout(20):
            while self.life * 100 + 50 not in heard.view:
                await self.go([("store", 50, False)])
                await asyncio.sleep(0.01)
            await heard.reaches(self._server.number - 1)

    def shown(self, view: CachedBlocks) -> set[int]:
        return {block for block in range((self.life + 1) * 100) if block in view}

    def check(self, view: CachedBlocks) -> None:
        shown = self.shown(view)
        if shown:
            lives = {block // 100 for block in shown}
            assert len(lives) == 1, "blocks of a publisher that is gone are mixed with a new one's"
            number = view.status().sequence
            assert number is not None
            assert shown <= self._history[lives.pop(), number]


async def test_an_adapter_that_is_told_to_listen(publisher: Make, kv: ModuleType) -> None:
    server = await publisher()
    await server.publish(kv.stored(1))
    url, where = "http://127.0.0.1:9", {"kv_events": server.address}
    adapters: list[Adapter] = [
        VllmAdapter(VllmSettings(adapter="vllm", url=url, **where), adapter_context()),
        SglangAdapter(SglangSettings(adapter="sglang", url=url, **where), adapter_context()),
    ]
    for adapter in adapters:
        batches = adapter.cache_events()
        assert batches is not None
        first = asyncio.ensure_future(anext(batches))
        await server.subscribed()
        await server.publish(kv.stored(2))
        assert (await first).events == (
            BlocksStored(hashes=(2,), block_size=2, tokens=(0, 1), medium="GPU"),
        )
        await batches.aclose()
    await server.aclose()
    silent = VllmAdapter(VllmSettings(adapter="vllm", url=url), adapter_context())
    assert silent.cache_events() is None


def test_without_pyzmq_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zmq.asyncio", None)
    settings = VllmSettings(adapter="vllm", url="http://x", kv_events="ipc:///x")
    with pytest.raises(ConfigError, match=r"pip install forebay\[kv-events\]"):
        VllmAdapter(settings, adapter_context())
    VllmAdapter(VllmSettings(adapter="vllm", url="http://x"), adapter_context())
