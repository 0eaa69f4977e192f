"""How the answers of text-generation-inference read."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

from forebay.api import (
    Delta,
    Event,
    Finished,
    Started,
    Timings,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from forebay.testing.adapter import collect


@pytest.fixture(scope="module")
def fake(load_fake: Callable[[str], ModuleType]) -> ModuleType:
    return load_fake("tgi_server")


def deltas(events: list[Event]) -> list[Delta]:
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
    return [event for event in events if isinstance(event, Delta)]


def text_of(events: list[Event]) -> str:
    return "".join(delta.text for delta in deltas(events))


# What comes back: completions


async def test_a_native_stream(fake: ModuleType) -> None:
    async with fake.serving(fake.healthy) as (adapter, _):
        events = await collect(adapter, fake.request_of(False, stream=True))
    found = deltas(events)
    assert [delta.text for delta in found] == list(fake.WORDS)
    assert [delta.token_ids for delta in found] == [(101,), (102,), (103,), (104,), (105,)]
    assert [delta.finish_reason for delta in found] == [None] * 4 + ["length"]
    assert events[-1] == Finished(Usage(11, 5))


async def test_a_native_answer_tells_its_times(fake: ModuleType) -> None:
    async with fake.serving(fake.healthy) as (adapter, _):
        events = await collect(adapter, fake.request_of(False))
    assert text_of(events) == fake.TEXT
    assert events[-1] == Finished(
        Usage(11, 5), Timings(queue=0.02, inference=0.429, source="tgi.headers")
    )


@pytest.mark.parametrize("cut", [1, 7, 4096])
async def test_cuts_make_no_difference(fake: ModuleType, cut: int) -> None:
    whole = b":\n\n" + b"".join(fake.pieces())
    parts = [whole[at : at + cut] for at in range(0, len(whole), cut)]
    async with fake.serving(fake.sending(*parts)) as (adapter, _):
        assert text_of(await collect(adapter, fake.request_of(False, stream=True))) == fake.TEXT


@pytest.mark.parametrize(
    ("theirs", "ours"), [("eos_token", "stop"), ("stop_sequence", "stop"), ("length", "length")]
)
async def test_finish_reasons(fake: ModuleType, theirs: str, ours: str) -> None:
    async with fake.serving(fake.sending(fake.piece(1, "a", theirs))) as (adapter, _):
        found = deltas(await collect(adapter, fake.request_of(False, stream=True)))
    assert [delta.finish_reason for delta in found] == [ours]


async def test_special_tokens_are_not_shown(fake: ModuleType) -> None:
    script = fake.sending(fake.piece(1, "a"), fake.piece(2, "</s>", "eos_token", "a", special=True))
    async with fake.serving(script) as (adapter, _):
        events = await collect(adapter, fake.request_of(False, stream=True, logprobs=0))
    assert text_of(events) == "a"
    assert [len(delta.logprobs) for delta in deltas(events)] == [1, 0]
    assert events[-1] == Finished(Usage(11, 2))


async def test_logprobs_of_a_stream(fake: ModuleType) -> None:
    async with fake.serving(fake.sending(fake.piece(1, "a", "length", "a", top=2))) as (adapter, _):
        (delta,) = deltas(await collect(adapter, fake.request_of(False, stream=True, logprobs=2)))
    assert delta.logprobs == (TokenLogprob("a", -0.25, (("a", -0.25), ("a?", -0.5))),)


async def test_logprobs_of_a_whole_answer(fake: ModuleType) -> None:
    async with fake.serving(fake.healthy) as (adapter, _):
        (delta,) = deltas(await collect(adapter, fake.request_of(False, logprobs=0)))
        (without,) = deltas(await collect(adapter, fake.request_of(False)))
    assert delta.logprobs[1] == TokenLogprob(" wörld", -0.5)
    assert len(delta.logprobs) == 5
    assert without.logprobs == ()


@pytest.mark.parametrize("stream", [True, False])
async def test_echo(fake: ModuleType, stream: bool) -> None:
    async with fake.serving(fake.healthy) as (adapter, _):
        events = await collect(adapter, fake.request_of(False, stream=stream, echo=True))
    assert text_of(events) == "Once" + fake.TEXT


async def test_usage_is_counted_where_it_is_not_told(fake: ModuleType) -> None:
    body = fake.whole()
    async with fake.serving(fake.answering(200, body)) as (adapter, _):
        events = await collect(adapter, fake.request_of(False))
    assert events[-1] == Finished(Usage(0, 5, source="counted"))


# The stop string


@pytest.mark.parametrize(
    ("stop", "words", "text"),
    [
        (["END"], ["a E", "N", "D"], "a "),
        (["END"], ["a E", "N", "x"], "a ENx"),
        (["END", "ND"], ["a END"], "a "),
        (["b"], ["a", "c"], "ac"),
    ],
)
@pytest.mark.parametrize("chat", [True, False])
async def test_the_stop_string_is_taken_off(
    fake: ModuleType, chat: bool, stop: list[str], words: list[str], text: str
) -> None:
    if chat:
        pieces = [fake.chat_piece(word) for word in words[:-1]]
        script = fake.sending(
            *pieces, fake.chat_piece(words[-1], "stop_sequence"), *fake.chat_ending()
        )
    else:
        pieces = [fake.piece(index, word) for index, word in enumerate(words[:-1], 1)]
        last = fake.piece(len(words), words[-1], "stop_sequence", "".join(words))
        script = fake.sending(*pieces, last)
    async with fake.serving(script) as (adapter, _):
        events = await collect(adapter, fake.request_of(chat, stream=True, stop=stop))
    assert text_of(events) == text
    assert deltas(events)[-1].finish_reason == "stop"


async def test_a_stop_string_within_a_token_ends_the_text(fake: ModuleType) -> None:
    """TGI looks for it at the ends of tokens alone, and goes on."""
    script = fake.sending(
        fake.piece(1, "Par"), fake.piece(2, "is."), fake.piece(3, " So", "length", "Paris. So")
    )
    async with fake.serving(script) as (adapter, _):
        request = fake.request_of(False, stream=True, stop="ri", logprobs=0)
        events = await collect(adapter, request)
    assert text_of(events) == "Pa"
    assert deltas(events)[-1] == Delta(finish_reason="stop")
    assert events[-1] == Finished(Usage(11, 3))


async def test_an_echoed_prompt_may_hold_the_stop_string(fake: ModuleType) -> None:
    async with fake.serving(fake.healthy) as (adapter, _):
        request = fake.request_of(False, stream=True, echo=True, stop="nce")
        assert text_of(await collect(adapter, request)) == "Once" + fake.TEXT


# What comes back: chat


async def test_a_chat_stream(fake: ModuleType) -> None:
    async with fake.serving(fake.healthy) as (adapter, _):
        events = await collect(adapter, fake.request_of(True, stream=True))
    assert [delta.text for delta in deltas(events)] == list(fake.WORDS)
    assert isinstance(events[-1], Finished)
    assert events[-1].usage == Usage(11, 5)


async def test_a_chat_answer_tells_its_times(fake: ModuleType) -> None:
    async with fake.serving(fake.healthy) as (adapter, _):
        events = await collect(adapter, fake.request_of(True))
    assert text_of(events) == fake.TEXT
    assert isinstance(events[-1], Finished)
    assert events[-1].timings == Timings(queue=0.02, inference=0.429, source="tgi.headers")


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]


async def test_a_tool_call_has_its_id_and_name_once(fake: ModuleType) -> None:
    script = fake.sending(
        fake.call_piece("f", ""),
        fake.call_piece(None, '{"a":'),
        fake.call_piece(None, "1}", "stop"),
        *fake.chat_ending(3),
    )
    async with fake.serving(script) as (adapter, _):
        found = deltas(await collect(adapter, fake.request_of(True, stream=True, tools=TOOLS)))
    assert [call for delta in found for call in delta.tool_calls] == [
        ToolCallDelta(0, "0", "f", ""),
        ToolCallDelta(0, None, None, '{"a":'),
        ToolCallDelta(0, None, None, "1}"),
    ]
    assert found[-1].finish_reason == "tool_calls"


async def test_a_whole_tool_call(fake: ModuleType) -> None:
    function = {"description": None, "name": "f", "arguments": '{"a":1}'}
    call = {"id": "0", "type": "function", "function": function}
    message = {"role": "assistant", "tool_calls": [call]}
    body = fake.chat_whole(message=message, finish_reason="stop")
    async with fake.serving(fake.answering(200, body)) as (adapter, _):
        (delta,) = deltas(await collect(adapter, fake.request_of(True, tools=TOOLS)))
    assert delta.tool_calls == (ToolCallDelta(0, "0", "f", '{"a":1}'),)
    assert delta.finish_reason == "tool_calls"
