"""For authors of adapters: :class:`AdapterContract`, which every built-in adapter passes too."""

# ruff: noqa: S101 - a contract is made of assertions

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, cast

import msgspec
import pytest
from msgspec import Raw, Struct

from forebay.api import (
    Adapter,
    AdapterContext,
    Attempt,
    BackendBusy,
    BackendError,
    BackendFailed,
    BackendGarbage,
    BackendRefused,
    Capabilities,
    ConnectFailed,
    Delta,
    Endpoint,
    Event,
    Finished,
    GenerateRequest,
    Load,
    Message,
    Relayed,
    Sampling,
    Started,
    StreamTruncated,
)
from forebay.testing.answer import Answer, read_answer
from forebay.transport import connect

__all__ = ["AdapterContract", "Bench", "Scenario", "adapter_context", "chat_request"]


class Scenario(Enum):
    """How the backend behind the adapter behaves, to every request that asks for text."""

    HEALTHY = "answers in at least three pieces, and reports usage"
    ENDLESS = "sends a piece every few milliseconds, for ever"
    SILENT = "takes the request and never answers; says that it is ready"
    BUSY = "is full"
    BROKEN = "fails before the answer begins, and when it is probed"
    REFUSING = "says that the request is at fault"
    GARBAGE = "answers something that is not in its protocol"
    FAILING = "fails after two pieces, and says so"
    CUT = "breaks off after two pieces"
    UNFINISHED = "ends after two pieces as if all were well, without saying why it ended"
    DEAD = "is not there at all"


class Bench(Struct):
    """An adapter in front of a backend under control."""

    adapter: Adapter
    #: How many requests the backend works on now; those whose client has left don't count.
    busy: Callable[[], int]


def chat_request(
    text: str = "Hello",
    *,
    endpoint: Endpoint = "chat",
    model: str = "model",
    stream: bool = True,
    include_usage: bool = False,
    max_tokens: int | None = 16,
    n: int = 1,
    **fields: object,
) -> GenerateRequest:
    """A valid request as the gateway would make it; ``fields`` are further JSON fields."""
    body: dict[str, object] = {"model": model, "stream": stream, **fields}
    if endpoint == "chat":
        body["messages"] = [{"role": "user", "content": text}]
    else:
        body["prompt"] = text
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    if n != 1:
        body["n"] = n
    if include_usage:
        body["stream_options"] = {"include_usage": True}
    return GenerateRequest(
        id="forebay-1",
        endpoint=endpoint,
        model=model,
        created=1_700_000_000,
        messages=(Message(role="user", content=text),) if endpoint == "chat" else (),
        prompts=(text,) if endpoint == "completions" else (),
        sampling=Sampling(max_tokens=max_tokens),
        n=n,
        stream=stream,
        include_usage=include_usage,
        fields={name: Raw(msgspec.json.encode(value)) for name, value in body.items()},
    )


def adapter_context(data_dir: Path = Path()) -> AdapterContext:
    """What the gateway would hand to the adapter of a backend called ``test``: real connections."""
    return AdapterContext(name="test", connect=connect, data_dir=data_dir)


Test = Callable[[Any], Coroutine[Any, Any, None]]


def _in_loop(test: Test) -> Callable[[Any], None]:
    """A plain test, so that authors need no plugin of pytest's."""

    @functools.wraps(test)
    def run(contract: AdapterContract) -> None:
        asyncio.run(asyncio.wait_for(test(contract), contract.patience))

    return run


