"""The default policy in a running gateway: who has the prefix gets the request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from forebay.api import (
    Attempt,
    BackendFailed,
    BackendSettings,
    Delta,
    Event,
    Finished,
    GenerateRequest,
    Started,
    Usage,
)
from forebay.config import Config, Model

NAMES = ["a", "b", "c"]
CONFIG = Config(
    backends={name: BackendSettings(adapter="scripted") for name in NAMES},
    models={"m": Model(backends=NAMES)},
)


@pytest.fixture
async def gateway(serve_gateway: Callable[..., Awaitable[Any]]) -> Any:
    return await serve_gateway(CONFIG)


@pytest.fixture
async def client(gateway: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with gateway.client() as client:
        yield client


async def served_by(client: httpx.AsyncClient, *texts: str) -> str:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    answer = await client.post("/v1/chat/completions", json={"model": "m", "messages": messages})
    assert answer.status_code == 200, answer.text
    return answer.headers["x-forebay-backend"]


async def test_a_conversation_stays_where_it_began(client: httpx.AsyncClient) -> None:
    homes = set()
    for topic in range(40):
        turns = [f"Question {topic}. " * 100]
        home = await served_by(client, *turns)
        homes.add(home)
        for turn in range(2):
            turns += ["An answer. " * 10, f"And what of {turn}?"]
            assert await served_by(client, *turns) == home
    assert homes == set(NAMES)  # an idle fleet draws for each new one


async def test_a_long_prompt_that_is_still_being_read_keeps_others_away(
    gateway: Any, client: httpx.AsyncClient
) -> None:
    reading = asyncio.Event()

    async def read_long(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        yield Started()
        if len(request.messages[0].text()) > 10_000:
            await reading.wait()
        yield Delta(0, "done", finish_reason="stop")
        yield Finished(Usage(1, 1))

    for adapter in gateway.scripted.values():
        adapter.script = read_long
    long = asyncio.create_task(served_by(client, "A long story. " * 1000))
    while not any(adapter.open for adapter in gateway.scripted.values()):
        await asyncio.sleep(0.001)
    short = {await served_by(client, f"Short {number}. " * 30) for number in range(20)}
    reading.set()
    assert await long not in short


async def test_a_backend_that_fails_gives_its_conversations_away(
    gateway: Any, client: httpx.AsyncClient
) -> None:
    turns = ["Remember this. " * 200]
    home = await served_by(client, *turns)
    gateway.scripted[home].script = failing
    second = await served_by(client, *turns)
    assert second != home
    assert gateway.scripted[home].requests[-1] is gateway.scripted[second].requests[-1]


async def failing(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
    raise BackendFailed("out of order")
    yield Started()
