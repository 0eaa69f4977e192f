"""What goes wrong in one request stays with it; what goes wrong for all ends the engine.

Whether each step waits for the one before, or runs ahead of its result.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from forebay_engine import engine as engine_module
from forebay_engine.cache import CacheGroup
from forebay_engine.config import EngineConfig
from forebay_engine.costs import StepCosts
from forebay_engine.engine import Engine
from forebay_engine.errors import EngineError, RequestRefused
from forebay_engine.isolation import execute
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import Pooled, Row, Sampled, StepPlan, StepResult
from forebay_engine.tokenizer import Tokenizer
from forebay_engine.wire import Done, Embed, Event, Failed, Generate, Output
from late_runner import LateRunner

MODEL = Path(__file__).parents[1] / "fakes" / "engine_model"
TOKENIZER = Tokenizer.from_folder(MODEL)
POISON, FINE = 66, 97


class Fragile:
    """Draws the same token for ever; no step with a poisoned prompt in it can be executed."""

    block_size = 4
    vocab_size = 261
    max_model_len = 256
    eos_token_ids = frozenset({1})
    cache_groups = (CacheGroup(64),)
    generates = True
    step_costs = StepCosts((1,), (1.0,))
    draft_costs = None
    runs_ahead = False

    def __init__(self) -> None:
        self.broken = False
        self.admitted: list[int] = []

    def execute(self, plan: StepPlan) -> StepResult:
        if self.broken or any(POISON in row.token_ids for row in plan.rows):
            raise ArithmeticError("no number")
        self.admitted += [row.token_ids[0] for row in plan.rows if row.start == 0]
        sampled = (Sampled(row.seq_id, FINE) for row in plan.rows if row.sample)
        vector = np.array([3, 4], np.float32)
        pooled = (Pooled(row.seq_id, row.start, vector) for row in plan.rows if row.pooling)
        return StepResult(tuple(sampled), tuple(pooled))


class Client:
    """What a request got."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = asyncio.Event()

    def __call__(self, event: Event) -> None:
        assert not self.ended.is_set(), f"{event} came after the end"
        self.events.append(event)
        if isinstance(event, Done | Failed):
            self.ended.set()

    @property
    def last(self) -> Event:
        return self.events[-1]

    @property
    def tokens(self) -> int:
        return sum(len(event.token_ids) for event in self.events if isinstance(event, Output))


Start = Callable[..., AbstractAsyncContextManager[tuple[Engine, asyncio.Task[None]]]]


@pytest.fixture(params=[False, True], ids=["in-turn", "ahead"])
def started(request: pytest.FixtureRequest) -> Start:
    """An engine around a runner, and its task."""

    @asynccontextmanager
    async def start(
        runner: Fragile, sequences: int = 8, pooling: str = "auto"
    ) -> AsyncIterator[tuple[Engine, asyncio.Task[None]]]:
        config = EngineConfig(model=str(MODEL), max_sequences=sequences, pooling=pooling)
        chosen = LateRunner(runner) if request.param else runner
        engine = Engine(chosen, TOKENIZER, None, config)
        task = asyncio.create_task(engine.run())
        try:
            yield engine, task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    return start


async def ask(engine: Engine, *tokens: int, n: int = 1, **asked: object) -> Client:
    client = Client()
    sampling = SamplingParams(max_tokens=20)
    command = Generate(prompts=[list(tokens)], n=n, sampling=sampling, **asked)  # type: ignore[arg-type] # by keyword
    await engine.submit(command, client)
    return client


async def test_a_request_that_cannot_be_computed_fails_alone(started: Start) -> None:
    async with started(Fragile()) as (engine, _):
        clients = [await ask(engine, number, FINE) for number in range(5)]
        poisoned = await ask(engine, 9, POISON, n=2)
        clients += [await ask(engine, number, FINE) for number in range(5, 8)]
        for client in [*clients, poisoned]:
            await client.ended.wait()
        assert [client.tokens for client in clients] == [20] * 8
        assert all(isinstance(client.last, Done) for client in clients)
        assert isinstance(poisoned.last, Failed)
        assert (poisoned.last.kind, poisoned.tokens) == ("failed", 0)
        assert "could not compute this: no number" in poisoned.last.message
        assert engine.scheduler.counters.failed == 2
        assert engine.scheduler.cache.in_use == 0


