"""Draws from logits as a step brings them: bf16, of the vocabularies of three families.

The logits are normal with a standard deviation of 2, which is flat beside those of a trained model:
most tiles need their noise, and top-p alone the longest way to its limit. ``bytes`` is one read of
the logits; drawing with limits reads them three times, all but the first from L2 where it holds
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from cases import Case, Make
from torch import Tensor

from forebay_engine.gpu.sampling import fill, wants
from forebay_engine.sampler import Place
from forebay_engine.sequence import SamplingParams
from forebay_kernels import reference
from forebay_kernels.gpu.sampling import sample
from forebay_kernels.sampling import Wants

_VOCABS = (128_256, 151_936, 262_144)
_ROWS = (1, 64, 256)
#: What each request asks for, and the share of the copy ceiling that is the goal with 256 rows.
_KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "greedy": ({"temperature": 0.0}, 0.7),
    "temperature": ({"temperature": 0.8}, 0.25),
    "top-k 20, top-p 0.95": ({"temperature": 0.8, "top_k": 20, "top_p": 0.95}, 0.1),
    "top-p 0.95 alone": ({"temperature": 0.8, "top_p": 0.95}, 0.01),
    "penalties, bias": (
        {"temperature": 0.8, "repetition_penalty": 1.1, "logit_bias": {5: 1.0, 90: -2.0}},
        0.1,
    ),
}


def cases(device: torch.device, small: bool) -> Iterator[Make]:
    for vocab in (300,) if small else _VOCABS:
        for count in (2,) if small else _ROWS:
            for kind in _KINDS:
                yield partial(_case, device, vocab, count, kind)


def _case(device: torch.device, vocab: int, count: int, kind: str) -> Case:
    asked, goal = _KINDS[kind]
    random = torch.Generator(device).manual_seed(count)
    logits = torch.randn((count, vocab), generator=random, device=device) * 2
    params = [SamplingParams(seed=seed, **asked) for seed in range(count)]
    run, expected = _runs(logits.bfloat16(), params)
    return Case(
        name=f"sample: {kind}, {count} rows of {vocab}",
        run=run,
        reference=expected,
        tolerance=0.0,
        bytes=2 * logits.numel() + 8 * count,
        goal=goal if count == 256 else None,
    )


def _runs(
    logits: Tensor, params: list[SamplingParams]
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """By the kernels, and by the reference."""
    places = [Place([5, 7, 90, 7], 2, each) for each in params]
    rows = fill(places, frozenset(), logits.shape[1], logits.device)
    asked = Wants(0)
    for each in params:
        asked |= wants(each)
    return (
        lambda: sample(logits, rows, asked).tokens,
        lambda: reference.sample(logits, rows, asked).tokens,
    )
