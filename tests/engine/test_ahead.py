"""Running one step ahead: what is planned behind tokens that nobody knows yet, and what it changes.

It changes no answer. The scheduler's state machine (test_serving_machine.py) runs ahead as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from forebay_engine.cache import CacheGroup
from forebay_engine.config import EngineConfig
from forebay_engine.costs import StepCosts
from forebay_engine.engine import Engine
from forebay_engine.gpu.runner import DeviceRunner
from forebay_engine.runner import Runner
from forebay_engine.scheduler import Scheduler
from forebay_engine.sequence import FinishReason, SamplingParams, Sequence
from forebay_engine.step import Row, Sampled, StepPlan, StepResult
from forebay_engine.step_runner import Launched
from forebay_engine.tokenizer import Tokenizer
from forebay_engine.wire import Done, Event, Failed, Generate, GuideSpec, Output
from late_runner import LateRunner
from shadow_runner import ShadowRunner, expected, guessing, make_scheduler

MODEL = Path(__file__).parents[1] / "fakes" / "engine_model"
TOKENIZER = Tokenizer.from_folder(MODEL)


class Steps:
    """A scheduler that runs ahead of its runner."""

    def __init__(self, **settings: Any) -> None:
        self.runner = LateRunner(ShadowRunner(settings.pop("block_size", 2)))
        self.scheduler: Scheduler = make_scheduler(ahead=self.runner.takes_unknown, **settings)
        self.launched: list[Launched] = []

    def add(self, id: int, prompt: list[int], guide: Any = None, **sampling: Any) -> Sequence:
        sequence = Sequence(id, prompt, SamplingParams(**{"ignore_eos": True, **sampling}))
        sequence.guide = guide
        self.scheduler.add(sequence)
        return sequence

    def plan(self) -> dict[int, tuple[int, int, int]]:
        """Of each row of the next step: start, count and unknown; empty: there is none."""
        plan = self.scheduler.plan()
        if plan is None:
            return {}
        self.launched.append(self.runner.launch(plan))
        return {row.seq_id: (row.start, row.count, row.unknown) for row in plan.rows}

    def apply(self) -> dict[int, list[int]]:
        progress = self.scheduler.apply(self.launched.pop(0).result())
        self.scheduler.check()
        return {sequence.id: [item.token_id for item in taken] for sequence, taken in progress}


def test_a_sequence_runs_on_behind_a_token_that_is_not_known_yet() -> None:
    steps = Steps(budget=4)
    one = steps.add(0, [1, 2, 3], max_tokens=4)
    other = steps.add(1, [4, 5, 6, 7], max_tokens=3)
    assert steps.plan() == {0: (0, 3, 0), 1: (0, 1, 0)}
    # A token of the first is being drawn; the other prompt goes on behind its chunk.
    assert steps.plan() == {0: (3, 1, 1), 1: (1, 3, 0)}
    with pytest.raises(RuntimeError, match="apply a result first"):
        steps.scheduler.plan()
    assert list(steps.apply()) == [0]
    assert (one.num_computed, other.num_computed) == (3, 1)
    assert steps.plan() == {0: (4, 1, 1), 1: (4, 1, 1)}
    assert list(steps.apply()) == [0, 1]
    assert steps.plan() == {0: (5, 1, 1), 1: (5, 1, 1)}
    assert list(steps.apply()) == [0, 1]
    # Their last tokens come of the step under way, whatever they are: nothing is planned behind it.
    assert steps.plan() == {}
    assert list(steps.apply()) == [0, 1]
    assert (steps.plan(), steps.launched) == ({}, [])
    for sequence in (one, other):
        assert sequence.token_ids == expected(sequence.prompt_ids, sequence.sampling)
    assert steps.scheduler.cache.in_use == 0


def test_a_row_behind_an_end_is_for_nothing_and_keeps_its_pages_until_its_step_is_over() -> None:
    steps = Steps()
    stop = expected([1, 2], SamplingParams(max_tokens=1, ignore_eos=True))[-1]
    sequence = steps.add(0, [1, 2], max_tokens=5, stop_token_ids=(stop,))
    assert steps.plan() == {0: (0, 2, 0)}
    assert steps.plan() == {0: (2, 1, 1)}
    assert steps.apply() == {0: [stop]}
    assert sequence.finish_reason is FinishReason.STOP
    assert (steps.scheduler.running, steps.scheduler.cache.in_use) == (0, 2)
    assert steps.plan() == {}
    assert steps.apply() == {}
    assert steps.scheduler.cache.in_use == 0
    assert sequence.token_ids == [1, 2, stop]
    assert steps.scheduler.counters.generated_tokens == 1


def test_a_row_that_failed_keeps_its_pages_until_the_step_behind_it_is_over() -> None:
    steps = Steps()
    sequence = steps.add(0, [1, 2, 3], max_tokens=4)
    steps.plan(), steps.plan()
    steps.launched.pop(0).result()
    assert steps.scheduler.apply(StepResult(()), failed={0}) == []
    steps.scheduler.check()
    assert sequence.finish_reason is FinishReason.ERROR
    assert (steps.scheduler.running, steps.scheduler.cache.in_use) == (0, 2)
    assert steps.apply() == {}
    assert steps.scheduler.cache.in_use == 0


def test_an_abort_under_two_steps_frees_after_the_second() -> None:
    steps = Steps()
    steps.add(0, [1, 2, 3], max_tokens=4)
    steps.plan(), steps.plan()
    steps.scheduler.abort(0)
    assert (steps.scheduler.running, steps.scheduler.cache.in_use) == (0, 2)
    assert steps.apply() == {}
    assert (steps.plan(), steps.scheduler.cache.in_use) == ({}, 2)
    assert steps.apply() == {}
    assert steps.scheduler.cache.in_use == 0
    assert steps.scheduler.counters.aborted == 1


def test_a_full_page_is_offered_once_its_tokens_are_known_and_computed() -> None:
    steps = Steps()
    steps.add(0, [1, 2, 3], max_tokens=5)
    published = steps.scheduler.cache.pools[0]._content
    steps.plan(), steps.plan()  # positions 0 to 2, then 3, which fills a page
    assert len(published) == 0
    steps.apply()
    assert len(published) == 1
    steps.plan()
    steps.apply()
    assert len(published) == 2


def test_pages_that_run_out_are_waited_for_and_nobody_loses_what_is_being_written() -> None:
    steps = Steps(blocks=8, prefix_cache=False)
    sequences = [steps.add(id, [id, 1, 2], max_tokens=9) for id in range(3)]
    waits = 0
    while steps.scheduler.running + steps.scheduler.waiting or steps.launched:
        lost = steps.scheduler.counters.preempted
        planned = steps.plan() if len(steps.launched) < 2 else {}
        if not planned:
            short = steps.scheduler.cache.pools[0].available == 0
            waits += bool(steps.launched) and short
        elif steps.scheduler.counters.preempted > lost:
            assert len(steps.launched) == 1
        if len(steps.launched) == 2 or not planned:
            steps.apply()
    assert waits > 0
    assert 0 < steps.scheduler.counters.preempted < 6
    for sequence in sequences:
        assert sequence.token_ids == expected(sequence.prompt_ids, sequence.sampling)


def test_a_step_that_is_discarded_was_never_planned() -> None:
    steps = Steps()
    steps.add(0, [1, 2, 3], max_tokens=5)
    steps.plan()
    planned = steps.plan()
    steps.add(1, [4], max_tokens=1)
    steps.launched.pop()
    steps.scheduler.discard()
    again = steps.plan()
    assert (planned, again) == ({0: (3, 1, 1)}, {0: (3, 1, 1), 1: (0, 1, 0)})
    steps.apply(), steps.apply()
    steps.scheduler.check()


class Form:
    """Allows everything, but has to be told each token."""

    may_end = True
    failure = None

    def take(self, token_id: int) -> bool:
        return False


def test_who_must_know_its_last_token_runs_every_second_step_while_it_is_one_of_few() -> None:
    steps = Steps(blocks=40)
    steps.add(0, [1, 2], Form(), max_tokens=9)
    for id in (1, 2):
        steps.add(id, [3, id], max_tokens=9)
    assert list(steps.plan()) == [0, 1, 2]
    assert list(steps.plan()) == [1, 2]
    steps.apply()
    assert steps.plan()[0] == (2, 1, 0)


def test_where_as_many_must_know_their_tokens_as_could_run_the_result_is_waited_for() -> None:
    steps = Steps(blocks=40)
    steps.add(0, [1, 2], Form(), max_tokens=9)
    steps.add(1, [3, 4], max_tokens=9, bad_words=((99,),))
    for id in (2, 3):
        steps.add(id, [3, id], max_tokens=9)
    for _ in range(3):
        assert list(steps.plan()) == [0, 1, 2, 3]
        assert steps.plan() == {}
        steps.apply()
    steps.scheduler.abort(0)
    assert list(steps.plan()) == [1, 2, 3]
    assert list(steps.plan()) == [2, 3]


@pytest.mark.parametrize("kind", ["ngram", "draft"])
def test_with_guesses_each_step_waits_for_the_one_before(kind: str) -> None:
    steps = Steps(speculation=guessing(kind, 3, 2, 0))
    assert steps.scheduler.most_in_flight == 1


class Babbler:
    """Draws letters by a hash of all tokens before them and of the seed, and now and then an end.

    It writes down what it runs in order to see that the next step is launched before that.
    """

    block_size = 4
    vocab_size = 261
    max_model_len = 64
    generates = True
    eos_token_ids = frozenset({1})
    cache_groups = (CacheGroup(18), CacheGroup(18, window=6))
    step_costs = StepCosts((1,), (1.0,))
    draft_costs = None
    runs_ahead = False

    def __init__(self) -> None:
        self.log: list[str] = []
        self.letters = TOKENIZER.encode("abcdefgh é", special=False)

    def execute(self, plan: StepPlan) -> StepResult:
        self.log.append("run")
        return StepResult(tuple(self._draw(row) for row in plan.rows if row.sample))

    def _draw(self, row: Row) -> Sampled:
        number = hash((row.sampling.seed, *row.token_ids))
        token = 1 if number % 23 == 0 else self.letters[number % len(self.letters)]
        return Sampled(row.seq_id, token)


class Logged(LateRunner):
    def launch(self, plan: StepPlan) -> Any:
        self.log.append("launch")
        return super().launch(plan)


Answer = list[tuple[str, list[int], FinishReason | None]]


async def babble(runner: Any, requests: list[tuple[Generate, int | None]], model: str) -> Any:
    """The answers, by number: whole ones alone of requests that are not dropped on the way."""
    config = EngineConfig(model=model, max_sequences=6, max_step_tokens=24)
    engine = Engine(runner, Tokenizer.from_folder(Path(model)), None, config)
    task = asyncio.create_task(engine.run())
    answers: dict[int, Answer] = {}

    async def ask(number: int, command: Generate, patience: int | None) -> None:
        events: asyncio.Queue[Event] = asyncio.Queue()
        request = await engine.submit(command, events.put_nowait)
        answer: Answer = [("", [], None) for _ in range(command.n)]
        while not isinstance(event := await events.get(), Done):
            assert not isinstance(event, Failed), event
            if not isinstance(event, Output):
                continue
            text, tokens, _ = answer[event.index]
            answer[event.index] = text + event.text, tokens + event.token_ids, event.finish_reason
            if patience is not None and (patience := patience - 1) < 0:
                engine.abort(request)
                return
        answers[number] = answer

    try:
        async with asyncio.timeout(50):
            await asyncio.gather(*(ask(i, *item) for i, item in enumerate(requests)))
            while engine.scheduler.cache.in_use:
                await asyncio.sleep(0)
        engine.scheduler.check()
        assert not task.done()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    return answers, engine.scheduler.counters


def crowd(seed: int, count: int, tokens: list[int]) -> list[tuple[Generate, int | None]]:
    """Requests of all kinds, some with a common beginning; a sixth is dropped on the way."""
    random = Random(seed)
    shared = random.choices(tokens, k=20)
    found = []
    for _ in range(count):
        prompt = random.choices(tokens, k=random.randint(1, 25))
        asked: dict[str, Any] = {
            "max_tokens": random.randint(1, 30),
            "min_tokens": random.choice((0, 0, 4)),
            "temperature": random.choice((0.0, 0.9)),
        }
        match random.randrange(8):
            case 0 | 1:
                prompt = shared + prompt[:5]
            case 2:
                asked["stop"] = random.choice((("ab",), ("a b", "hh"), ("é",)))
            case 3:
                asked["stop_token_ids"] = tuple(random.choices(tokens, k=2))
            case 4:
                asked["bad_words"] = ((tokens[0], tokens[1]),)
        guide = GuideSpec("regex", "[a-h ]{3,20}") if random.random() < 0.1 else None
        request = Generate(
            prompts=[prompt],
            n=random.choice((1, 1, 1, 3)),
            seed=random.randrange(9),
            sampling=SamplingParams(**asked),
            guide=guide,
        )
        found.append((request, random.randrange(6) if random.random() < 1 / 6 else None))
    return found


@pytest.mark.parametrize("seed", range(4))
async def test_no_answer_depends_on_running_ahead(seed: int) -> None:
    runner = Babbler()
    requests = [
        (request, patience)
        for request, patience in crowd(seed, 60, runner.letters)
        if request.guide is None  # which a hash does not obey
    ]
    one, _ = await babble(runner, requests, str(MODEL))
    late = Logged(Babbler())
    other, counters = await babble(late, requests, str(MODEL))
    both = one.keys() & other.keys()
    assert len(both) > 30
    assert {number: one[number] for number in both} == {number: other[number] for number in both}
    assert counters.preempted > 0
    assert counters.cached_tokens > 0
    assert late.unknown > 100
    assert "launch launch run launch run launch run" in " ".join(late.log)


async def test_a_model_gives_the_same_tokens_ahead(tiny_checkpoint: Callable[[str], Path]) -> None:
    """Of a runner that computes as late as it can, and of the one for devices."""
    folder = tiny_checkpoint("gemma3")
    settings = {"num_blocks": 12, "block_size": 8, "max_model_len": 64, "dtype": "float32"}
    config = EngineConfig(model=str(folder), threads=1, max_sequences=6, **settings)  # type: ignore[arg-type] # by keyword
    runner = Runner(config)
    runner.warm_up()
    device = DeviceRunner(config, device=torch.device("cpu"), recorder=None, memory=None)
    device.warm_up()
    requests = crowd(1, 16, list(range(5, 380)))
    one, _ = await babble(runner, requests, str(folder))
    late = LateRunner(runner)
    for ahead in (late, device):
        other, counters = await babble(ahead, requests, str(folder))
        both = one.keys() & other.keys()
        assert len(both) > 9
        assert {n: one[n] for n in both} == {n: other[n] for n in both}
        assert counters.preempted > 0
    assert late.unknown > 50
