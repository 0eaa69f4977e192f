"""Log-probabilities of the prompt are transformers', however the prompt is cut, cached or lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from forebay_engine.config import EngineConfig
from forebay_engine.engine import Engine
from forebay_engine.runner import Runner
from forebay_engine.sequence import SamplingParams
from forebay_engine.tokenizer import Tokenizer
from forebay_engine.wire import Done, Event, Generate, Output, Scored

PROMPT = [2, *(5 + (11 * i) % 370 for i in range(90))]
SAMPLING = SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=2, ignore_eos=True)

CUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "small chunks": {"max_step_tokens": 7},
    "token by token": {"max_step_tokens": 1},
}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    """``[places, vocab]``: what was likely behind each token of the prompt."""
    import transformers as hf

    model: Any = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0]
    return logits.log_softmax(-1)[:-1]  # type: ignore[no-any-return] # transformers is untyped


async def ask(
    engine: Engine, n: int = 1, prompt: list[int] = PROMPT, sampling: SamplingParams = SAMPLING
) -> list[Output]:
    found: list[Output] = []
    ended = asyncio.Event()

    def emit(event: Event) -> None:
        if isinstance(event, Output):
            found.append(event)
        if isinstance(event, Done):
            ended.set()

    await engine.submit(Generate(prompts=[prompt], n=n, sampling=sampling), emit)
    await ended.wait()
    return found


def same(found: list[list[Scored]], expected: torch.Tensor) -> None:
    assert len(found) == len(PROMPT) - 1
    for place, logprobs, token in zip(found, expected, PROMPT[1:], strict=True):
        own, *best = place
        assert own.token_id == token
        assert own.logprob == pytest.approx(float(logprobs[token]), abs=1e-4)
        assert own.rank == int((logprobs > logprobs[token]).sum()) + 1
        assert [item.token_id for item in best] == logprobs.topk(2).indices.tolist()
        assert [item.rank for item in best] == [1, 2]


@pytest.mark.parametrize("cut", CUTS)
async def test_each_token_of_the_prompt_is_scored_once(
    folder: Path, expected: torch.Tensor, cut: str
) -> None:
    config = EngineConfig(model=str(folder), dtype="float32", kv_cache_bytes=4 << 20, threads=1)
    config = replace(config, **CUTS[cut])
    engine = Engine(Runner(config), Tokenizer.from_folder(folder), None, config)
    stepping = asyncio.create_task(engine.run())
    for _ in range(2):  # the second time the prompt is in the cache, and is computed all the same
        pieces = await ask(engine, n=2)
        for index in range(2):
            first, *others = [piece for piece in pieces if piece.index == index]
            assert not any(piece.prompt_logprobs for piece in others)
            if index == 0:
                same(first.prompt_logprobs, expected)
            else:  # the prompt is the same: it is scored once
                assert not first.prompt_logprobs
    stepping.cancel()
    await asyncio.gather(stepping, return_exceptions=True)


async def test_a_prompt_that_lost_its_place_is_scored_again_and_sent_once(
    folder: Path, expected: torch.Tensor
) -> None:
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        block_size=4,
        num_blocks=26,
        max_step_tokens=3,
        threads=1,
    )
    engine = Engine(Runner(config), Tokenizer.from_folder(folder), None, config)
    stepping = asyncio.create_task(engine.run())
    older = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    await engine.submit(Generate(prompts=[[2, 9]], sampling=older), lambda event: None)
    first, *others = await ask(engine)
    same(first.prompt_logprobs, expected)
    assert not any(piece.prompt_logprobs for piece in others)
    assert engine.scheduler.counters.preempted > 0
    stepping.cancel()
    await asyncio.gather(stepping, return_exceptions=True)


@pytest.mark.parametrize("cut", CUTS)
async def test_a_prompt_is_scored_without_an_answer(
    folder: Path, expected: torch.Tensor, cut: str
) -> None:
    config = EngineConfig(model=str(folder), dtype="float32", kv_cache_bytes=4 << 20, threads=1)
    config = replace(config, max_model_len=len(PROMPT), **CUTS[cut])  # it fills the context
    engine = Engine(Runner(config), Tokenizer.from_folder(folder), None, config)
    stepping = asyncio.create_task(engine.run())
    for _ in range(2):
        (only,) = await ask(engine, sampling=replace(SAMPLING, max_tokens=0))
        same(only.prompt_logprobs, expected)
        assert (only.text, only.token_ids, only.finish_reason) == ("", [], "length")
    assert engine.scheduler.counters.generated_tokens == 0
    assert engine.scheduler.cache.in_use == 0
    stepping.cancel()
    await asyncio.gather(stepping, return_exceptions=True)


async def test_a_prompt_of_one_token_has_none(folder: Path) -> None:
    config = EngineConfig(model=str(folder), dtype="float32", kv_cache_bytes=4 << 20, threads=1)
    engine = Engine(Runner(config), Tokenizer.from_folder(folder), None, config)
    stepping = asyncio.create_task(engine.run())
    pieces = await ask(engine, prompt=[7])
    assert not any(piece.prompt_logprobs for piece in pieces)
    stepping.cancel()
    await asyncio.gather(stepping, return_exceptions=True)
