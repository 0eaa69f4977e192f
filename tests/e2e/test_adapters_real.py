"""The adapters before real servers: what the fakes claim is true."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any

import msgspec
import psutil
import pytest

from forebay.api import (
    Adapter,
    Attempt,
    BackendFailed,
    BackendRefused,
    DetokenizeRequest,
    Event,
    GenerateRequest,
    Message,
    Relayed,
    Text,
    TokenizeRequest,
    Tokens,
)
from forebay.testing import adapter_context, chat_request
from forebay.testing.adapter import collect, stream
from forebay.testing.answer import Answer, read_answer
from forebay_plugins import llamacpp, vllm

# The first of them waits for vLLM to start, and for its first request, which compiles kernels.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]

MODEL = "gemma-3-270m"


@pytest.fixture(params=["llamacpp", "vllm"])
def server(request: pytest.FixtureRequest, real: dict[str, Any]) -> tuple[str, str]:
    """(kind, URL) of a running server."""
    return request.param, real["llama" if request.param == "llamacpp" else "vllm"].url


@asynccontextmanager
async def adapter_for(module: ModuleType, url: str, **settings: Any) -> AsyncIterator[Adapter]:
    (kind,) = module.adapters()
    made = kind.settings(adapter=kind.name, url=url, **settings)
    adapter: Adapter = kind.build(made, adapter_context())
    await adapter.start()
    try:
        yield adapter
    finally:
        await adapter.aclose()


@pytest.fixture
async def adapter(server: tuple[str, str]) -> AsyncIterator[Adapter]:
    kind, url = server
    async with adapter_for({"llamacpp": llamacpp, "vllm": vllm}[kind], url, model=MODEL) as made:
        yield made


async def ask(adapter: Adapter, request: GenerateRequest) -> Answer:
    return read_answer(request, await collect(adapter, request))


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize("streams", [True, False])
async def test_answers(adapter: Adapter, endpoint: Any, streams: bool) -> None:
    request = chat_request(
        "The capital of France",
        endpoint=endpoint,
        model="mine",
        stream=streams,
        include_usage=streams,
        max_tokens=12,
        temperature=0,
    )
    answer = await ask(adapter, request)
    usage = answer.finished.usage
    assert usage is not None
    assert answer.usage is not None
    assert answer.usage["completion_tokens"] == usage.completion_tokens
    assert 0 < usage.completion_tokens <= 12
    assert usage.prompt_tokens > 0
    assert answer.texts[0]
    assert answer.finishes[0] in ("length", "stop")
    if streams:
        assert answer.pieces > 1


@pytest.mark.parametrize(
    ("neutral", "told"),
    [
        (True, {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.5}),
        (False, {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}),
    ],
)
async def test_llamacpp_samples_as_it_is_told(
    real: dict[str, Any], neutral: bool, told: dict[str, float]
) -> None:
    """``verbose`` makes it say how it sampled."""
    request = chat_request(stream=False, max_tokens=2, verbose=True, repetition_penalty=1.5)
    sampling = msgspec.structs.replace(request.sampling, repetition_penalty=1.5)
    request = msgspec.structs.replace(request, sampling=sampling)
    url = real["llama"].url
    async with adapter_for(llamacpp, url, model=MODEL, neutral_sampling=neutral) as adapter:
        relayed, _ = await collect(adapter, request)
    assert isinstance(relayed, Relayed)
    found = json.loads(relayed.data)["__verbose"]["generation_settings"]
    assert {name: found[name] for name in told} == pytest.approx(told)
    assert found["repeat_last_n"] > 64


async def test_the_same_text_streamed_and_whole(adapter: Adapter) -> None:
    request = chat_request("One two three", endpoint="completions", temperature=0)
    streamed = await ask(adapter, request)
    request = chat_request("One two three", endpoint="completions", stream=False, temperature=0)
    whole = await ask(adapter, request)
    assert streamed.texts == whole.texts


@pytest.mark.parametrize("streams", [True, False])
async def test_several_choices(adapter: Adapter, streams: bool) -> None:
    request = chat_request(n=2, stream=streams, include_usage=streams, max_tokens=5, seed=1)
    answer = await ask(adapter, request)
    assert sorted(answer.texts) == [0, 1]
    if streams:
        assert answer.finished.usage is not None
        assert answer.finished.usage.completion_tokens > 5


async def test_logprobs_are_passed_on(adapter: Adapter) -> None:
    request = chat_request(logprobs=True, top_logprobs=2, max_tokens=4)
    events = await collect(adapter, request)
    read_answer(request, events)
    data = b"".join(event.data for event in events if isinstance(event, Relayed))
    assert data.count(b'"top_logprobs":[{') >= 3


async def test_tokens_there_and_back(adapter: Adapter) -> None:
    assert {"tokenize", "detokenize"} <= (await adapter.probe()).endpoints
    asked: dict[str, Any] = {"id": "r", "model": "mine", "created": 1}
    found = await adapter.perform(TokenizeRequest(text="Hello wörld", **asked), Attempt())
    assert found == Tokens((2, 9259, 515, 4010, 671), None, 4096)
    text = await adapter.perform(
        DetokenizeRequest(tokens=(9259, 515, 4010, 671), **asked), Attempt()
    )
    assert text == Text("Hello wörld")
    chat = (Message(role="user", content="Hi"),)
    request = TokenizeRequest(chat=chat, add_special_tokens=False, **asked)
    found = await adapter.perform(request, Attempt())
    assert found == Tokens((2, 105, 2364, 107, 10979, 106, 107, 105, 4368, 107), None, 4096)


@pytest.mark.parametrize(
    "fields", [{"guided_regex": "xy{2}z"}, {"structured_outputs": {"regex": "xy{2}z"}}]
)
async def test_constraints_of_any_generation_bind(real: dict[str, Any], fields: Any) -> None:
    async with adapter_for(vllm, real["vllm"].url, model=MODEL) as adapter:
        assert (await ask(adapter, chat_request(**fields))).texts == {0: "xyyz"}


@pytest.mark.parametrize("streams", [True, False])
async def test_the_typed_lane_says_the_same(adapter: Adapter, streams: bool) -> None:
    request = chat_request("Count to ten", temperature=0, stream=streams)
    typed = msgspec.structs.replace(request, typed=True)
    relayed, events = await ask(adapter, request), await ask(adapter, typed)
    assert events.texts == relayed.texts
    assert events.finishes == relayed.finishes


async def test_a_schema_is_kept(adapter: Adapter) -> None:
    schema = {
        "type": "object",
        "properties": {"sea": {"type": "boolean"}},
        "required": ["sea"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    request = chat_request(response_format=wanted, max_tokens=60, temperature=0)
    answer = await ask(adapter, request)
    if answer.finishes[0] == "stop":
        assert isinstance(json.loads(answer.texts[0])["sea"], bool)
    else:
        assert answer.texts[0].lstrip().startswith("{")


async def test_stop_strings(adapter: Adapter) -> None:
    request = chat_request("1 2 3 4 5 6", endpoint="completions", stop=["8"], temperature=0)
    answer = await ask(adapter, request)
    assert "8" not in answer.texts[0]


async def test_timings(adapter: Adapter, server: tuple[str, str]) -> None:
    request = chat_request("Hello there", endpoint="completions", max_tokens=8, ignore_eos=True)
    timings = (await ask(adapter, request)).finished.timings
    assert timings is not None
    assert timings.prefill is not None
    assert timings.decode is not None
    assert 0 < timings.prefill < timings.decode + 5
    assert (timings.queue is not None) == (server[0] == "vllm")


async def test_a_repeated_prompt_is_cached(adapter: Adapter, server: tuple[str, str]) -> None:
    request = chat_request("water and stone " * 120, endpoint="completions", max_tokens=2)
    await ask(adapter, request)
    usage = (await ask(adapter, request)).finished.usage
    assert usage is not None
    assert usage.cached_tokens is not None
    assert usage.cached_tokens >= 128


async def test_probe(adapter: Adapter, server: tuple[str, str]) -> None:
    found = await adapter.probe()
    assert found.max_context == 4096
    assert found.models == (MODEL,)
    assert found.version
    assert found.slots == (4 if server[0] == "llamacpp" else 0)


async def test_refusals_name_the_fault(adapter: Adapter, server: tuple[str, str]) -> None:
    long = chat_request("a b " * 4000, endpoint="completions")
    with pytest.raises(BackendRefused) as raised:
        await collect(adapter, long)
    assert raised.value.status == 400
    assert "4096" in raised.value.message
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(BackendRefused, match="temperature"):
        await collect(adapter, chat_request(temperature="hot"))


async def test_an_unknown_model_is_the_operators_fault(server: tuple[str, str]) -> None:
    if server[0] == "vllm":
        async with adapter_for(vllm, server[1], model="nonesuch") as adapter:
            with pytest.raises(BackendFailed, match="model"):
                await collect(adapter, chat_request())
            with pytest.raises(BackendFailed, match="nonesuch"):
                await adapter.probe()


async def test_chat_has_an_end_even_if_the_client_sets_none(server: tuple[str, str]) -> None:
    if server[0] == "llamacpp":
        async with adapter_for(llamacpp, server[1], max_tokens=7) as adapter:
            request = chat_request(max_tokens=None, ignore_eos=True)
            answer = await ask(adapter, request)
            assert answer.finished.usage is not None
            assert answer.finished.usage.completion_tokens == 7


async def running(adapter: Adapter) -> int:
    load = await adapter.load()
    assert load is not None
    assert load.running is not None
    assert load.waiting is not None
    return load.running + load.waiting


@pytest.mark.parametrize("streams", [True, False])
async def test_leaving_frees_the_backend(adapter: Adapter, streams: bool) -> None:
    request = chat_request(max_tokens=2000, ignore_eos=True, stream=streams)
    task = asyncio.ensure_future(collect(adapter, request))
    await eventually(adapter, 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await eventually(adapter, 0)


async def test_closing_frees_the_backend(adapter: Adapter) -> None:
    events = stream(adapter, chat_request(max_tokens=2000, ignore_eos=True))
    seen: list[Event] = [await anext(events) for _ in range(3)]
    assert all(isinstance(event, Relayed) for event in seen)
    await eventually(adapter, 1)
    await events.aclose()
    await eventually(adapter, 0)


async def eventually(adapter: Adapter, count: int) -> None:
    """The server itself says so; it looks for closed sockets between two tokens."""
    for _ in range(100):
        if await running(adapter) == count:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"the server never reported {count} requests")


async def test_connections_are_used_again(adapter: Adapter, server: tuple[str, str]) -> None:
    """Or every request would open one; llama.cpp closes it after each stream, and is let to."""
    port = int(server[1].rsplit(":", 1)[1])
    used = set()
    for streams in (True, False, True, True):
        await ask(adapter, chat_request(stream=streams, max_tokens=3))
        await asyncio.sleep(0.05)  # a connection that is dropped is closed by the loop's next turn
        open_now = [
            c for c in psutil.Process().net_connections() if c.raddr and c.raddr.port == port
        ]
        used |= {c.laddr for c in open_now if c.status == psutil.CONN_ESTABLISHED}
    assert len(used) == (0 if server[0] == "llamacpp" else 1)
