"""The times that servers report, to the millisecond; how they stand in a trace: test_traces.py."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from types import ModuleType
from typing import Any

import pytest

from forebay.api import Adapter, Finished, GenerateRequest, Relayed, Timings
from forebay.testing import Exchange, Scenario, ScriptedServer, adapter_context, chat_request
from forebay.testing.adapter import collect
from forebay_plugins import sglang, triton, trtllm

MODULES = {"sglang": sglang, "triton": triton, "trtllm": trtllm}
Load = Callable[[str], ModuleType]


@asynccontextmanager
async def serving(name: str, script: Any, **settings: Any) -> AsyncIterator[Adapter]:
    kind = next(kind for kind in MODULES[name].adapters() if kind.name == name)
    async with ScriptedServer(script) as server:
        made = kind.settings(adapter=name, url=server.url, **settings)
        adapter = kind.build(made, adapter_context())
        await adapter.start()
        await adapter.probe()
        try:
            yield adapter
        finally:
            await adapter.aclose()


def close_to(queue: float, prefill: float, decode: float) -> Any:
    return pytest.approx((queue, prefill, decode), abs=1e-6)


async def timings(adapter: Adapter, request: GenerateRequest) -> Timings | None:
    *_, finished = await collect(adapter, request)
    assert isinstance(finished, Finished)
    return finished.timings


@pytest.mark.parametrize("stream", [True, False])
async def test_trtllm_by_server_timing(load_fake: Load, stream: bool) -> None:
    """`ttft` and `e2e` both count from the request's arrival."""
    async with serving("trtllm", load_fake("trtllm_server").serve) as adapter:
        told = await timings(adapter, chat_request(stream=stream))
    assert told is not None
    assert (told.queue, told.prefill, told.decode) == close_to(0.00125, 0.00225, 0.0025)


@pytest.mark.parametrize(
    "event",
    [
        b"",
        b"event: trtllm.perf_metrics\ndata: {",
        b'event: trtllm.perf_metrics\ndata: {"Server-Timing": 7}\n\n',
        b'event: trtllm.perf_metrics\ndata: {"Server-Timing": "server_queue;dur=1"}\n\n',
        b'event: other\ndata: {"Server-Timing": "server_queue;dur=1"}\n\n',
    ],
)
async def test_what_follows_the_end_can_spoil_no_answer(load_fake: Load, event: bytes) -> None:
    fake = load_fake("trtllm_server")
    said = fake.Said({"messages": [], "model": "m"})

    async def script(exchange: Exchange) -> None:
        if exchange.method == "GET":
            fake.get(exchange, Scenario.HEALTHY)
            return
        exchange.begin()
        exchange.send(said.piece("a", "stop") + b"data: [DONE]\n\n" + event)

    async with serving("trtllm", script) as adapter:
        *_, finished = await collect(adapter, chat_request())
    assert (finished.timings, finished.finish_reasons) == (None, ("stop",))


async def test_sglang_by_the_meta_info_that_its_clients_do_not_see(load_fake: Load) -> None:
    script = partial(load_fake("sglang_server").serve, scenario=Scenario.HEALTHY)
    async with serving("sglang", script) as adapter:
        relayed, finished = await collect(adapter, chat_request(stream=False))
        assert await timings(adapter, chat_request(stream=False, n=2)) is None
    assert isinstance(finished, Finished)
    assert finished.timings is not None
    told = finished.timings
    assert (told.queue, told.prefill, told.decode) == close_to(0.001, 0.002, 0.003)
    assert isinstance(relayed, Relayed)
    assert "meta_info" not in json.loads(relayed.data)["choices"][0]


async def test_sglang_is_only_asked_if_it_counts(load_fake: Load) -> None:
    fake = load_fake("sglang_server")
    asked = []

    async def script(exchange: Exchange) -> None:
        if exchange.method == "POST":
            asked.append(exchange.json)
        info = {**fake.SERVER_INFO, "enable_metrics": False}
        await fake.serve(exchange, Scenario.HEALTHY, info)

    async with serving("sglang", script) as adapter:
        assert await timings(adapter, chat_request(stream=False)) is None
    assert "return_meta_info" not in asked[0]


TIMES = {
    "arrival_time_ns": 8_000_000_000_000,
    "first_scheduled_time_ns": 8_000_001_000_000,
    "first_token_time_ns": 8_000_003_000_000,
    "last_token_time_ns": 8_000_006_000_000,
}


@pytest.mark.parametrize(
    ("times", "known"),
    [
        (TIMES, True),
        ({}, False),
        (dict.fromkeys(TIMES, 0), False),
        ({**TIMES, "last_token_time_ns": 0}, False),
        ({**TIMES, "first_token_time_ns": "soon"}, False),
    ],
)
async def test_triton_by_the_moments_of_the_last_response(
    load_fake: Load, times: Mapping[str, object], known: bool
) -> None:
    fake = load_fake("triton_servers")

    async def script(exchange: Exchange) -> None:
        if not exchange.path.endswith("generate_stream"):
            await fake.serve(exchange)
            return
        assert exchange.json["return_perf_metrics"] is True
        exchange.begin()
        exchange.send(fake.event({"text_output": "a", **dict.fromkeys(TIMES, 0)}))
        exchange.send(fake.event({"text_output": "", **times}))

    settings = {"model": "ensemble", "chat_template": "plain"}
    async with serving("triton", script, **settings) as adapter:
        told = await timings(adapter, chat_request())
        assert await timings(adapter, chat_request(n=2)) is None  # they have none in common
    if known:
        assert told is not None
        assert (told.queue, told.prefill, told.decode) == close_to(0.001, 0.002, 0.003)
    else:
        assert told is None
