"""The typed lane of OpenAI-shaped servers: the same events, however the bytes are cut."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from forebay.api import (
    AdapterContext,
    Attempt,
    BackendFailed,
    BackendGarbage,
    Delta,
    Event,
    Finished,
    GenerateRequest,
    Started,
    StreamTruncated,
    Timings,
    TokenLogprob,
    ToolCallDelta,
    Upstream,
    UpstreamResponse,
    Usage,
)
from forebay.testing import chat_request
from forebay.testing.adapter import collect
from forebay.testing.answer import read_answer
from forebay_plugins import llamacpp, openai, vllm

HEAD = {"id": "c1", "object": "chat.completion.chunk", "created": 5, "model": "up"}
USAGE = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}


class Bytes(UpstreamResponse):
    """A 200 whose body comes in these pieces."""

    def __init__(self, pieces: tuple[bytes, ...], content_type: str) -> None:
        self.status = 200
        self.headers = {"content-type": content_type}
        self._pieces = pieces

    async def chunks(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece

    async def read(self, limit: int = 64 << 20) -> bytes:
        return b"".join(self._pieces)

    async def aclose(self) -> None:
        return


class Recorded(Upstream):
    """Answers every request by the same bytes."""

    def __init__(self, response: Bytes) -> None:
        self._response = response

    async def send(
        self,
        method: str,
        path: str,
        *,
        body: bytes = b"",
        headers: Mapping[str, str] = {},
        connect_timeout: float = 1.0,
    ) -> UpstreamResponse:
        return self._response

    async def aclose(self) -> None:
        return


async def events_of(
    request: GenerateRequest,
    *pieces: bytes,
    module: ModuleType = openai,
    content_type: str = "text/event-stream",
) -> list[Event]:
    upstream = Recorded(Bytes(pieces, content_type))
    (kind,) = module.adapters()
    settings = kind.settings(adapter=kind.name, url="http://backend")
    context = AdapterContext(name="test", connect=lambda _: upstream, data_dir=Path())
    return await collect(kind.build(settings, context), request)


def typed(**options: Any) -> GenerateRequest:
    return msgspec.structs.replace(chat_request(**options), typed=True)


def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": reason, **more}
    return b"data: " + json.dumps({**HEAD, "choices": [choice]}).encode() + b"\n\n"


def calling(index: int | None, arguments: Any = "", **more: Any) -> bytes:
    name = more.pop("name", None)
    function = {"arguments": arguments, **({"name": name} if name else {})}
    where = {} if index is None else {"index": index}
    return chunk({"tool_calls": [{**where, **more, "function": function}]})


ROLE = chunk({"role": "assistant", "content": ""})
DONE = b"data: [DONE]\n\n"
LOGPROBS = {
    "content": [
        {"token": "é", "logprob": -0.5, "top_logprobs": [{"token": "é", "logprob": -0.5}]},
        {"token": "!", "logprob": -1, "top_logprobs": []},
    ]
}
RICH = (
    ROLE
    + b": keep-alive\n\n"
    + chunk({"reasoning_content": "Hm 😀"})
    + chunk({"reasoning": "m", "reasoning_content": "m"})
    + chunk({"content": "é!"}, logprobs=LOGPROBS, token_ids=[5, 6])
    + calling(0, id="a", type="function", name="f")
    + calling(0, '{"x"', id="a", name="f")
    + calling(0, ":1}")
    + calling(1, "{}", name="g")
    + chunk({}, "tool_calls")
    + b"data: "
    + json.dumps({**HEAD, "choices": [], "usage": USAGE}).encode()
    + b"\n\n"
    + DONE
)
RICH_EVENTS = [
    Started(),
    Delta(reasoning="Hm 😀"),
    Delta(reasoning="m"),
    Delta(
        text="é!",
        token_ids=(5, 6),
        logprobs=(TokenLogprob("é", -0.5, (("é", -0.5),)), TokenLogprob("!", -1.0)),
    ),
    Delta(tool_calls=(ToolCallDelta(0, "a", "f"),)),
    Delta(tool_calls=(ToolCallDelta(0, arguments='{"x"'),)),
    Delta(tool_calls=(ToolCallDelta(0, arguments=":1}"),)),
    Delta(tool_calls=(ToolCallDelta(1, "call_forebay-1_0_1", "g", "{}"),)),
    Delta(finish_reason="tool_calls"),
    Finished(Usage(7, 2), model="up"),
]


async def test_everything_a_stream_says() -> None:
    assert await events_of(typed(), RICH) == RICH_EVENTS


def recorded(fakes: ModuleType) -> Iterator[tuple[GenerateRequest, bytes, ModuleType]]:
    """Streams as they come from the servers, and one with all that may stand in one."""
    yield typed(), RICH, openai
    yield typed(), RICH.replace(b"\n", b"\r\n"), openai
    for module, kind in ((vllm, fakes.Vllm), (llamacpp, fakes.LlamaCpp)):
        for endpoint in ("chat", "completions"):
            asked = {"model": "served", "n": 2, "stream_options": {"include_usage": True}}
            said = kind({**asked, **({"messages": []} if endpoint == "chat" else {})})
            stream = b"".join([*said.pieces(), *said.ending()])
            yield typed(endpoint=endpoint, n=2), stream, module


@pytest.mark.parametrize("number", range(6))
async def test_a_recorded_stream_may_be_cut_at_every_byte(fakes: ModuleType, number: int) -> None:
    request, stream, module = list(recorded(fakes))[number]
    whole = await events_of(request, stream, module=module)
    read_answer(request, whole)
    assert len(whole) > 8
    for cut in range(1, len(stream)):
        assert await events_of(request, stream[:cut], stream[cut:], module=module) == whole
    single = (stream[i : i + 1] for i in range(len(stream)))
    assert await events_of(request, *single, module=module) == whole


@pytest.mark.parametrize("module", [vllm, llamacpp])
async def test_streamed_and_whole_say_the_same(fakes: ModuleType, module: ModuleType) -> None:
    async def ask(bench: Any, stream: bool) -> tuple[Any, ...]:
        request = typed(stream=stream)
        answer = read_answer(request, await collect(bench.adapter, request))
        assert isinstance(answer.finished.timings, Timings)
        assert answer.finished.usage is not None
        return answer.texts, answer.finishes, answer.finished.usage.completion_tokens

    server = fakes.Vllm if module is vllm else fakes.LlamaCpp
    async with fakes.bench(server, module, fakes.Scenario.HEALTHY) as bench:
        assert await ask(bench, stream=True) == await ask(bench, stream=False)


async def whole(choice: dict[str, Any], **options: Any) -> list[Event]:
    body = {**HEAD, "choices": [{"index": 0, **choice}], "usage": USAGE}
    request = typed(stream=False, **options)
    return await events_of(request, json.dumps(body).encode(), content_type="application/json")


async def test_a_whole_body() -> None:
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    message = {"role": "assistant", "content": None, "reasoning": "r", "tool_calls": [call, call]}
    events = await whole({"message": message, "finish_reason": "stop", "logprobs": None})
    calls = tuple(ToolCallDelta(index, "x", "f", '{"a":1}') for index in (0, 1))
    assert events == [
        Started(),
        Delta(finish_reason="tool_calls", reasoning="r", tool_calls=calls),
        Finished(Usage(7, 2), model="up"),
    ]


async def test_a_refusal_is_text() -> None:
    (_, delta, _) = await whole({"message": {"refusal": "No."}, "finish_reason": "stop"})
    assert delta == Delta(text="No.", finish_reason="stop")


async def test_logprobs_of_a_completion() -> None:
    logprobs = {
        "tokens": ["a", "b"],
        "token_logprobs": [None, -0.5],
        "top_logprobs": [None, {"c": -2, "b": -0.5}],
    }
    choice = {"text": "ab", "finish_reason": "length", "logprobs": logprobs}
    (_, delta, _) = await whole(choice, endpoint="completions")
    top = (("b", -0.5), ("c", -2.0))
    assert delta == Delta(
        text="ab", finish_reason="length", logprobs=(TokenLogprob("b", -0.5, top),)
    )


@pytest.mark.parametrize(
    ("stream", "kind"),
    [
        (ROLE + chunk({"content": 7}), BackendGarbage),
        (ROLE + chunk({"content": "a"}, logprobs=[7]), BackendGarbage),
        (ROLE + chunk({"content": "a"}), StreamTruncated),
        (ROLE + chunk({"content": "a"}) + b'data: {"error": "m"}\n\n' + DONE, BackendFailed),
    ],
)
async def test_what_breaks_a_stream(stream: bytes, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        await events_of(typed(), stream)


async def test_leaving_in_mid_stream_closes_the_upstream(fakes: ModuleType) -> None:
    async with fakes.bench(fakes.Vllm, vllm, fakes.Scenario.ENDLESS) as bench:
        events = bench.adapter.stream(typed(), Attempt())
        assert isinstance(await anext(events), Started)
        assert isinstance(await anext(events), Delta)
        await events.aclose()
        async with asyncio.timeout(1):
            while bench.busy():
                await asyncio.sleep(0.001)
