"""What the host does for a decode step: planning it, applying its result, passing the tokens on.

    python benchmarks/scheduler.py [--model FOLDER]

The scheduler is timed by itself, then the engine's whole loop around a stand-in for the model that
answers at once with the words of a text: asyncio, the thread of the steps, the detokeniser and the
frames for the socket included. Last what a GPU's runner does on the host before it calls the first
kernel, and to make the step's result of the tokens. Sequences run ahead behind prompts of 512
tokens, in pages of 16. Processor time, mean of some 200 steps, the best of several rounds. The aim
is 0.5 ms a step of 256 rows; a GPU takes some milliseconds for it, in which this is hidden.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path

import torch

from forebay_engine.batch import check_row
from forebay_engine.cache import CacheGroup, KVCache
from forebay_engine.config import EngineConfig
from forebay_engine.costs import StepCosts
from forebay_engine.engine import Engine
from forebay_engine.gpu.launched import LaunchedStep
from forebay_engine.gpu.layout import Samples, lay
from forebay_engine.gpu.table import RequestTable
from forebay_engine.scheduler import Scheduler
from forebay_engine.sequence import SamplingParams, Sequence
from forebay_engine.step import Row, Sampled, StepPlan, StepResult
from forebay_engine.step_runner import Finished
from forebay_engine.tokenizer import Tokenizer
from forebay_engine.wire import Event, Generate, frame

BUDGET = 500e-6
PROMPT, BLOCK, STEPS, WARM, ROUNDS = 512, 16, 200, 8, 5
RUNNING = (1, 64, 256)


class Reader:
    """In place of a model: every sequence goes through the same text, each from another place."""

    block_size = BLOCK
    max_model_len = 8192
    generates = True
    eos_token_ids: frozenset[int] = frozenset()
    step_costs = StepCosts((1,), (1.0,))
    draft_costs: StepCosts | None = None
    runs_ahead = True

    def __init__(self, tokens: list[int], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.cache_groups: tuple[CacheGroup, ...] = (CacheGroup(256 * self.max_model_len // BLOCK),)
        self._tokens = tokens
        #: The process's seconds when each step was launched, and what it itself took since then.
        self.launches: list[float] = []
        self.own = 0.0

    def warm_up(self) -> None:
        pass

    def takes_unknown(self, sampling: SamplingParams) -> bool:
        return True

    def launch(self, plan: StepPlan) -> Finished:
        begin = time.thread_time()
        self.launches.append(time.process_time() - self.own)
        result = self.execute(plan)
        self.own += time.thread_time() - begin
        return Finished(result)

    def execute(self, plan: StepPlan) -> StepResult:
        tokens, count = self._tokens, len(self._tokens)
        return StepResult(
            tuple(
                Sampled(row.seq_id, tokens[(row.start + 97 * row.seq_id) % count])
                for row in plan.rows
                if row.sample
            )
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default="~/.cache/forebay/models/gemma-3-270m")
    folder = parser.parse_args().model.expanduser()
    tokenizer = Tokenizer.from_folder(folder)
    text = (Path(__file__).parents[1] / "docs" / "engine.md").read_text()
    tokens = tokenizer.encode(text, special=False)
    print("| running | plan | apply | together | a row | of 0.5 ms |")
    print("|---|---|---|---|---|---|")
    for running in RUNNING:
        plan, apply = min((scheduled(running) for _ in range(ROUNDS)), key=sum)
        print(f"| {running} | {line(plan, apply, running)}")
    print("\n| running | the engine's loop | a row | of 0.5 ms |")
    print("|---|---|---|---|")
    for running in RUNNING:
        rounds = (
            asyncio.run(looped(Reader(tokens, tokenizer.vocab_size), tokenizer, folder, running))
            for _ in range(ROUNDS)
        )
        step = min(rounds)
        share = f"{step / BUDGET:.0%}"
        print(f"| {running} | {1e6 * step:.0f} µs | {1e6 * step / running:.1f} µs | {share} |")
    print("\n| running | layout | result | together | a row | of 0.5 ms |")
    print("|---|---|---|---|---|---|")
    for running in RUNNING:
        layout, result = min((launched(running) for _ in range(ROUNDS)), key=sum)
        print(f"| {running} | {line(layout, result, running)}")


def line(first: float, second: float, running: int) -> str:
    both = first + second
    parts = f"{1e6 * first:.0f} µs | {1e6 * second:.0f} µs | {1e6 * both:.0f} µs"
    return f"{parts} | {1e6 * both / running:.1f} µs | {both / BUDGET:.0%} |"


def scheduled(running: int) -> tuple[float, float]:
    """Seconds of a plan, and of applying a result: the mean of many steps."""
    cache = KVCache([CacheGroup(running * (PROMPT + STEPS + 2 * BLOCK) // BLOCK)], BLOCK)
    scheduler = Scheduler(
        cache,
        max_step_tokens=running * PROMPT,
        max_sequences=running,
        max_model_len=4 * PROMPT,
        ahead=lambda sampling: True,
    )
    sampling = SamplingParams(max_tokens=STEPS + 8)
    for id in range(running):
        # Not all need their next page in the same step.
        scheduler.add(Sequence(id, [id] * (PROMPT - id % BLOCK), sampling))
    last = scheduler.plan()
    spent = [0.0, 0.0]
    for step in range(STEPS):
        begin = time.thread_time()
        following = scheduler.plan()
        planned = time.thread_time()
        assert last is not None
        drawn = StepResult(tuple(Sampled(row.seq_id, 7) for row in last.rows if row.sample))
        drew = time.thread_time()
        scheduler.apply(drawn)
        if step >= WARM:
            spent[0] += planned - begin
            spent[1] += time.thread_time() - drew
        last = following
    return spent[0] / (STEPS - WARM), spent[1] / (STEPS - WARM)


async def looped(runner: Reader, tokenizer: Tokenizer, folder: Path, running: int) -> float:
    """The process's seconds from a step's launch to the next one's, the stand-in's left out."""
    config = EngineConfig(model=str(folder), max_sequences=running, max_step_tokens=8192)
    engine = Engine(runner, tokenizer, None, config)
    sent = 0

    def emit(event: Event) -> None:
        nonlocal sent
        sent += len(frame(event))

    sampling = SamplingParams(max_tokens=3 * STEPS, ignore_eos=True)
    for number in range(running):
        prompt = [number % 99 + 5] * PROMPT
        await engine.submit(Generate(prompts=[prompt], sampling=sampling), emit)
    task = asyncio.create_task(engine.run())
    while engine.scheduler.counters.finished < running:
        await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    # All run in the steps between the last that began a prompt and the first that ended an answer.
    launches = runner.launches[-2 * STEPS : -STEPS]
    return (launches[-1] - launches[0]) / (len(launches) - 1)


def launched(running: int) -> tuple[float, float]:
    """Seconds of laying a step out for a device, and of making a result of what it drew."""
    table = RequestTable(
        running,
        groups=1,
        pages=8 * PROMPT // BLOCK,
        longest=8 * PROMPT,
        vocab=1024,
        eos_token_ids=frozenset(),
        looks_back=True,
        device=torch.device("cpu"),
    )
    known = [[id] * (PROMPT - id % BLOCK) for id in range(running)]
    pages = [[0] * -(-len(tokens) // BLOCK) for tokens in known]
    sampling = SamplingParams()
    drawn = torch.zeros(running, dtype=torch.int64)
    spent = [0.0, 0.0]
    for step in range(STEPS):
        rows = []
        for id, (tokens, own) in enumerate(zip(known, pages, strict=True)):
            if len(tokens) == BLOCK * len(own):
                own.append(0)
            rows.append(Row(id, tokens, len(tokens), 1, (own,), True, sampling, PROMPT))
            tokens.append(0)
        begin = time.thread_time()
        for row in rows:
            check_row(row, BLOCK)
        places, changes = table.enter(rows)
        samples = Samples.of(rows, places)
        lay(rows, places, changes, samples, padded=running, nobody=table.nobody, pinned=False)
        laid = time.thread_time()
        LaunchedStep(
            wait=lambda: None,
            rows=tuple(rows),
            tokens=drawn,
            samples=samples,
            by_host=None,
            scores=None,
            rest=StepResult,
            forget=table.forget,
        ).result()
        if step >= WARM:
            spent[0] += laid - begin
            spent[1] += time.thread_time() - laid
    return spent[0] / (STEPS - WARM), spent[1] / (STEPS - WARM)


if __name__ == "__main__":
    main()
