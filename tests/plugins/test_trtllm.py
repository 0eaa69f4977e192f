"""What trtllm-serve is sent, and where its load is read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from forebay.api import (
    Attempt,
    BackendBusy,
    BackendError,
    BackendRefused,
    BlocksRemoved,
    BlocksStored,
    CacheBatch,
    CacheCleared,
    ConnectFailed,
    Delta,
    Embeddings,
    EmbedRequest,
    GenerateRequest,
    Load,
    Sampling,
    StreamTruncated,
    TokenizeRequest,
    ToolCallDelta,
    Unanswered,
    Unsupported,
)
from forebay.testing import Exchange, ScriptedServer, adapter_context, chat_request
from forebay.testing.adapter import collect
from forebay_plugins.trtllm import TrtLlmAdapter, TrtLlmSettings

#: How it is told to draw from all tokens as they are.
NEUTRAL = TrtLlmAdapter.neutral


@pytest.fixture(scope="session")
def server() -> ModuleType:
    path = Path(__file__).parents[1] / "fakes" / "trtllm_server.py"
    spec = spec_from_file_location("trtllm_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@asynccontextmanager
async def serving(
    script: Any, **settings: Any
) -> AsyncIterator[tuple[TrtLlmAdapter, ScriptedServer]]:
    async with ScriptedServer(script) as server:
        made = TrtLlmSettings(adapter="trtllm", url=server.url, **settings)
        adapter = TrtLlmAdapter(made, adapter_context())
        try:
            yield adapter, server
        finally:
            await adapter.aclose()


async def sent(server: ModuleType, request: GenerateRequest) -> dict[str, Any]:
    """The body of that request, as the server gets it."""
    async with serving(server.serve) as (adapter, running):
        await collect(adapter, request)
    body: dict[str, Any] = running.exchanges[0].json
    return body


async def refused(server: ModuleType, request: GenerateRequest) -> str:
    """The field for which the adapter refuses it, without asking the server."""
    async with serving(server.serve) as (adapter, running):
        with pytest.raises(BackendRefused, match="trtllm-serve") as raised:
            await collect(adapter, request)
    assert running.exchanges == []
    assert raised.value.status == 400
    assert raised.value.retryable, "another backend may know it"
    return raised.value.param or ""


async def test_what_it_knows_is_sent(server: ModuleType) -> None:
    known: dict[str, Any] = {
        "top_k": 3,
        "chat_template_kwargs": {"a": 1},
        "reasoning_effort": "low",
    }
    body = await sent(server, chat_request(model="m", **known))
    assert body == {
        "model": "m",
        "stream": True,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 16,
        "stream_options": {"include_usage": True},
        **NEUTRAL,
        **known,
    }


async def test_what_says_nothing_is_left_out(server: ModuleType) -> None:
    """An unknown field would be refused even with null, and null for a number too."""
    body = await sent(
        server, chat_request(store=True, metadata={"a": "b"}, logit_bias=None, n=1, guided={})
    )
    known = {"model", "stream", "messages", "max_tokens", "stream_options"}
    assert set(body) == known | NEUTRAL.keys()


@pytest.mark.parametrize("field", ["guided_regex", "structured_outputs", "unheard_of"])
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
async def test_what_it_does_not_know_is_refused(
    server: ModuleType, endpoint: Any, field: str
) -> None:
    more: dict[str, Any] = {field: "x"}
    assert await refused(server, chat_request(endpoint=endpoint, **more)) == field


async def test_each_endpoint_has_its_own_fields(server: ModuleType) -> None:
    assert await refused(server, chat_request(suffix="x", endpoint="completions")) == "suffix"
    assert await refused(server, chat_request(detokenize=False)) == "detokenize"
    request = chat_request(endpoint="completions", detokenize=False)
    assert (await sent(server, request))["detokenize"] is False


async def test_there_is_one_name_for_the_limit(server: ModuleType) -> None:
    request = chat_request(max_completion_tokens=7)
    request = msgspec.structs.replace(request, sampling=Sampling(max_tokens=7))
    body = await sent(server, request)
    assert body["max_tokens"] == 7
    assert "max_completion_tokens" not in body


async def test_top_k_is_switched_off_by_0(server: ModuleType) -> None:
    request = msgspec.structs.replace(chat_request(top_k=-1), sampling=Sampling(top_k=-1))
    assert (await sent(server, request))["top_k"] == 0


async def test_logprobs_of_the_chosen_tokens_alone(server: ModuleType) -> None:
    request = chat_request(endpoint="completions", logprobs=0)
    request = msgspec.structs.replace(request, sampling=Sampling(logprobs=0))
    assert (await sent(server, request))["logprobs"] == 1


async def test_stream_options(server: ModuleType) -> None:
    asked = {"include_usage": False, "include_obfuscation": True, "continuous_usage_stats": True}
    body = await sent(server, chat_request(stream_options=asked))
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    field = await refused(server, chat_request(stream_options={"other": 1}))
    assert field == "stream_options.other"


async def test_tools_are_used_without_being_asked_twice(server: ModuleType) -> None:
    """Its default is `none`."""
    tool = {"type": "function", "function": {"name": "f"}}

    def calling(**more: Any) -> GenerateRequest:
        return msgspec.structs.replace(chat_request(tools=[tool], **more), needs_tools=True)

    assert (await sent(server, calling()))["tool_choice"] == "auto"
    named = {"type": "function", "function": {"name": "f"}}
    assert (await sent(server, calling(tool_choice=named)))["tool_choice"] == named
    assert await refused(server, calling(tool_choice="required")) == "tool_choice"


async def test_starting_is_busy() -> None:
    async def script(exchange: Exchange) -> None:
        error = {"message": "starting", "type": "ServiceUnavailableError", "code": "starting"}
        exchange.answer(503, {"error": error}, {"retry-after": "1"})

    async with serving(script) as (adapter, _):
        with pytest.raises(BackendBusy) as raised:
            await adapter.probe()
    assert raised.value.retry_after == 1


async def test_load_from_gauges(server: ModuleType) -> None:
    async with serving(server.serve) as (adapter, running):
        assert await adapter.load() is None  # not before a probe has found them
        await adapter.probe()
        assert await adapter.load() == Load(running=3, waiting=2, kv_usage=0.5)
        assert "/metrics" not in {exchange.path for exchange in running.exchanges}


async def test_no_gauges_no_load() -> None:
    async def script(exchange: Exchange) -> None:
        if exchange.path == "/prometheus/metrics":
            exchange.answer(404, {"detail": "Not Found"})
        else:
            exchange.answer(200, {"data": [], "version": "1"})

    async with serving(script) as (adapter, _):
        await adapter.probe()
        assert await adapter.load() is None


async def test_load_from_iterations_that_reading_takes_away(server: ModuleType) -> None:
    pages = [[], server.ITERATIONS, []]

    async def script(exchange: Exchange) -> None:
        exchange.answer(200, pages.pop(0))

    async with serving(script, load_source="iterations") as (adapter, running):
        assert await adapter.load() is None
        assert await adapter.load() == Load(running=4, waiting=7, kv_usage=0.25)
        assert await adapter.load() == Load(running=0, waiting=0, kv_usage=0.25)
    assert {exchange.path for exchange in running.exchanges} == {"/metrics"}


async def test_load_is_not_read_where_not_wanted(server: ModuleType) -> None:
    async with serving(server.serve, load_source="none") as (adapter, running):
        await adapter.probe()
        assert await adapter.load() is None
    assert {exchange.path for exchange in running.exchanges} == {
        "/health",
        "/v1/models",
        "/version",
    }


def item(event_id: int, data: dict[str, Any], window: int = 4096, **more: Any) -> dict[str, Any]:
    return {"event_id": event_id, "data": data, "window_size": window, **more}


def storing(*hashes: int, parent: int | None = None, **more: Any) -> dict[str, Any]:
    tokens = [{"type": "unique_token", "token_id": i, "token_extra_id": 0} for i in (5, 6)]
    block = {"type": "stored_block", "tokens": tokens, "cache_level": 0, "priority": 35, **more}
    blocks = [{**block, "block_hash": one} for one in hashes]
    return {"type": "stored", "parent_hash": parent, "blocks": blocks}


CREATED = {"type": "created", "num_blocks_per_cache_level": [100, 0]}
MOVED = {"type": "event_diff", "new_value": 1, "old_value": 0}
UPDATED = {"type": "updated", "block_hash": 8, "cache_level": MOVED, "priority": None}
REMOVED = {"type": "removed", "block_hashes": [8]}
EIGHT = BlocksStored(hashes=(8,), block_size=2, tokens=(5, 6))


async def told(*pages: list[dict[str, Any]]) -> list[CacheBatch]:
    """What comes of the events that each reading hands out."""
    left = list(pages)

    async def script(exchange: Exchange) -> None:
        assert (exchange.method, exchange.path) == ("POST", "/kv_cache_events")
        exchange.answer(200, left.pop(0))

    found = []
    async with serving(script, kv_events_interval=0.001) as (adapter, _):
        batches = adapter.cache_events()
        assert batches is not None
        while len(found) < sum(map(bool, pages)):
            found.append(await anext(batches))
        await batches.aclose()
    return found


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("after", ["the request", "the head"])
async def test_a_request_that_may_have_ended_it_is_not_tried_elsewhere(
    stream: bool, after: str
) -> None:
    async def script(exchange: Exchange) -> None:
        if after == "the head":
            exchange.begin("text/event-stream" if stream else "application/json")
            await asyncio.sleep(0.01)
        exchange.cut()

    async with serving(script) as (adapter, _):
        for _ in range(2):
            with pytest.raises((Unanswered, StreamTruncated)) as cut:
                await collect(adapter, chat_request(stream=stream))
            assert not cut.value.retryable
            assert cut.value.counts
    nobody = TrtLlmSettings(adapter="trtllm", url="http://127.0.0.1:9")
    with pytest.raises(ConnectFailed) as refusal:
        await collect(TrtLlmAdapter(nobody, adapter_context()), chat_request(stream=stream))
    assert refusal.value.retryable, "nobody has had the request"


async def test_calls_of_a_named_tool_get_what_they_lack() -> None:
    """They come without an id, and their index is the choice's."""

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": reason}
        head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        return b"data: " + msgspec.json.encode({**head, "choices": [choice]}) + b"\n\n"

    def call(index: int, **function: str) -> dict[str, Any]:
        return {"tool_calls": [{"index": index, "type": "function", "function": function}]}

    async def script(exchange: Exchange) -> None:
        exchange.begin()
        for index in (0, 1):
            exchange.send(chunk(index, {"role": "assistant"}))
            exchange.send(chunk(index, call(index, name="f", arguments='{"a"')))
            exchange.send(chunk(index, call(index, arguments=":1}")))
            exchange.send(chunk(index, {}, "stop"))
        exchange.send(b"data: [DONE]\n\n")

    choice = {"type": "function", "function": {"name": "f"}}
    async with serving(script, tools=True) as (adapter, _):
        events = await collect(adapter, chat_request(n=2, tools=[choice], tool_choice=choice))
    found = {
        index: [e for e in events if isinstance(e, Delta) and e.index == index] for index in (0, 1)
    }
    for index, deltas in found.items():
        assert [delta.tool_calls for delta in deltas] == [
            (ToolCallDelta(0, f"call_forebay-1_{index}_0", "f", '{"a"'),),
            (ToolCallDelta(0, None, None, ":1}"),),
            (),
        ]
        assert deltas[-1].finish_reason == "tool_calls"


