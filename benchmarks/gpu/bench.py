"""The engine on a GPU, whole: its scheduler, runner and sampling.

Requests go into the engine's queue and its events come out, in one process: no socket, no HTTP.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from clock import Ceilings, mark
from whole import Setup, Sizes

from forebay_engine.config import EngineConfig
from forebay_engine.engine import Engine
from forebay_engine.process import load_runner
from forebay_engine.sequence import SamplingParams
from forebay_engine.step_runner import Launched, StepRunner
from forebay_engine.tokenizer import Tokenizer
from forebay_engine.wire import Event, Failed, Generate, Output


@dataclass(slots=True)
class Answer:
    """When an answer's tokens came, in seconds of :func:`time.perf_counter`."""

    sent: float
    arrivals: list[float] = field(default_factory=list)


class Watched:
    """A runner whose launches are timed, on the host and on the device."""

    def __init__(self, runner: StepRunner) -> None:
        self._runner = runner
        self.host = 0.0
        self.marks: list[tuple[Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def launch(self, plan: Any) -> Launched:
        started = time.perf_counter()
        if torch.cuda.is_available():
            marks = mark(), mark()
            marks[0].record()
            launched = self._runner.launch(plan)
            marks[1].record()
            self.marks.append(marks)
        else:
            launched = self._runner.launch(plan)
        self.host += time.perf_counter() - started
        return launched

    def idle(self) -> float:
        """Share of the time in which the device had no step to work on.

        Where it waited within one, for a kernel that was not launched yet, is not counted.
        """
        if len(self.marks) < 2:
            return 0.0
        torch.cuda.synchronize()
        total = self.marks[0][0].elapsed_time(self.marks[-1][1])
        gaps = (one[1].elapsed_time(next[0]) for one, next in pairwise(self.marks))
        return float(sum(gaps) / total)


class Bench:
    """A loaded engine that answers."""

    def __init__(self, setup: Setup, folder: Path, best: Ceilings) -> None:
        self.setup, self.best = setup, best
        self.sizes = Sizes.of(setup.config, setup.weight, setup.kv)
        begin = time.perf_counter()
        runner, config = load(folder, setup.settings)
        #: Seconds until it could answer.
        self.started = time.perf_counter() - begin
        self.watched = Watched(runner)
        self._engine = Engine(self.watched, Tokenizer.from_folder(folder), None, config)
        self._loop = asyncio.Runner()  # the engine belongs to one loop
        self._random = random.Random(0)
        self._host = 0.0
        for name in ("plan", "apply"):
            setattr(self._engine.scheduler, name, self._timed(name))

    def _timed(self, name: str) -> Callable[..., Any]:
        method = getattr(self._engine.scheduler, name)

        def timed(*args: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(*args)
            finally:
                self._host += time.perf_counter() - begin

        return timed

    def answers(self, requests: list[tuple[int, int]]) -> list[Answer]:
        """All at once: of each request so many tokens in, and so many out."""
        choose, vocabulary = self._random.randrange, self.setup.config["vocab_size"]
        # Before the first is sent: all of them take longer than many a step.
        prompts = [[choose(2, vocabulary) for _ in range(given)] for given, _ in requests]
        wanted = [tokens for _, tokens in requests]
        return self._loop.run(self._answers(prompts, wanted))

    async def _answers(self, prompts: list[list[int]], wanted: list[int]) -> list[Answer]:
        stepping = asyncio.create_task(self._engine.run())
        asking = asyncio.gather(*map(self._answer, prompts, wanted))
        await asyncio.wait((stepping, asking), return_when=asyncio.FIRST_COMPLETED)
        if stepping.done():  # which only a defect brings about
            asking.cancel()
            await stepping
        stepping.cancel()
        with suppress(asyncio.CancelledError):
            await stepping
        return await asking

    async def _answer(self, prompt: list[int], wanted: int) -> Answer:
        sampling = SamplingParams(max_tokens=wanted, temperature=0.0, ignore_eos=True)
        answer, done = Answer(time.perf_counter()), asyncio.Event()
        failures: list[str] = []

        def emit(event: Event) -> None:
            if isinstance(event, Output):
                answer.arrivals += [time.perf_counter()] * len(event.token_ids)
                if event.finish_reason is not None:
                    done.set()
            elif isinstance(event, Failed):
                failures.append(event.message)
                done.set()

        await self._engine.submit(Generate(prompts=[prompt], sampling=sampling), emit)
        await done.wait()
        if failures or len(answer.arrivals) != wanted:
            raise RuntimeError(f"{len(answer.arrivals)} tokens of {wanted}: {failures}")
        return answer

    def host_seconds(self) -> float:
        """Since the last call: planning, launching, and applying results."""
        spent, self._host, self.watched.host = self._host + self.watched.host, 0.0, 0.0
        return spent


def load(folder: Path, settings: dict[str, Any]) -> tuple[StepRunner, EngineConfig]:
    """A runner that has compiled and recorded all that it needs."""
    whole = {"max_step_tokens": 8192, "prefix_cache": False, **settings}
    config = EngineConfig(model=str(folder), **whole)
    runner = load_runner(config)
    runner.warm_up()
    return runner, config
