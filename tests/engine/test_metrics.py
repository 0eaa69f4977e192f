"""What the engine measures of the times between tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from forebay_engine.detokenizer import Detokenizer, StopStrings
from forebay_engine.metrics import Metrics
from forebay_engine.request import Choice, Request
from forebay_engine.sequence import SamplingParams, Sequence
from forebay_engine.tokenizer import Tokenizer
from forebay_engine.wire import Generate

TOKENIZER = Tokenizer.from_folder(Path(__file__).parents[1] / "fakes" / "engine_model")


def test_each_token_of_each_choice_counts_with_its_share_of_the_time() -> None:
    request = Request(Generate(prompts=[[1]]), print, 1, submitted=10.0)
    one, other, two = (
        Choice(
            request,
            index,
            Sequence(index, [1], SamplingParams()),
            Detokenizer(TOKENIZER.decode, [1]),
            StopStrings(()),
        )
        for index in range(3)
    )
    metrics = Metrics()
    metrics.tokens([(one, 1), (other, 1), (two, 1)], 10.5)
    # The third's guesses came true: two tokens in the time of one.
    metrics.tokens([(one, 1), (other, 1), (two, 2)], 10.6)
    first, between = (
        metrics.read()[name]
        for name in ("time_to_first_token_seconds", "inter_token_latency_seconds")
    )
    assert (sum(first.counts), first.sum) == (1, pytest.approx(0.5))
    assert (sum(between.counts), between.sum) == (4, pytest.approx(0.3))
