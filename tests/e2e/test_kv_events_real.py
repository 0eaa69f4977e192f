"""What a real vLLM tells of its cache, against what it reports of each request."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from forebay.api import (
    Adapter,
    Attempt,
    BlocksStored,
    CacheBatch,
    CacheCleared,
    Event,
    Finished,
    TokenizeRequest,
    Tokens,
    Usage,
)
from forebay.cached_blocks import CachedBlocks
from forebay.testing import adapter_context, chat_request
from forebay.testing.adapter import collect
from forebay_plugins.vllm import VllmAdapter, VllmSettings

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]

MODEL = "gemma-3-270m"


class Follower:
    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.view = CachedBlocks()
        self.batches: list[CacheBatch] = []
        self.task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        batches = self.adapter.cache_events()
        assert batches is not None
        async for batch in batches:
            self.view.apply(batch)
            self.batches.append(batch)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                if self.task.done():
                    await self.task
                await asyncio.sleep(0.02)

    def chain(self, ids: tuple[int, ...]) -> list[int]:
        """Hashes of the blocks that were told to hold the prompt's beginning, as far as held."""
        found: list[int] = []
        events = [event for batch in self.batches for event in batch.events]
        blocks = {}
        for event in events:
            if isinstance(event, BlocksStored):
                size, parent = event.block_size, event.parent
                for i, block in enumerate(event.hashes):
                    tokens = event.tokens[i * size : (i + 1) * size]
                    blocks[parent, tokens] = (block, event.extra_keys)
                    parent = block
                self.size = size
        while True:
            start = len(found) * self.size
            key = (found[-1] if found else None, ids[start : start + self.size])
            if key not in blocks or blocks[key][0] not in self.view:
                return found
            found.append(blocks[key][0])


@pytest.fixture
async def follow(real: dict[str, Any], kv_events: dict[str, str]) -> AsyncIterator[Any]:
    followers: list[Follower] = []

    def start() -> Follower:
        url = real["vllm"].url
        settings = VllmSettings(adapter="vllm", url=url, model=MODEL, **kv_events)
        followers.append(Follower(VllmAdapter(settings, adapter_context())))
        return followers[-1]

    yield start
    for follower in followers:
        follower.task.cancel()
        await asyncio.gather(follower.task, return_exceptions=True)
        await follower.adapter.aclose()


async def usage(adapter: Adapter, text: str, **fields: Any) -> Usage:
    request = chat_request(text, endpoint="completions", stream=False, max_tokens=1, **fields)
    events: list[Event] = await collect(adapter, request)
    assert isinstance(events[-1], Finished)
    assert events[-1].usage is not None
    return events[-1].usage


async def ids_of(adapter: Adapter, text: str) -> tuple[int, ...]:
    request = TokenizeRequest(id="r", model=MODEL, created=1, text=text)
    found = await adapter.perform(request, Attempt())
    assert isinstance(found, Tokens)
    return found.ids


def prompt() -> str:
    return f"{uuid.uuid4()} " + "water and stone, wind and sand, " * 60


async def test_blocks_told_agree_with_the_cached_tokens_reported(follow: Any) -> None:
    early = follow()
    text = prompt()
    first = await usage(early.adapter, text)
    assert first.cached_tokens is not None
    ids = await ids_of(early.adapter, text)
    assert len(ids) == first.prompt_tokens
    await early.until(lambda: bool(early.batches) and len(early.chain(ids)) >= 2)
    again = await usage(early.adapter, text)
    # The last token is computed in any case, to have what comes after it.
    usable = min(len(early.chain(ids)), (len(ids) - 1) // early.size) * early.size
    assert again.cached_tokens == usable
    assert again.cached_tokens > first.cached_tokens
    # Who comes late has the same, replayed.
    late = follow()
    await late.until(lambda: bool(late.batches) and late.chain(ids) == early.chain(ids))
    assert late.view.status().replayed > 0
    assert late.view.status().blocks == early.view.status().blocks
    assert late.view.status().gaps == early.view.status().gaps == 0


async def test_a_salt_keeps_caches_apart_and_is_told(follow: Any) -> None:
    follower, text = follow(), prompt()
    await usage(follower.adapter, text, cache_salt="mine")
    assert (await usage(follower.adapter, text, cache_salt="mine")).cached_tokens
    assert (await usage(follower.adapter, text, cache_salt="yours")).cached_tokens == 0

    def salts() -> str:
        events = [event for batch in follower.batches for event in batch.events]
        return str([event.extra_keys for event in events if isinstance(event, BlocksStored)])

    await follower.until(lambda: "mine" in salts() and "yours" in salts())


async def test_a_cleared_cache_is_an_empty_view(follow: Any, real: dict[str, Any]) -> None:
    follower, text = follow(), prompt()
    await usage(follower.adapter, text)
    ids = await ids_of(follower.adapter, text)
    await follower.until(lambda: bool(follower.batches) and len(follower.chain(ids)) >= 2)

    def clears() -> int:
        return sum(batch.events.count(CacheCleared()) for batch in follower.batches)

    before = clears()
    async with httpx.AsyncClient(timeout=30) as client, asyncio.timeout(30):
        url = f"{real['vllm'].url}/reset_prefix_cache"
        while not (await client.post(url)).json()["success"]:  # a block is still in use
            await asyncio.sleep(0.1)
    other = prompt()
    await usage(follower.adapter, other)  # only with the next events it says so
    await follower.until(lambda: clears() > before)
    others = await ids_of(follower.adapter, other)
    await follower.until(lambda: len(follower.chain(others)) >= 2)
    assert follower.chain(ids) == []
    assert (await usage(follower.adapter, text)).cached_tokens == 0


async def test_operators_see_what_is_cached(gateway: Any) -> None:
    gaps = (gateway.backend("vllm")["cache"] or {}).get("gaps", 0)  # other tests kill this vLLM
    async with httpx.AsyncClient(base_url=gateway.url, timeout=60) as client:
        asked = {"model": "vllm", "prompt": prompt(), "max_tokens": 1}
        assert (await client.post("/v1/completions", json=asked)).status_code == 200
    async with asyncio.timeout(30):
        while (gateway.backend("vllm")["cache"] or {}).get("tokens", 0) < 256:
            await asyncio.sleep(0.1)
    assert gateway.backend("vllm")["cache"]["gaps"] == gaps


async def test_whole_answers_tell_the_load(real: dict[str, Any]) -> None:
    settings = VllmSettings(adapter="vllm", url=real["vllm"].url, model=MODEL, load_interval=60)
    adapter = VllmAdapter(settings, adapter_context())
    try:
        scraped = await adapter.load()
        await usage(adapter, "Hello")
        told = await adapter.load()
    finally:
        await adapter.aclose()
    assert scraped is not None
    assert told is not None
    assert scraped.age == 0 < told.age
    assert told.running == scraped.running
    assert told.waiting is not None
    assert told.kv_usage is not None
    assert 0 <= told.kv_usage <= 1


@pytest.mark.parametrize("stream", [True, False])
async def test_token_ids_come_back(gateway: Any, stream: bool) -> None:
    asked = {"model": "vllm", "prompt": "One two three", "max_tokens": 4, "return_token_ids": True}
    more = {"priority": 0, "cache_salt": "mine", "stream": stream}
    async with httpx.AsyncClient(base_url=gateway.url, timeout=60) as client:
        answer = await client.post("/v1/completions", json={**asked, **more})
    assert answer.status_code == 200, answer.text
    assert '"prompt_token_ids":[2,' in answer.text
    assert '"token_ids":[' in answer.text.replace('"prompt_token_ids":[', "")