async def test_cache_events_are_read_and_come_only_once() -> None:
    first = [item(0, CREATED), item(1, storing(8, 1 << 63)), item(2, UPDATED)]
    one, other = await told(first, [], [item(3, storing(9, parent=8)), item(4, REMOVED)])
    chained = msgspec.structs.replace(EIGHT, hashes=(1 << 63,), parent=8)
    assert one == CacheBatch(events=(EIGHT, chained), sequence=2)
    nine = msgspec.structs.replace(EIGHT, hashes=(9,), parent=8)
    assert other == CacheBatch(events=(nine, BlocksRemoved(hashes=(8,))), sequence=4)


@pytest.mark.parametrize("next_id", [0, 3])
async def test_lost_cache_events_and_a_restart_withdraw_all(next_id: int) -> None:
    first, second = await told([item(1, storing(8))], [item(next_id, storing(8))])
    assert first.events == (EIGHT,)
    assert second.events == (
        CacheCleared(lost=f"event 2 was awaited, {next_id} came"),
        EIGHT,
    )


async def test_only_the_longest_window_of_the_first_rank_is_followed() -> None:
    (short, *_) = windows = await told(
        [item(0, CREATED, 512), item(1, CREATED), item(2, storing(7), 512), item(3, REMOVED, 512)],
        [item(4, storing(8)), item(4, storing(9), attention_dp_rank=1)],
        [item(5, storing(8, cache_salt="s"), 8192)],
    )
    assert short.events == ()
    assert windows[1].events == (EIGHT,)
    (withdrawn, salted) = windows[2].events
    assert isinstance(withdrawn, CacheCleared)
    assert "longer" in withdrawn.lost
    assert salted == msgspec.structs.replace(EIGHT, extra_keys=(("s",),))


