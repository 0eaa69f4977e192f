"""The contract itself: it fails adapters that break it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from forebay import testing
from forebay.api import (
    Adapter,
    Attempt,
    Capabilities,
    Delta,
    Event,
    Finished,
    GenerateRequest,
    Relayed,
    Started,
    Usage,
)
from forebay.testing import AdapterContract, Bench, Scenario, chat_request
from forebay.testing.answer import read_answer

DONE = Finished(Usage(1, 1))
STOPPED = Finished(Usage(1, 1), finish_reasons=("stop",))


def chunk(delta: dict[str, Any], reason: str | None = None, **changes: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "model"}
    return b"data: " + json.dumps({**head, "choices": [choice], **changes}).encode() + b"\n\n"


ROLE = chunk({"role": "assistant", "content": "a"})
STOP = chunk({}, "stop")


def test_good_answers_pass() -> None:
    typed: list[Event] = [Started(), Delta(0, "a"), Delta(0, "b", "stop"), DONE]
    answer = read_answer(chat_request(), typed)
    assert (answer.texts, answer.finishes, answer.pieces) == ({0: "ab"}, {0: "stop"}, 2)
    relayed: list[Event] = [
        Relayed(ROLE),
        Relayed(STOP + chunk({}, choices=[], usage={"x": 1}), 2),
        STOPPED,
    ]
    answer = read_answer(chat_request(include_usage=True), relayed)
    assert (answer.texts, answer.usage) == ({0: "a"}, {"x": 1})


@pytest.mark.parametrize(
    "events",
    [
        [],
        [Started(), Delta(0, "a", "stop")],
        [Delta(0, "a", "stop"), DONE],
        [Started(), Delta(0, "a"), DONE],
        [Started(), Delta(0, "a", "stop"), Delta(0, "b"), DONE],
        [Started(), Delta(0, "a", "eos"), DONE],  # type: ignore[arg-type]  # that is the point
        [Started(), Started(), Delta(0, "a", "stop"), DONE],
        [Started(), DONE, Delta(0, "a", "stop"), DONE],
        [Started(), Delta(1, "a", "stop"), DONE],
        [Started(), Relayed(ROLE + STOP, 2), STOPPED],
        [Relayed(ROLE + STOP, 1), STOPPED],
        [Relayed(ROLE), Relayed(STOP), Relayed(b"data: [DONE]\n\n"), STOPPED],
        [Relayed(ROLE), Relayed(STOP[:-1]), STOPPED],
        [Relayed(ROLE), Relayed(b": ping\n\n"), Relayed(STOP), STOPPED],
        [Relayed(ROLE), Relayed(STOP), DONE],
        [Relayed(ROLE), Relayed(chunk({"role": "assistant"}, "stop")), STOPPED],
        [Relayed(chunk({"content": "a"})), Relayed(STOP), STOPPED],
        [Relayed(ROLE), Relayed(chunk({}, "stop", id="d")), STOPPED],
        [Relayed(ROLE), Relayed(chunk({}, "stop", created=2)), STOPPED],
        [Relayed(ROLE), Relayed(chunk({}, "stop", object="x")), STOPPED],
        [Relayed(chunk({"role": "x"}, "stop", model="theirs")), STOPPED],
        [Relayed(chunk({"role": "x"}, "stop", id="")), STOPPED],
        [Relayed(ROLE), Relayed(STOP), Relayed(chunk({}, choices=[], usage={"x": 1})), STOPPED],
        [Relayed(b'data: {"error": {"message": "m"}}\n\n'), Relayed(STOP), STOPPED],
    ],
)
def test_bad_answers_fail(events: list[Event]) -> None:
    with pytest.raises(AssertionError):
        read_answer(chat_request(), events)


def test_the_package_gives_what_it_lists() -> None:
    for name in testing.__all__:
        assert getattr(testing, name).__name__ == name
    with pytest.raises(AttributeError, match="nonesuch"):
        testing.nonesuch  # noqa: B018 - the access is what is tested


class Careless(Adapter):
    """Works on when its client has left, and takes a broken stream for a whole one."""

    def __init__(self) -> None:
        self.work: set[asyncio.Task[None]] = set()

    async def stream(self, request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        task = asyncio.ensure_future(asyncio.sleep(3600))
        self.work.add(task)
        task.add_done_callback(self.work.discard)
        yield Started()
        for _ in range(4):
            await asyncio.sleep(0.001)
            yield Delta(0, "a")
        await asyncio.shield(task)

    async def probe(self) -> Capabilities:
        return Capabilities(endpoints=frozenset({"chat"}))


class Contract(AdapterContract):
    @asynccontextmanager
    async def bench(self, scenario: Scenario) -> AsyncIterator[Bench]:
        adapter = Careless()
        yield Bench(adapter, lambda: len(adapter.work))


@pytest.mark.parametrize(
    "name",
    [
        "test_closing_in_mid_stream_frees_the_backend",
        "test_cancelling_in_mid_stream_frees_the_backend",
        "test_probe_finds_what_it_can_do",
    ],
)
def test_careless_adapters_fail(name: str) -> None:
    with pytest.raises(AssertionError):
        getattr(Contract(), name)()


def test_errors_must_be_raised() -> None:
    for name in ("test_full", "test_cut_in_mid_stream", "test_answers_in_order"):
        contract = Contract()
        contract.patience = 0.5  # type: ignore[misc]  # it waits for ever otherwise
        with pytest.raises((AssertionError, TimeoutError)):
            getattr(contract, name)()
