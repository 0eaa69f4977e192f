"""The engine on a GPU, whole: its scheduler, runner and sampling, on models of real shapes.

Requests go into the engine's queue and its events come out, in one process: no socket, no HTTP.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import random_model
import torch
from clock import Ceilings, mark
from rows import Row

from forebay_engine.config import EngineConfig
from forebay_engine.engine import Engine
from forebay_engine.process import load_runner
from forebay_engine.sequence import SamplingParams
from forebay_engine.step_runner import Launched, StepRunner
from forebay_engine.tokenizer import Tokenizer
from forebay_engine.wire import Event, Failed, Generate, Output


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model: what a step reads, and computes for each token."""

    weights: int
    kv_token: int
    params: int

    @classmethod
    def of(cls, config: dict[str, Any], weight: float, kv: int) -> Sizes:
        """``weight`` and ``kv``: bytes of a value of layers and of keys; the head has two."""
        hidden, dim = config["hidden_size"], config["head_dim"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        layer = hidden * dim * (2 * heads + 2 * kv_heads) + 3 * hidden * config["intermediate_size"]
        layers, head = config["num_hidden_layers"] * layer, config["vocab_size"] * hidden
        kv_token = 2 * config["num_hidden_layers"] * kv_heads * dim * kv
        return cls(int(layers * weight + head * 2), kv_token, layers + head)

    def decode(self, rows: int, length: int, best: Ceilings, unit: str) -> float:
        """Tokens a second if all is read once a step, and then computed."""
        read = (self.weights + rows * length * self.kv_token) / best.copy
        return rows / (read + 2 * self.params * rows / best.flops[unit])


@dataclass(slots=True)
class Answer:
    """When an answer's tokens came, in seconds of :func:`time.perf_counter`."""

    sent: float
    arrivals: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Setup:
    """A model in one configuration, and what is measured of it."""

    name: str
    config: dict[str, Any]
    settings: dict[str, Any]
    measures: tuple[Callable[[Bench], Iterator[Row]], ...]
    #: Bytes of a weight and of a value in the cache, and the ceiling of its products.
    weight: float = 2.0
    kv: int = 2
    unit: str = "bf16"


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
        """Share of the time between the first launch and the last in which the device waited."""
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
        settings = {"max_step_tokens": 8192, "prefix_cache": False, **setup.settings}
        config = EngineConfig(model=str(folder), **settings)
        runner = load_runner(config)
        runner.warm_up()
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
        return self._loop.run(self._answers(requests))

    async def _answers(self, requests: list[tuple[int, int]]) -> list[Answer]:
        stepping = asyncio.create_task(self._engine.run())
        asking = asyncio.gather(*(self._answer(*request) for request in requests))
        await asyncio.wait((stepping, asking), return_when=asyncio.FIRST_COMPLETED)
        if stepping.done():  # which only a defect brings about
            asking.cancel()
            await stepping
        stepping.cancel()
        with suppress(asyncio.CancelledError):
            await stepping
        return await asking

    async def _answer(self, given: int, wanted: int) -> Answer:
        vocabulary = self.setup.config["vocab_size"]
        prompt = [self._random.randrange(2, vocabulary) for _ in range(given)]
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


def steady(bench: Bench, *, rows: int, length: int, tokens: int, goal: float) -> Iterator[Row]:
    """Tokens a second while all of the rows decode."""
    found = bench.answers([(length, tokens)] * rows)
    begin = max(answer.arrivals[0] for answer in found)
    end = min(answer.arrivals[-1] for answer in found)
    inside = sum(begin < when <= end for answer in found for when in answer.arrivals)
    bound = bench.sizes.decode(rows, length + tokens // 2, bench.best, bench.setup.unit)
    name = f"{bench.setup.name}: {rows} x {length} tokens, decoding"
    yield Row(name, inside / (end - begin), "tok/s", bound, goal)


def busy(bench: Bench, *, rows: int, length: int, tokens: int) -> Iterator[Row]:
    """What a decode step costs the host, and for how long the device waits for it."""
    bench.answers([(length, 4)] * rows)
    bench.host_seconds()
    bench.watched.marks.clear()
    bench.answers([(length, tokens)] * rows)
    steps = max(1, len(bench.watched.marks) or tokens)
    host = 1e3 * bench.host_seconds() / steps
    where = f"{bench.setup.name}: {rows} x {length} tokens"
    yield Row(f"{where}, host work a step", host, "ms", None, 0.5, least=True)
    idle = 100 * bench.watched.idle()
    yield Row(f"{where}, the device waits", idle, "%", None, 3.0, least=True)


def mixed(
    bench: Bench, *, rows: int, low: int, high: int, goal: float, note: str = ""
) -> Iterator[Row]:
    """Requests of unlike lengths, all there at the start: output tokens a second."""
    lengths = random.Random(1)
    requests = [(lengths.randint(low, high), lengths.randint(low, high)) for _ in range(rows)]
    begin = time.perf_counter()
    bench.answers(requests)
    took = time.perf_counter() - begin
    out = sum(wanted for _, wanted in requests)
    sizes, best = bench.sizes, bench.best
    seen = sum(wanted * (given + wanted / 2) for given, wanted in requests)
    computed = sum(given + wanted for given, wanted in requests)
    bound = out / (
        (seen * sizes.kv_token + high * sizes.weights) / best.copy
        + 2 * sizes.params * computed / best.flops[bench.setup.unit]
    )
    name = f"{bench.setup.name}: {rows} requests of {low} to {high} tokens in and out"
    yield Row(name, out / took, "tok/s", bound, goal, note=note)


def prefill(bench: Bench, *, length: int, goal: float) -> Iterator[Row]:
    """Prompt tokens a second of one prompt alone, the median of five."""
    times = sorted(
        answer.arrivals[0] - answer.sent
        for _ in range(5)
        for answer in bench.answers([(length, 1)])
    )
    bound = bench.best.flops[bench.setup.unit] / (2 * bench.sizes.params)
    name = f"{bench.setup.name}: a prompt of {length} tokens"
    yield Row(name, length / times[2], "tok/s", bound, goal)


#: docs/source/performance/perf-overview.md of NVIDIA/TensorRT-LLM, on one H200.
_TENSORRT_LLM = "published for TensorRT-LLM 1.0: 17,744"

_steady = partial(steady, length=1024, tokens=128)
SETUPS = (
    Setup(
        "Qwen3 0.6B",
        random_model.QWEN3_06B,
        {"max_sequences": 256},
        (
            partial(_steady, rows=1, goal=1000.0),
            partial(mixed, rows=256, low=100, high=1024, goal=24000.0),
        ),
    ),
    Setup(
        "Llama 3.1 8B",
        random_model.LLAMA_8B,
        {"max_sequences": 256, "max_model_len": 8192},
        (
            partial(_steady, rows=1, goal=225.0),
            partial(_steady, rows=16, goal=0.0),
            partial(_steady, rows=64, goal=7800.0),
            partial(_steady, rows=256, goal=13000.0),
            partial(prefill, length=2048, goal=33000.0),
            partial(busy, rows=256, length=128, tokens=128),
        ),
    ),
    Setup(
        "Llama 3.1 8B, FP8",
        random_model.LLAMA_8B,
        {
            "max_sequences": 512,
            "max_model_len": 8192,
            "quantization": "fp8",
            "kv_cache_dtype": "fp8",
        },
        (partial(mixed, rows=512, low=1000, high=1000, goal=13000.0, note=_TENSORRT_LLM),),
        weight=1.0,
        kv=1,
        unit="fp8",
    ),
    Setup(
        "Llama 3.1 8B, int4",
        random_model.LLAMA_8B,
        {"max_sequences": 16, "max_model_len": 8192, "quantization": "int4"},
        # 2.3 and 2 times what bf16 is to reach at least.
        (partial(_steady, rows=1, goal=2.3 * 225.0), partial(_steady, rows=16, goal=0.0)),
        weight=0.5 + 4 / 128,
    ),
)
SMALL = (
    Setup(
        "tiny",
        random_model.TINY,
        {"device": "cpu", "max_sequences": 4, "max_step_tokens": 64, "num_blocks": 32},
        (
            partial(steady, rows=2, length=20, tokens=6, goal=1.0),
            partial(mixed, rows=3, low=4, high=9, goal=1.0),
            partial(prefill, length=30, goal=1.0),
            partial(busy, rows=2, length=8, tokens=4),
        ),
    ),
)