class AdapterContract(ABC):
    """Subclass it, name it ``Test…``, and say in :meth:`bench` how to make each scenario."""

    #: What cannot happen to this kind of backend.
    impossible: ClassVar[frozenset[Scenario]] = frozenset()
    endpoints: ClassVar[tuple[Endpoint, ...]] = ("chat", "completions")
    #: Seconds after which a client's leaving must have reached the backend.
    cancel_within: ClassVar[float] = 0.1
    #: Seconds after which a test has failed.
    patience: ClassVar[float] = 30.0

    @abstractmethod
    def bench(self, scenario: Scenario) -> AbstractAsyncContextManager[Bench]:
        """A started adapter in front of a backend that behaves like this."""

    def requests(self) -> list[GenerateRequest]:
        """The requests with which a backend in any scenario is driven."""
        return [
            chat_request(endpoint=endpoint, stream=stream)
            for endpoint in self.endpoints
            for stream in (True, False)
        ]

    def endless(self, endpoint: Endpoint) -> GenerateRequest:
        """The request that is left in mid-stream; before a real server, one for a long answer."""
        return chat_request(endpoint=endpoint)

    # The answer

    @_in_loop
    async def test_answers_in_order(self) -> None:
        async with self.bench(Scenario.HEALTHY) as bench:
            for request in self.requests():
                answer = read_answer(request, await collect(bench.adapter, request))
                assert answer.texts[0]

    @_in_loop
    async def test_streams_piece_by_piece(self) -> None:
        async with self.bench(Scenario.HEALTHY) as bench:
            for request in self.requests():
                if request.stream:
                    assert (await ask(bench, request)).pieces >= 3

    @_in_loop
    async def test_reports_usage(self) -> None:
        async with self.bench(Scenario.HEALTHY) as bench:
            for request in self.requests():
                usage = (await ask(bench, request)).finished.usage
                assert usage is not None
                assert usage.prompt_tokens > 0
                assert usage.completion_tokens > 0

    @_in_loop
    async def test_sends_the_usage_chunk_to_those_who_ask(self) -> None:
        async with self.bench(Scenario.HEALTHY) as bench:
            for endpoint in self.endpoints:
                request = chat_request(endpoint=endpoint, include_usage=True)
                events = await collect(bench.adapter, request)
                answer = read_answer(request, events)
                if any(isinstance(event, Relayed) for event in events):
                    assert answer.usage is not None  # in the typed lane the gateway writes it
                    tokens = answer.finished.usage
                    assert tokens is not None
                    assert answer.usage["completion_tokens"] == tokens.completion_tokens

    @_in_loop
    async def test_answers_under_the_name_that_was_asked_for(self) -> None:
        async with self.bench(Scenario.HEALTHY) as bench:
            for request in self.requests():
                renamed = msgspec.structs.replace(request, model="another/name")
                await ask(bench, renamed)

    @_in_loop
    async def test_serves_several_at_once(self) -> None:
        async with self.bench(Scenario.HEALTHY) as bench:
            requests = self.requests() * 3
            answers = await asyncio.gather(*(ask(bench, request) for request in requests))
            assert len(answers) == len(requests)
            await until(lambda: bench.busy() == 0, self.cancel_within)

    # The client leaves

    @_in_loop
    async def test_cancelling_before_the_first_event_frees_the_backend(self) -> None:
        if Scenario.SILENT in self.impossible:
            return
        async with self.bench(Scenario.SILENT) as bench:
            for request in self.requests():
                await self._cancel(bench, request, after=0)

    @_in_loop
    async def test_cancelling_in_mid_stream_frees_the_backend(self) -> None:
        if Scenario.ENDLESS in self.impossible:
            return
        async with self.bench(Scenario.ENDLESS) as bench:
            for endpoint in self.endpoints:
                await self._cancel(bench, self.endless(endpoint), after=3)

    @_in_loop
    async def test_closing_in_mid_stream_frees_the_backend(self) -> None:
        if Scenario.ENDLESS in self.impossible:
            return
        async with self.bench(Scenario.ENDLESS) as bench:
            for endpoint in self.endpoints:
                events = stream(bench.adapter, self.endless(endpoint))
                for _ in range(3):
                    await anext(events)
                assert bench.busy() == 1
                await events.aclose()
                await until(lambda: bench.busy() == 0, self.cancel_within)

    @_in_loop
    async def test_closing_what_never_began_does_nothing(self) -> None:
        async with self.bench(Scenario.HEALTHY) as bench:
            request = chat_request(endpoint=self.endpoints[0])
            await stream(bench.adapter, request).aclose()
            assert bench.busy() == 0

    async def _cancel(self, bench: Bench, request: GenerateRequest, after: int) -> None:
        events: list[Event] = []
        task = asyncio.ensure_future(collect(bench.adapter, request, events))
        await until(lambda: bench.busy() == 1 and len(events) >= after, self.patience)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled(), "the adapter swallowed the cancellation"
        await until(lambda: bench.busy() == 0, self.cancel_within)

    # The backend fails

    @_in_loop
    async def test_full(self) -> None:
        await self._fails(Scenario.BUSY, BackendBusy)

    @_in_loop
    async def test_broken(self) -> None:
        await self._fails(Scenario.BROKEN, BackendFailed)

    @_in_loop
    async def test_refusing(self) -> None:
        for error in await self._fails(Scenario.REFUSING, BackendRefused):
            assert 400 <= error.status < 500
            assert error.message

    @_in_loop
    async def test_garbage(self) -> None:
        await self._fails(Scenario.GARBAGE, BackendGarbage)

    @_in_loop
    async def test_dead(self) -> None:
        await self._fails(Scenario.DEAD, ConnectFailed)

    @_in_loop
    async def test_failing_in_mid_stream(self) -> None:
        await self._breaks(Scenario.FAILING, BackendFailed)

    @_in_loop
    async def test_cut_in_mid_stream(self) -> None:
        await self._breaks(Scenario.CUT, StreamTruncated)

    @_in_loop
    async def test_ending_without_a_finish(self) -> None:
        await self._breaks(Scenario.UNFINISHED, StreamTruncated)

    async def _fails(self, scenario: Scenario, kind: type[BackendError]) -> list[BackendError]:
        """Nothing comes but the error."""
        errors: list[BackendError] = []
        if scenario in self.impossible:
            return errors
        async with self.bench(scenario) as bench:
            for request in self.requests():
                events: list[Event] = []
                with pytest.raises(kind) as raised:
                    await collect(bench.adapter, request, events)
                assert not [event for event in events if not isinstance(event, Started)]
                errors.append(raised.value)
        return errors

    async def _breaks(self, scenario: Scenario, kind: type[BackendError]) -> None:
        """The pieces come that the backend sent, then the error, and no Finished."""
        if scenario in self.impossible:
            return
        async with self.bench(scenario) as bench:
            for endpoint in self.endpoints:
                events: list[Event] = []
                with pytest.raises(kind):
                    await collect(bench.adapter, chat_request(endpoint=endpoint), events)
                assert any(isinstance(event, Relayed | Delta) for event in events)
                assert not any(isinstance(event, Finished) for event in events)

    # Probes and the end

    @_in_loop
    async def test_probe_finds_what_it_can_do(self) -> None:
        async with self.bench(Scenario.HEALTHY) as bench:
            capabilities = await bench.adapter.probe()
            assert isinstance(capabilities, Capabilities)
            assert set(self.endpoints) <= capabilities.endpoints

    @_in_loop
    async def test_probe_fails_if_it_is_not_ready(self) -> None:
        for scenario in {Scenario.DEAD, Scenario.BROKEN} - self.impossible:
            async with self.bench(scenario) as bench:
                with pytest.raises(BackendError):
                    await bench.adapter.probe()

    @_in_loop
    async def test_load_is_plausible(self) -> None:
        async with self.bench(Scenario.HEALTHY) as bench:
            load = await bench.adapter.load()
            assert load is None or isinstance(load, Load)
            for figure in (load.running, load.waiting, load.kv_usage) if load else ():
                assert figure is None or figure >= 0

    @_in_loop
    async def test_closes_twice(self) -> None:
        async with self.bench(Scenario.HEALTHY) as bench:
            await ask(bench, chat_request(endpoint=self.endpoints[0]))
            await bench.adapter.aclose()
            await bench.adapter.aclose()


def stream(adapter: Adapter, request: GenerateRequest) -> AsyncGenerator[Event, None]:
    """The adapter's events, of which it promises that they are a generator's."""
    events = adapter.stream(request, Attempt())
    assert isinstance(events, AsyncGenerator), "stream() must be an async generator"
    return cast("AsyncGenerator[Event, None]", events)


async def collect(
    adapter: Adapter, request: GenerateRequest, into: list[Event] | None = None
) -> list[Event]:
    """All events; those that came before an error are in ``into``."""
    found: list[Event] = [] if into is None else into
    async with contextlib.aclosing(stream(adapter, request)) as events:
        async for event in events:
            found.append(event)
    return found


async def ask(bench: Bench, request: GenerateRequest) -> Answer:
    return read_answer(request, await collect(bench.adapter, request))


async def until(true: Callable[[], bool], seconds: float) -> None:
    """Wait until it is true.

    :raises AssertionError: it is not within the time.
    """
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        await asyncio.sleep(0.002)
