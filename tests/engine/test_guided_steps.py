"""Grammars in real steps: beside other rows, behind guesses, through preemptions, to the end."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from msgspec import structs

from forebay_engine.config import EngineConfig
from forebay_engine.engine import Engine
from forebay_engine.guided import Grammars
from forebay_engine.runner import Runner
from forebay_engine.sampler import sample
from forebay_engine.sequence import FinishReason, SamplingParams
from forebay_engine.speculation import Guess
from forebay_engine.step import Row
from forebay_engine.tokenizer import Tokenizer
from forebay_engine.wire import Done, Event, Failed, Generate, GuideSpec, Output

SCHEMA = {
    "type": "object",
    "properties": {
        "word": {"type": "string", "maxLength": 6},
        "list": {"type": "array", "items": {"enum": ["the wheel", 12]}, "maxItems": 3},
    },
    "required": ["word", "list"],
    "additionalProperties": False,
}
GUIDES = [
    GuideSpec("json", json.dumps(SCHEMA)),
    GuideSpec("regex", "(the|and|[a-z]é){4,12}[.]"),
    GuideSpec("choice", '["the water falls", "the wheel turns"]'),
    None,
]
SHARED = [5 + (7 * i) % 370 for i in range(40)]
PROMPTS = [[2, 17, 200], SHARED, [300], SHARED[:33]]
DRAWN = SamplingParams(temperature=0.9, top_p=0.95, presence_penalty=0.3, max_tokens=24)


@dataclass
class Answers:
    """What the choices of one request came to."""

    tokens: list[list[int]]
    texts: list[str]
    reasons: list[FinishReason | None]
    failed: Failed | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def emit(self, event: Event) -> None:
        if isinstance(event, Output):
            self.tokens[event.index] += event.token_ids
            self.texts[event.index] += event.text
            self.reasons[event.index] = event.finish_reason
        if isinstance(event, Failed):
            self.failed = event
        if isinstance(event, Done | Failed):
            self.done.set()


async def answers(
    runner: Runner, config: EngineConfig, *asked: Generate
) -> tuple[list[Answers], Engine]:
    """All requests at once."""
    engine = Engine(runner, Tokenizer.from_folder(Path(config.model)), None, config)
    stepping = asyncio.create_task(engine.run())
    found = [Answers([[] for _ in range(a.n)], [""] * a.n, [None] * a.n) for a in asked]
    await asyncio.gather(*(engine.submit(a, to.emit) for a, to in zip(asked, found, strict=True)))
    ended = asyncio.gather(*(to.done.wait() for to in found))
    await asyncio.wait([stepping, ended], return_when=asyncio.FIRST_COMPLETED)
    if stepping.done():
        stepping.result()
    stepping.cancel()
    await asyncio.gather(stepping, return_exceptions=True)
    assert engine.scheduler.cache.in_use == 0
    engine.scheduler.check()
    return found, engine


def asked(sampling: SamplingParams = DRAWN, **more: Any) -> Generate:
    return Generate(**{"prompts": [[2, 17, 200]], "seed": 11, "sampling": sampling, **more})


MIXED = [asked(prompts=[prompt], guide=g) for prompt, g in zip(PROMPTS, GUIDES, strict=True)]


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Callable[[str], Path]) -> EngineConfig:
    folder = tiny_checkpoint("llama")
    return EngineConfig(
        model=str(folder), dtype="float32", block_size=4, num_blocks=64, max_model_len=64, threads=1
    )


@pytest.fixture(scope="module")
def runner(config: EngineConfig) -> Runner:
    return Runner(config)


class Oracle:
    """Guesses what the answers are known to be, and every fourth token something else."""

    def __init__(self, answers: list[list[int]]) -> None:
        self._answers = dict(zip(map(tuple, PROMPTS), answers, strict=True))

    def guess(self, row: Row, most: int) -> Guess:
        answer = self._answers[tuple(row.token_ids[: row.num_prompt])]
        at = len(row.token_ids) - row.num_prompt
        right = answer[at : at + most]
        return Guess(tuple(t ^ (n % 4 == 0) for n, t in enumerate(right, at)), 8)

    def forget(self, seq_id: int) -> None:
        pass


def check(found: list[Answers]) -> None:
    """Each answer is what was asked for, as far as it goes."""
    for answer, guide in zip(found, GUIDES, strict=True):
        (text,), (reason,) = answer.texts, answer.reasons
        if guide is not None and reason is FinishReason.STOP:
            if guide.kind == "json":
                jsonschema.validate(json.loads(text), SCHEMA)
            elif guide.kind == "regex":
                assert re.fullmatch(guide.source, text)
            else:
                assert text in json.loads(guide.source)


async def test_guided_tokens_do_not_depend_on_steps_neighbours_preemptions_or_guesses(
    config: EngineConfig, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sampling in (DRAWN, replace(DRAWN, temperature=0.0)):
        mixed = [
            Generate(prompts=a.prompts, guide=a.guide, seed=a.seed, sampling=sampling)
            for a in MIXED
        ]
        together, _ = await answers(runner, config, *mixed)
        check(together)
        tokens = [answer.tokens for answer in together]
        for number, one in enumerate(mixed):
            (alone,), _ = await answers(runner, config, one)
            assert alone.tokens == tokens[number]
        tight = replace(config, num_blocks=18, max_step_tokens=7)
        small = Runner(tight)
        found, engine = await answers(small, tight, *mixed)
        assert [answer.tokens for answer in found] == tokens
        assert engine.scheduler.counters.preempted > 0
        oracle = Oracle([answer[0] for answer in tokens])
        monkeypatch.setattr("forebay_engine.proposers.PromptLookup", lambda oracle=oracle: oracle)
        guessing = replace(tight, speculation="ngram", speculation_tokens=5, max_step_tokens=40)
        found, engine = await answers(small, guessing, *mixed)
        assert [answer.tokens for answer in found] == tokens
        counters = engine.scheduler.counters
        assert 5 < counters.accepted_tokens < counters.drafted_tokens


async def test_an_answer_ends_with_its_grammar_and_says_so(
    config: EngineConfig, runner: Runner
) -> None:
    choice = GuideSpec("choice", '["the water falls"]')
    (found,), _ = await answers(runner, config, asked(guide=choice))
    assert (found.texts, found.reasons) == (["the water falls"], [FinishReason.STOP])
    # No end token is among its tokens: the last one completed it.
    assert Tokenizer.from_folder(Path(config.model)).decode(found.tokens[0]) == found.texts[0]
    length = len(found.tokens[0])
    for most, reason in ((length, FinishReason.STOP), (length - 1, FinishReason.LENGTH)):
        sampling = replace(DRAWN, max_tokens=most, logprobs=1)
        (found,), _ = await answers(runner, config, asked(sampling, guide=choice))
        assert found.reasons == [reason]
        assert len(found.tokens[0]) == most


@pytest.mark.parametrize(
    "sampling",
    [
        {"min_tokens": 12},
        {"ignore_eos": True},
        {"logit_bias": {8: 5.0, 9: -5.0}, "repetition_penalty": 1.3},
        {"top_k": 1, "min_p": 0.2},
    ],
)
async def test_every_choice_keeps_to_the_grammar_whatever_else_is_asked(
    sampling: dict[str, Any], config: EngineConfig, runner: Runner
) -> None:
    guide = GuideSpec("regex", "(the|and|[a-z]é){4,8}[.]")
    (found,), _ = await answers(
        runner, config, asked(replace(DRAWN, max_tokens=50, **sampling), guide=guide, n=3)
    )
    assert all(re.fullmatch(guide.source, text) for text in found.texts)
    assert found.reasons == [FinishReason.STOP] * 3
    if "top_k" not in sampling:
        assert len(set(found.texts)) > 1


async def test_bans_that_leave_a_grammar_nothing_are_told(
    config: EngineConfig, runner: Runner
) -> None:
    letters = Tokenizer.from_folder(Path(config.model)).encode("x", special=False)
    only = replace(DRAWN, allowed_token_ids=tuple(letters))
    guide = GuideSpec("regex", "xy")
    (found,), _ = await answers(runner, config, asked(only, guide=guide))
    assert found.failed is not None
    assert "no token may come next" in found.failed.message


async def test_guided_draws_have_the_renormalised_distribution(config: EngineConfig) -> None:
    """Over both tokens of an answer, the second one behind a guess."""
    tokenizer = Tokenizer.from_folder(Path(config.model))
    vocab = 384
    texts = ["xq", "xj", "zq", "zk", "zj"]
    spelt = {text: tuple(tokenizer.encode(text, special=False)) for text in texts}
    assert {len(tokens) for tokens in spelt.values()} == {2}
    grammar = await Grammars(tokenizer, vocab, [1]).get(GuideSpec("choice", json.dumps(texts)))
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, vocab, generator=generator) * 1.5
    share = logits.double().softmax(-1).numpy()
    want = {}
    for text, (one, two) in spelt.items():
        firsts = {tokens[0] for tokens in spelt.values()}
        seconds = {tokens[1] for tokens in spelt.values() if tokens[0] == one}
        want[text] = share[0, one] / sum(share[0, t] for t in firsts)
        want[text] *= share[1, two] / sum(share[1, t] for t in seconds)
    count, seen = 800, dict.fromkeys(texts, 0)
    for seed in range(count):
        params = SamplingParams(seed=seed, max_tokens=2)
        guide = grammar.start(params)
        draft = (spelt["zq"][0],)
        row = Row(0, [2], 0, 2, ((0,),), True, params, 1, draft=draft, guide=guide)
        bits = np.unpackbits(guide.masks(draft).view(np.uint8), axis=1, bitorder="little")
        drawn = [
            item.token_id
            for item in sample(logits, [row], frozenset({1}), {0: torch.tensor(bits == 1)})
        ]
        if len(drawn) == 1:
            guide.take(drawn[0])
            bits = np.unpackbits(guide.masks(()).view(np.uint8), axis=1, bitorder="little")
            after = structs.replace(row, token_ids=[2, *drawn], draft=(), count=1)
            allowed = {0: torch.tensor(bits == 1)}
            drawn += [s.token_id for s in sample(logits[1:], [after], frozenset({1}), allowed)]
        seen[tokenizer.decode(drawn)] += 1
    statistic = sum((seen[t] - count * want[t]) ** 2 / (count * want[t]) for t in texts)
    assert statistic < 18.5  # 99.9 % of chi-square with 4 degrees of freedom
