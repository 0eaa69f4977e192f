"""What is drawn on the device is what the CPU's sampler draws, whatever is asked for."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch

from forebay_engine.gpu.sampling import edits, fill, mask, on_device, settings
from forebay_engine.sampler import Place, sample
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import NO_TOKEN, Row
from forebay_engine.watermark import Watermark
from forebay_kernels import reference
from forebay_kernels.gpu import sampling, watermark
from forebay_kernels.sampling import MOST_MARK_KEYS, NO_EDIT, Setting, Wants

EOS = frozenset({0, 1})
KEY = b"k" * 32
VOCAB = 300
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def some_params(random: Random) -> SamplingParams:
    """Each parameter at times, and so all together at times."""

    def at_times(share: float, **values: Any) -> dict[str, Any]:
        return values if random.random() < share else {}

    token = random.randrange
    temperature = random.choice([0.0, 0.3, 0.7, 1.0, 1.7])
    marks = [None, None, None, None, Watermark(key=KEY, context=4),
             Watermark(key=KEY, seeding="lefthash", context=2),
             Watermark(key=KEY, scheme="gumbel", context=1)]  # fmt: skip
    return SamplingParams(
        temperature=temperature,
        seed=random.getrandbits(64),
        watermark=random.choice(marks[:-1] if temperature == 0 else marks),
        **at_times(0.3, top_k=random.choice([1, 2, 20, 299, 400])),
        **at_times(0.3, top_p=random.choice([0.1, 0.5, 0.95])),
        **at_times(0.2, min_p=random.choice([0.01, 0.2])),
        **at_times(0.3, logit_bias={token(VOCAB): random.uniform(-5, 5) for _ in range(7)}),
        **at_times(0.2, allowed_token_ids=tuple(random.sample(range(VOCAB), token(1, 90)))),
        **at_times(0.2, bad_words=tuple((token(VOCAB),) for _ in range(3))),
        **at_times(0.2, min_tokens=token(12), stop_token_ids=(4, 5)),
        **at_times(0.3, repetition_penalty=random.choice([0.7, 1.3])),
        **at_times(0.3, presence_penalty=random.choice([-1.0, 0.7])),
        **at_times(0.3, frequency_penalty=random.choice([-0.3, 0.4])),
    )


def some_place(random: Random) -> Place:
    length = random.randrange(1, 30)
    tokens = [random.randrange(VOCAB) for _ in range(length)]
    allowed = None
    if random.random() < 0.2:
        allowed = torch.tensor([random.random() < 0.3 for _ in range(VOCAB)])
    return Place(tokens, random.randrange(length + 1), some_params(random), allowed)


def by_cpu(logits: torch.Tensor, places: list[Place]) -> list[int]:
    rows = [
        Row(
            seq_id=at, token_ids=place.token_ids, start=len(place.token_ids) - 1, count=1,
            block_tables=((0,),), sample=True, sampling=place.sampling,
            num_prompt=place.num_prompt,
        )
        for at, place in enumerate(places)
    ]  # fmt: skip
    allowed = {
        at: place.allowed[None] for at, place in enumerate(places) if place.allowed is not None
    }
    return [drawn.token_id for drawn in sample(logits.cpu(), rows, EOS, allowed)]


def some_logits(random: Random, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(random.getrandbits(32))
    logits = torch.randn((count, VOCAB), generator=generator) * random.choice([1, 3])
    return logits.to(random.choice([torch.float32, torch.bfloat16])).to(DEVICE)


@pytest.mark.parametrize("seed", range(3))
def test_the_reference_draws_the_same_tokens(seed: int) -> None:
    random = Random(seed)
    places = [some_place(random) for _ in range(700)]
    logits = some_logits(random, len(places))
    want = by_cpu(logits, places)
    assert len(set(want)) > 100
    assert reference.sample(logits, fill(places, EOS, VOCAB, DEVICE)).tokens.tolist() == want


def test_the_kernels_draw_the_same_tokens() -> None:
    random = Random(11)
    places = [some_place(random) for _ in range(24 if DEVICE.type == "cpu" else 4096)]
    logits = some_logits(random, len(places))
    rows = fill(places, EOS, VOCAB, DEVICE)
    assert sampling.sample(logits, rows).tokens.tolist() == by_cpu(logits, places)


@pytest.mark.parametrize("by", [reference.mark_keys, watermark.mark_keys])
def test_a_watermarks_keys_are_made_where_the_tokens_are(by: Any) -> None:
    """Of short, long and repeated contexts, and where too few are; padding is left alone."""

    def place(tokens: list[int], **mark: Any) -> Place:
        params = SamplingParams(watermark=Watermark(key=KEY, **mark) if mark else None)
        return Place(tokens, 2, params)

    long = list(range(100_000, 100_080))
    places = [
        place([7, 8, 9, 10, 250_000], context=3, seeding="lefthash"),
        place([7, 8, 9, 10, 11], context=2, seeding="selfhash"),
        place([7, 8, 9, 10, 11], context=4),
        place([7, 8, *long], context=33, seeding="lefthash"),
        place([7, 8, *long], context=64, scheme="gumbel"),
        place([7, 8, 5, 6, 9, 5, 6], context=2, scheme="gumbel"),
        place([7, 8, 5, 5, 5], context=2, scheme="gumbel"),
        place([5, 6, 9, 5, 6], context=2, scheme="gumbel"),
        place([7, 8, 9]),
        place([7, 8, 9, 10], context=1),
    ]
    want = fill(places, EOS, VOCAB, DEVICE)
    rows = replace(want, mark_keys=torch.full_like(want.mark_keys, -7),
                   mark_counts=torch.full_like(want.mark_counts, -7))  # fmt: skip
    rows.requests[9] = -1
    by(rows)
    assert want.mark_counts.tolist() == [1, 2, 0, 1, 1, 0, 0, 1, 0, 1]
    assert rows.mark_counts.tolist() == [1, 2, 0, 1, 1, 0, 0, 1, -7, -7]
    for row, count in enumerate(want.mark_counts.tolist()[:8]):
        assert torch.equal(rows.mark_keys[row, :count], want.mark_keys[row, :count])
        assert rows.mark_keys[row, count:].tolist() == [-7] * (MOST_MARK_KEYS - count)


def test_where_nothing_may_come_nothing_is_drawn() -> None:
    params = SamplingParams(allowed_token_ids=(7,), bad_words=((7,),))
    rows = fill([Place([3], 1, params)], EOS, VOCAB, DEVICE)
    assert reference.sample(torch.zeros((1, VOCAB)), rows).tokens.tolist() == [NO_TOKEN]


def test_lines_hold_what_was_asked() -> None:
    params = SamplingParams(
        seed=-1, top_k=5, min_p=0.5, logit_bias={9: 1.5}, bad_words=((2,),), min_tokens=3,
        stop_token_ids=(9,), logprobs=0, watermark=Watermark(key=KEY, gamma=0.5),
    )  # fmt: skip
    line = settings(params, num_prompt=4)
    assert line[Setting.SEED_LOW] == line[Setting.SEED_HIGH] == -1
    assert line.view("f4")[Setting.LOG_MIN_P] == pytest.approx(math.log(0.5))
    assert line[Setting.MARK_THRESHOLD] == 1 << 30
    assert Wants(int(line[Setting.WANTS])) == (
        Wants.EDITS | Wants.TRUNCATION | Wants.LOGPROB | Wants.GREEN_LIST | Wants.SELF_HASH
    )
    ids, values, until = edits(params, 4, EOS, 8)
    assert ids.tolist() == [0, 1, 2, 9, 9, *[NO_EDIT] * 3]
    assert values.view("f4")[:5].tolist() == [-math.inf] * 4 + [1.5]
    assert until[:5].tolist() == [7, 7, NO_EDIT, 7, NO_EDIT]
    with pytest.raises(ValueError, match="edits: 5 do not fit into 4"):
        edits(params, 4, EOS, 4)
    assert mask(params, None, 40) is None
    assert Wants(int(settings(SamplingParams(temperature=0, top_p=0.5), 1)[0])) == 0


@pytest.mark.parametrize("params", [{"typical_p": 0.9}, {"bad_words": ((1, 2),)}])
def test_what_the_kernels_can_not_do_is_refused(params: dict[str, Any]) -> None:
    place = Place([3], 1, SamplingParams(**params))
    assert not on_device(place.sampling)
    with pytest.raises(ValueError, match="typical_p and bad_words of several tokens"):
        fill([place], EOS, VOCAB, DEVICE)