async def test_cache_events_that_cannot_be_read(server: ModuleType) -> None:
    for status, page in ((404, {"detail": "Not Found"}), (200, [{"event_id": 1, "data": {}}])):

        async def script(exchange: Exchange, status: int = status, page: Any = page) -> None:
            exchange.answer(status, page)

        async with serving(script, kv_events_interval=1) as (adapter, _):
            batches = adapter.cache_events()
            assert batches is not None
            with pytest.raises(BackendError):
                await anext(batches)
    async with serving(server.serve) as (adapter, _):
        assert adapter.cache_events() is None


async def test_embeddings() -> None:
    async def script(exchange: Exchange) -> None:
        vectors = [{"index": i, "object": "embedding", "embedding": [0.0, i]} for i in (1, 0)]
        usage = {"prompt_tokens": 4, "total_tokens": 4}
        exchange.answer(200, {"object": "list", "data": vectors, "usage": usage})

    request = EmbedRequest(id="1", model="m", created=1, inputs=("a", "b"))
    async with serving(script, endpoints=frozenset({"embeddings"})) as (adapter, running):
        result = await adapter.perform(request, Attempt())
        assert isinstance(result, Embeddings)
        assert result.vectors == ((0.0, 0.0), (0.0, 1.0))
        unknown = msgspec.structs.replace(request, extra=("truncate",))
        with pytest.raises(BackendRefused) as raised:
            await adapter.perform(unknown, Attempt())
        assert raised.value.param == "truncate"
        with pytest.raises(Unsupported):
            await adapter.perform(TokenizeRequest(id="1", model="m", created=1), Attempt())
    (exchange,) = running.exchanges
    assert exchange.path == "/v1/embeddings"
    assert set(exchange.json) == {"model", "input", "encoding_format"}
