"""The runner for GPUs draws the tokens of the plain one, whatever it records, pads and replays.

Here it runs on a processor; in place of CUDA's graphs there is what holds a recorded step to their
discipline (``fakes/replaying.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from replaying import CheckingRecorder

from forebay_engine.config import EngineConfig
from forebay_engine.engine import Engine
from forebay_engine.gpu.runner import DeviceRunner
from forebay_engine.runner import Runner
from forebay_engine.sequence import SamplingParams
from forebay_engine.tokenizer import Tokenizer
from forebay_engine.wire import Done, Event, Failed, Generate, Output

CPU = torch.device("cpu")
SHARED = [5 + (7 * i) % 370 for i in range(40)]
PROMPTS = [[2, 17, 200], SHARED, [*SHARED, 9, 8, 7], [*SHARED, 9, 9], [300], SHARED[:33]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=12, ignore_eos=True)

Checkpoint = Callable[[str], Path]


def settings(folder: Path, **own: Any) -> EngineConfig:
    common = {"dtype": "float32", "max_model_len": 72, "kv_cache_bytes": 1 << 20, "threads": 1}
    return EngineConfig(model=str(folder), **{"max_sequences": 6, **common, **own})


def on_device(config: EngineConfig) -> tuple[DeviceRunner, CheckingRecorder]:
    recorder = CheckingRecorder()
    runner = DeviceRunner(config, device=CPU, recorder=recorder, memory=None)
    runner.warm_up()
    return runner, recorder


async def answers(
    runner: Any, config: EngineConfig, sampling: SamplingParams, choices: int = 1
) -> list[list[int]]:
    """Of each prompt its choices: one alone at first, then all others, one of them given up."""
    engine = Engine(runner, Tokenizer.from_folder(Path(config.model)), None, config)
    stepping = asyncio.create_task(engine.run())
    found: dict[int, list[list[int]]] = {}

    async def ask(number: int, until: int | None = None) -> None:
        tokens = found[number] = [[] for _ in range(choices)]
        enough = asyncio.Event()

        def emit(event: Event) -> None:
            assert not isinstance(event, Failed), event
            if isinstance(event, Output):
                tokens[event.index] += event.token_ids
            if isinstance(event, Done) or (until and len(tokens[0]) >= until):
                enough.set()

        command = Generate(prompts=[PROMPTS[number]], n=choices, seed=number, sampling=sampling)
        request = await engine.submit(command, emit)
        await enough.wait()
        engine.abort(request)

    async def ask_all() -> None:
        await ask(0, until=4)
        given_up = asyncio.create_task(ask(1, until=3))
        await asyncio.gather(*(ask(number) for number in range(2, len(PROMPTS))), given_up)
        await asyncio.gather(*(ask(number) for number in (0, 1)))

    try:
        asked = asyncio.create_task(ask_all())
        await asyncio.wait([stepping, asked], return_when=asyncio.FIRST_COMPLETED)
        if stepping.done():
            stepping.result()
        asked.result()
    finally:
        stepping.cancel()
        await asyncio.gather(stepping, return_exceptions=True)
        engine.scheduler.check()
    return [tokens for number in sorted(found) for tokens in found[number]]


CUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "small chunks": {"max_step_tokens": 9, "max_sequences": 5},
    "preempted": {"block_size": 4, "num_blocks": 20},
    "no prefix cache": {"prefix_cache": False, "block_size": 5},
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
async def test_tokens_are_those_of_the_plain_runner(
    family: str, cut: str, tiny_checkpoint: Checkpoint
) -> None:
    config = settings(tiny_checkpoint(family), **CUTS[cut])
    runner, recorder = on_device(config)
    plain = Runner(config)
    for sampling in (GREEDY, DRAWN):
        expected = await answers(plain, config, sampling)
        assert await answers(runner, config, sampling) == expected
    assert sum(count > 0 for count in recorder.replays) > 2
