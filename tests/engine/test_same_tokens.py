"""The engine's greedy tokens are transformers', however the work is cut, cached or preempted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from forebay_engine.acceptance import Guess
from forebay_engine.config import EngineConfig
from forebay_engine.engine import Engine
from forebay_engine.runner import Runner
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import Row
from forebay_engine.tokenizer import Tokenizer
from forebay_engine.wire import Done, Event, Generate, Output

ANSWER = 24
#: Three share a prefix of 40 tokens; one is longer than a sliding window of 16.
SHARED = [5 + (7 * i) % 370 for i in range(40)]
PROMPTS = [[2, 17, 200], SHARED, [*SHARED, 9, 8, 7], [*SHARED, 9, 9], [300], SHARED[:33]]

CUTS = {
    "plain": {},
    "token by token": {"max_step_tokens": 1, "max_sequences": 1},
    "small chunks": {"max_step_tokens": 7},
    "one a page": {"block_size": 1, "num_blocks": 600},
    "odd pages": {"block_size": 5, "max_step_tokens": 23},
    "no prefix cache": {"prefix_cache": False, "max_step_tokens": 16},
    "two at once": {"max_sequences": 2},
    # 67 tokens are the longest: 17 of 20 pages for one, so that the others must give way.
    "preempted": {"block_size": 4, "num_blocks": 20},
}


async def answers(
    runner: Runner, config: EngineConfig, prompts: list[list[int]], sampling: SamplingParams
) -> tuple[list[list[int]], Engine]:
    """The answers' tokens, all prompts at once, twice: the second time with a filled cache."""
    engine = Engine(runner, Tokenizer.from_folder(Path(config.model)), None, config)
    stepping = asyncio.create_task(engine.run())
    first, second = [await _round(engine, stepping, prompts, sampling) for _ in range(2)]
    assert first == second
    stepping.cancel()
    await asyncio.gather(stepping, return_exceptions=True)
    engine.scheduler.check()
    assert engine.scheduler.cache.in_use == 0
    return first, engine


async def _round(
    engine: Engine, stepping: asyncio.Task[None], prompts: list[list[int]], sampling: SamplingParams
) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    done = asyncio.Event()

    def emit(event: Event) -> None:
        if isinstance(event, Output):
            found[event.index] += event.token_ids
        if isinstance(event, Done):
            done.set()

    await engine.submit(Generate(prompts=list(prompts), seed=11, sampling=sampling), emit)
    ended = asyncio.create_task(done.wait())
    await asyncio.wait([stepping, ended], return_when=asyncio.FIRST_COMPLETED)
    if stepping.done():
        stepping.result()
    return found


def greedy_by_transformers(folder: Path) -> list[list[int]]:
    import transformers as hf

    model: Any = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return [
        model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=ANSWER,
            min_new_tokens=ANSWER,
            do_sample=False,
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]


Reference = Callable[[str], tuple[Path, list[list[int]]]]


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Callable[[str], Path]) -> Reference:
    """``reference(family)``: its checkpoint and transformers' answers to PROMPTS."""

    @cache
    def get(family: str) -> tuple[Path, list[list[int]]]:
        folder = tiny_checkpoint(family)
        return folder, greedy_by_transformers(folder)

    return get


#: The last three are run by transformers' classes.
OTHERS = ["gemma2", "phi3", "gpt2", "opt", "mixtral", "qwen3-moe", "granite", "cohere2", "gpt-oss"]
#: Every cut for two families, and for the others those in which most happens.
CASES = [(family, cut) for family in ("llama", "gemma3") for cut in CUTS] + [
    (family, cut)
    for family in ("gemma2", "phi3", "gpt2", "opt")
    for cut in ("odd pages", "preempted")
]


@pytest.mark.parametrize(("family", "cut"), CASES)
async def test_greedy_tokens_are_those_of_transformers(
    family: str, cut: str, reference: Reference
) -> None:
    folder, expected = reference(family)
    config = replace(
        # 80 tokens fit every cut, and are within the context that phi3's short factors are for.
        EngineConfig(model=str(folder), max_model_len=80, kv_cache_bytes=4 << 20, threads=1),
        **CUTS[cut],  # type: ignore[arg-type] # one value may be of each field's type
    )
    # min_tokens keeps the end token away, as min_new_tokens does there.
    sampling = SamplingParams(temperature=0.0, max_tokens=ANSWER, min_tokens=ANSWER)
    runner = Runner(config)
    found, engine = await answers(runner, config, PROMPTS, sampling)
    assert found == expected
    counters = engine.scheduler.counters
    assert (counters.preempted > 0) == (cut == "preempted")
    assert (counters.cached_tokens > 0) == config.prefix_cache