async def test_an_input_that_cannot_be_embedded_fails_with_those_beside_it(started: Start) -> None:
    async with started(Fragile(), pooling="last") as (engine, _):
        answered = await ask(engine, 5, FINE)
        good = asyncio.create_task(engine.embed(Embed(inputs=[[7, 8]])))
        with pytest.raises(EngineError, match="could not compute this: no number"):
            await engine.embed(Embed(inputs=[[FINE, POISON], [5, FINE]]))
        vector = np.frombuffer((await good).vectors[0], "<f4")
        np.testing.assert_allclose(vector, [0.6, 0.8])
        await answered.ended.wait()
        assert answered.tokens == 20
        assert engine.scheduler.cache.in_use == 0


def test_halving_finds_what_fails_and_keeps_the_order() -> None:
    tried: list[int] = []

    def run(plan: StepPlan) -> StepResult:
        tried.append(len(plan.rows))
        return Fragile().execute(plan)

    tables = ((0,),)
    rows = tuple(
        Row(i, [POISON if i in (2, 3) else FINE], 0, 1, tables, True, SamplingParams(), 1)
        for i in range(7)
    )
    outcome = execute(run, StepPlan(rows))
    assert [item.seq_id for item in outcome.result.sampled] == [0, 1, 4, 5, 6]
    assert {id: str(error) for id, error in outcome.failed.items()} == {
        2: "no number",
        3: "no number",
    }
    assert tried == [7, 3, 1, 2, 1, 1, 4, 2, 1, 1, 2]


async def test_the_engine_ends_when_three_steps_in_a_row_come_to_nothing(started: Start) -> None:
    runner = Fragile()
    async with started(runner) as (engine, task):
        for _ in range(2):
            client = await ask(engine, POISON)
            await client.ended.wait()
        good = await ask(engine, FINE)
        await good.ended.wait()
        assert isinstance(good.last, Done)
        runner.broken = True
        for number in range(2):
            client = await ask(engine, FINE, number)
            await client.ended.wait()
            assert not task.done()
        await ask(engine, FINE, 2)
        with pytest.raises(RuntimeError, match="3 steps in a row failed") as failure:
            await task
        assert isinstance(failure.value.__cause__, ArithmeticError)


async def test_tokens_that_cannot_be_passed_on_fail_their_request_alone(
    started: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with started(Fragile()) as (engine, _):
        good, bad = await ask(engine, 5, FINE), await ask(engine, 6, FINE)
        choice = next(c for c in engine._choices.values() if c.request.emit is bad)
        monkeypatch.setattr(choice.text, "push", lambda token: 1 / 0)
        await good.ended.wait()
        await bad.ended.wait()
        assert isinstance(good.last, Done)
        assert isinstance(bad.last, Failed)
        assert "could not pass this on: division by zero" in bad.last.message


async def test_a_request_whose_time_is_over_fails_and_frees_its_pages(started: Start) -> None:
    async with started(Fragile(), sequences=1) as (engine, _):
        patient = await ask(engine, 5, FINE, timeout=3600.0)
        late = await ask(engine, 6, FINE, n=2, timeout=0.0)
        await late.ended.wait()
        await patient.ended.wait()
        assert isinstance(patient.last, Done)
        assert isinstance(late.last, Failed)
        assert late.last.kind == "deadline"
        assert late.last.message == "the request's 0 s were over after 0 tokens"
        counters = engine.scheduler.counters
        assert (counters.expired + counters.aborted, counters.finished) == (2, 1)
        assert engine.scheduler.cache.in_use == 0


async def test_a_smaller_priority_runs_earlier() -> None:
    runner = Fragile()
    engine = Engine(runner, TOKENIZER, None, EngineConfig(model=str(MODEL), max_sequences=1))
    clients = [
        await ask(engine, number, priority=priority)
        for number, priority in ((7, 5), (8, 0), (9, -5))
    ]
    task = asyncio.create_task(engine.run())
    for client in clients:
        await client.ended.wait()
    assert runner.admitted == [9, 8, 7]
    with pytest.raises(RequestRefused, match=r"priority is 101; .* -100 and 100") as refusal:
        await ask(engine, 1, priority=101)
    assert refusal.value.param == "priority"
    task.cancel()


async def test_books_that_disagree_end_the_engine_when_it_is_quiet(
    started: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_module, "_QUIET", 0.01)
    async with started(Fragile()) as (engine, task):
        client = await ask(engine, 5, FINE)
        await client.ended.wait()
        engine.scheduler.cache.pools[0]._free.append(3)
        engine.scheduler.cache.pools[0]._free.pop(0)
        with pytest.raises(AssertionError, match=r"of 64 blocks are in tables, 0 in use, \d+ free"):
            await task
