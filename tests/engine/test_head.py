"""Draws from the few logits that a screen leaves are those from all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from torch import Tensor

from forebay_engine import memory
from forebay_engine.config import EngineConfig
from forebay_engine.head import Head
from forebay_engine.runner import Runner
from forebay_engine.sampler import draw, sample
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import Row, StepPlan
from forebay_engine.watermark import Watermark
from forebay_kernels import cpu
from forebay_kernels.matrix import Dense, Int8

VOCAB, HIDDEN = 4096, 64
EOS = frozenset({0})


class Counting(Head):
    """Knows how often all logits were made."""

    def __init__(self, matrix: Dense) -> None:
        super().__init__(matrix)
        self.calls = 0

    def logits(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return self(hidden)


@pytest.fixture(autouse=True)
def screened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it pays on this machine or not."""
    monkeypatch.setattr("forebay_engine.head.screens", cpu.available)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = random(VOCAB, HIDDEN, seed=1).bfloat16()


def row(seed: int, draft: Sequence[int] = (), tokens: int = 9, **params: Any) -> Row:
    return Row(
        seq_id=seed,
        token_ids=list(range(5, 5 + tokens)),
        start=tokens - 1,
        count=1 + len(draft),
        block_tables=((0,),),
        sample=True,
        sampling=SamplingParams(seed=seed, **params),
        num_prompt=4,
        draft=tuple(draft),
    )


def hidden_of(rows: Sequence[Row]) -> Tensor:
    """Towards a few tokens, more or less; a draft's first token comes true for greedy rows."""
    towards = [token for row in rows for token in (*row.draft, 7 + row.seq_id % 3)]
    noise = random(len(towards), HIDDEN, seed=len(rows))
    return (WEIGHT[towards].float() + 0.4 * noise).bfloat16()


PLAIN: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 0.0, "ignore_eos": True, "stop_token_ids": (5,), "min_tokens": 5},
]
MORE: list[dict[str, Any]] = [
    {"logprobs": 0},
    {"temperature": 1e-40},
    {"top_k": 5},
    {"top_p": 0.9},
    {"min_p": 0.1},
    {"typical_p": 0.9},
    {"logit_bias": {3: 4.0}},
    {"allowed_token_ids": (3, 4)},
    {"bad_words": ((7,),)},
    {"frequency_penalty": 0.5},
    {"presence_penalty": 0.5},
    {"repetition_penalty": 1.3},
    {"min_tokens": 6},
    {"watermark": Watermark(key=bytes(32))},
]


def test_plain_rows_draw_the_same_without_all_logits() -> None:
    head = Counting(Dense(WEIGHT))
    for first in range(60):
        rows = [
            row(first + number, (11, 12, 13)[: number % 4], **PLAIN[(first + number) % len(PLAIN)])
            for number in range(5)
        ]
        hidden = hidden_of(rows)
        assert draw(head, hidden, rows, EOS) == sample(head(hidden), rows, EOS)
    assert head.calls == 0


@pytest.mark.parametrize("more", MORE, ids=lambda more: next(iter(more)))
def test_who_asks_more_gets_all_logits(more: dict[str, Any]) -> None:
    head = Counting(Dense(WEIGHT))
    rows = [row(1, temperature=0.0), row(2, **more)]
    hidden = hidden_of(rows)
    assert draw(head, hidden, rows, EOS) == sample(head(hidden), rows, EOS)
    assert head.calls == 1


def test_greedy_rows_have_nothing_to_truncate() -> None:
    head = Counting(Dense(WEIGHT))
    rows = [row(1, temperature=0.0, top_k=3, top_p=0.5, min_p=0.2, typical_p=0.4)]
    hidden = hidden_of(rows)
    assert draw(head, hidden, rows, EOS) == sample(head(hidden), rows, EOS)
    assert head.calls == 0


def test_only_large_plain_heads_have_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = hidden_of([row(1)])
    asked = ([0.0], [0])
    assert Head(Dense(WEIGHT)).shortlist(hidden, *asked) is not None
    assert Head(Dense(WEIGHT[:-1])).shortlist(hidden, *asked) is None
    assert Head(Dense(WEIGHT), softcap=30.0).shortlist(hidden, *asked) is None
    rounded = Int8(torch.ones(VOCAB, HIDDEN, dtype=torch.int8), torch.ones(VOCAB))
    assert Head(rounded).shortlist(hidden, *asked) is None
    monkeypatch.setattr("forebay_engine.head.screens", lambda weight: False)
    assert Head(Dense(WEIGHT)).shortlist(hidden, *asked) is None


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
def test_steps_of_a_model_draw_the_same(
    family: str, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(model=str(tiny_checkpoint(family)), kv_cache_bytes=4 << 20, threads=1)
    first = Runner(config)
    rows = [
        structs.replace(
            row(seed, (3,) * (seed % 3), tokens=9 + seed, **PLAIN[seed % len(PLAIN)]),
            start=0,
            count=9 + seed + seed % 3,
            block_tables=((seed,),) * len(first.cache_groups),
        )
        for seed in range(8)
    ]
    plain = first.execute(StepPlan(tuple(rows)))
    monkeypatch.setattr(memory, "_SCREENED", 0)
    monkeypatch.setattr("forebay_kernels.cpu.screen._SHARE", 1.0)
    runner = Runner(config)
    monkeypatch.setattr(runner._model, "logits", None)
    assert runner.execute(StepPlan(tuple(rows))) == plain