async def test_a_drawn_text_does_not_depend_on_its_neighbours(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    config = EngineConfig(
        model=str(tiny_checkpoint("qwen3")), dtype="float32", kv_cache_bytes=4 << 20, threads=1
    )
    sampling = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=ANSWER, ignore_eos=True)
    runner = Runner(config)
    together, _ = await answers(runner, config, PROMPTS, sampling)
    (alone,), _ = await answers(runner, config, PROMPTS[:1], sampling)
    assert together[0] == alone
    small = replace(config, max_step_tokens=3)
    cut, _ = await answers(runner, small, PROMPTS, sampling)
    assert cut == together


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
async def test_choices_priorities_and_neighbours_change_no_token(
    family: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    """Three choices each of prompts of many lengths, one more urgent than the other."""
    config = EngineConfig(
        model=str(tiny_checkpoint(family)),
        dtype="float32",
        max_model_len=72,
        kv_cache_bytes=4 << 20,
        threads=1,
    )
    sampling = SamplingParams(temperature=0.9, top_p=0.95, max_tokens=12, ignore_eos=True)
    prompts = [[2, 17, 200], SHARED, [*SHARED, 9, 8, 7], SHARED[:33]]
    cuts: list[dict[str, Any]] = [
        {},
        {"max_sequences": 1},
        {"prefix_cache": False, "block_size": 4, "max_step_tokens": 9},
        {"block_size": 8, "num_blocks": 9},
        {"block_size": 3, "num_blocks": 24, "prefix_cache": False},
    ]
    runners = [Runner(replace(config, **cut)) for cut in cuts]
    found = [
        await chosen(runner, replace(config, **cut), prompts, sampling)
        for runner, cut in zip(runners, cuts, strict=True)
    ]
    assert len({tokens for choices in found[0] for tokens in choices}) == 3 * len(prompts)
    assert found == [found[0]] * len(cuts)


async def chosen(
    runner: Runner, config: EngineConfig, prompts: list[list[int]], sampling: SamplingParams
) -> list[list[tuple[int, ...]]]:
    """Of each prompt, its three choices."""
    engine = Engine(runner, Tokenizer.from_folder(Path(config.model)), None, config)
    stepping = asyncio.create_task(engine.run())

    async def ask(number: int, prompt: list[int]) -> list[tuple[int, ...]]:
        found: list[list[int]] = [[], [], []]
        done = asyncio.Event()

        def emit(event: Event) -> None:
            if isinstance(event, Output):
                found[event.index] += event.token_ids
            if isinstance(event, Done):
                done.set()

        command = Generate(
            prompts=[prompt], n=3, seed=number, sampling=sampling, priority=-number % 3
        )
        await engine.submit(command, emit)
        await done.wait()
        return [tuple(tokens) for tokens in found]

    try:
        asked = asyncio.gather(*(ask(*item) for item in enumerate(prompts)))
        await asyncio.wait([stepping, asked], return_when=asyncio.FIRST_COMPLETED)
        return asked.result()
    finally:
        stepping.cancel()
        await asyncio.gather(stepping, return_exceptions=True)
        engine.scheduler.check()


class Oracle:
    """Guesses what the answers are known to be, and every fourth token something else."""

    def __init__(self, prompts: list[list[int]], answers: list[list[int]]) -> None:
        self._answers = dict(zip(map(tuple, prompts), answers, strict=True))

    def guess(self, row: Row, most: int) -> Guess:
        answer = self._answers[tuple(row.token_ids[: row.num_prompt])]
        spoken = len(row.token_ids) - row.num_prompt
        return Guess(tuple(answer[at] ^ (at % 4 == 0) for at in range(spoken, spoken + most)), 8)

    def forget(self, seq_id: int) -> None:
        pass


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gemma2", "phi3", "gpt2", "opt"]
)
async def test_guesses_change_no_token(
    family: str, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right ones and wrong ones, across page borders, in a cache that is too small for all."""
    config = EngineConfig(
        model=str(tiny_checkpoint(family)),
        dtype="float32",
        max_model_len=64,
        block_size=4,
        num_blocks=18,
        threads=1,
    )
    prompts = [[2, 17, 200], SHARED, [300], SHARED[:33]]
    greedy = SamplingParams(temperature=0.0, max_tokens=16, min_tokens=16)
    drawn = SamplingParams(
        temperature=0.8,
        top_p=0.9,
        presence_penalty=0.5,
        repetition_penalty=1.2,
        max_tokens=16,
        ignore_eos=True,
    )
    runner = Runner(config)
    for sampling in (greedy, drawn):
        without, _ = await answers(runner, config, prompts, sampling)
        oracle = Oracle(prompts, without)
        monkeypatch.setattr("forebay_engine.proposers.PromptLookup", lambda oracle=oracle: oracle)
        guessing = replace(config, speculation="ngram", speculation_tokens=5)
        found, engine = await answers(runner, guessing, prompts, sampling)
        assert found == without
        counters = engine.scheduler.counters
        assert 20 < counters.accepted_tokens < counters.drafted_tokens
        # Where every layer slides, pages come back before they run out.
        assert counters.preempted > 0 or family in ("mistral", "phi3")


#: Target, draft: of different windows, heads and depths; and the model as its own draft.
DRAFTS = [("llama", "gemma3"), ("gemma3", "qwen3"), ("mistral", "mistral"), ("gpt2", "gpt2")]


@pytest.mark.parametrize(("family", "draft"), DRAFTS)
async def test_a_draft_model_changes_no_token(
    family: str, draft: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    """With a prefix cache whose hits must have the draft model's keys and values as well."""
    plain = EngineConfig(
        model=str(tiny_checkpoint(family)),
        dtype="float32",
        max_model_len=64,
        block_size=4,
        num_blocks=24,
        threads=1,
    )
    guessing = replace(plain, speculation=str(tiny_checkpoint(draft)), speculation_tokens=3)
    prompts = [[2, 17, 200], SHARED, [300], SHARED[:33]]
    greedy = SamplingParams(temperature=0.0, max_tokens=16, min_tokens=16)
    drawn = SamplingParams(
        temperature=0.8, top_p=0.9, presence_penalty=0.5, max_tokens=16, ignore_eos=True
    )
    runner, drafting = Runner(plain), Runner(guessing)
    for sampling in (greedy, drawn):
        without, _ = await answers(runner, plain, prompts, sampling)
        found, engine = await answers(drafting, guessing, prompts, sampling)
        assert found == without
        counters = engine.scheduler.counters
        assert counters.drafted_tokens > 0
        assert counters.cached_tokens > 0
        # The same model draws with the same noise: what it guesses is what comes.
        assert (counters.accepted_tokens == counters.drafted_tokens) == (family == draft)
