"""The sampler: exact distributions, each processor against a numpy oracle, no batch in sight."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from msgspec import structs

from forebay_engine.logits import largest
from forebay_engine.noise import gumbel, position_key, token_bits
from forebay_engine.sampler import sample
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import NO_TOKEN, Row, Sampled

Floats = npt.NDArray[np.float64]

EOS = frozenset({0})


def row(tokens: list[int] | None = None, num_prompt: int = 1, **params: Any) -> Row:
    tokens = [3] if tokens is None else tokens
    return Row(
        seq_id=7,
        token_ids=tokens,
        start=len(tokens) - 1,
        count=1,
        block_tables=((0,),),
        sample=True,
        sampling=SamplingParams(**params),
        num_prompt=num_prompt,
    )


def draw(logits: Floats, asked: Row) -> Sampled:
    return sample(torch.tensor(logits, dtype=torch.float32)[None], [asked], EOS)[0]


def softmax(x: Floats) -> Floats:
    e = np.exp(x - x.max())
    found: Floats = e / e.sum()
    return found


def draws(logits: Floats, count: int, **params: Any) -> Floats:
    """How often each token came over ``count`` seeds, as a share."""
    many = torch.tensor(logits, dtype=torch.float32).expand(count, -1)
    rows = [row(seed=seed, **params) for seed in range(count)]
    seen = Counter(s.token_id for s in sample(many, rows, EOS))
    return np.array([seen[token] for token in range(len(logits))]) / count


def chi_square(shares: Floats, want: Floats, count: int) -> float:
    """The statistic over tokens that can come; those that can't must not."""
    assert not shares[want == 0].any()
    possible = want > 0
    difference = (shares - want)[possible] ** 2 / want[possible]
    return float(count * difference.sum())


LOGITS = np.array([1.0, 0.2, -0.5, 2.0, 0.9, -3.0, 1.4, 0.0])


def quantile(free: int) -> float:
    """99.9 % of chi-square with so many degrees of freedom (Wilson and Hilferty 1931)."""
    return free * (1 - 2 / (9 * free) + 3.09 * math.sqrt(2 / (9 * free))) ** 3 if free else 1e-9


def truncated(params: dict[str, Any], logits: Floats = LOGITS) -> Floats:
    """The oracle: temperature, top-k, top-p, min-p, typical, one after another, by sorting."""
    logits = logits / params.get("temperature", 1.0)
    order = np.argsort(-logits)
    keep = order[: params.get("top_k") or len(logits)]
    before = np.cumsum(softmax(logits[keep])) - softmax(logits[keep])
    keep = keep[before < params.get("top_p", 1.0)]
    keep = keep[np.exp(logits[keep] - logits.max()) >= params.get("min_p", 0.0)]
    if "typical_p" in params:
        p = softmax(logits[keep])
        p, keep = p[p > 0], keep[p > 0]
        entropy = -(p * np.log(p)).sum()
        order = np.argsort(np.abs(-np.log(p) - entropy))
        mass = np.cumsum(p[order]) - p[order]
        keep = keep[order[mass < params["typical_p"]]]
    want = np.zeros(len(logits))
    want[keep] = softmax(logits[keep])
    return want


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 3},
        {"top_k": 100},
        {"top_p": 0.8},
        {"min_p": 0.3},
        {"temperature": 1.7, "top_k": 6, "top_p": 0.9, "min_p": 0.25},
        {"top_k": 5, "top_p": 0.7},
        {"typical_p": 0.5},
        {"typical_p": 0.9, "temperature": 1.4},
        {"typical_p": 0.4, "top_k": 6, "top_p": 0.95},
    ],
)
def test_draws_have_the_distribution_that_is_asked(params: dict[str, Any]) -> None:
    want, count = truncated(params), 2000
    kept = int((want > 0).sum())
    assert chi_square(draws(LOGITS, count, **params), want, count) < quantile(kept - 1)


def test_neighbouring_positions_are_drawn_independently() -> None:
    """The joint distribution of two positions of one seed, 64 cells."""
    count, want = 4000, softmax(LOGITS)
    logits = torch.tensor(LOGITS, dtype=torch.float32).expand(count, -1)
    first = sample(logits, [row([3], seed=seed) for seed in range(count)], EOS)
    second = sample(logits, [row([3, 1], seed=seed) for seed in range(count)], EOS)
    joint = np.zeros((8, 8))
    for a, b in zip(first, second, strict=True):
        joint[a.token_id, b.token_id] += 1 / count
    assert chi_square(joint, np.outer(want, want), count) < 103.4  # 63 degrees, 99.9 %


def test_top_p_beyond_the_likeliest_thousand() -> None:
    """A flat vocabulary makes the sampler sort all of it."""
    logits = np.linspace(0.0, 1e-3, 3000)
    drawn = {draw(logits, row(top_p=0.5, seed=seed)).token_id for seed in range(300)}
    assert min(drawn) >= 1499
    assert max(drawn) > 2900


@pytest.mark.parametrize(("params", "kept"), [({"top_p": 0.0}, 1), ({"top_k": 1}, 1)])
def test_the_likeliest_token_is_always_kept(params: dict[str, Any], kept: int) -> None:
    drawn = {draw(LOGITS, row(seed=seed, **params)).token_id for seed in range(50)}
    assert drawn == {3}


def test_ties_at_a_limit_are_all_kept() -> None:
    logits = np.array([0.0, 1.0, 1.0, 1.0, -1.0])
    drawn = {draw(logits, row(top_k=2, seed=seed)).token_id for seed in range(100)}
    assert drawn == {1, 2, 3}


def test_greedy_takes_the_likeliest_whatever_the_seed() -> None:
    assert {draw(LOGITS, row(temperature=0.0, seed=s)).token_id for s in range(20)} == {3}


def test_a_draw_does_not_depend_on_the_batch() -> None:
    random = np.random.default_rng(0)
    logits = torch.tensor(random.standard_normal((6, 500)), dtype=torch.float32)
    rows = [
        row(seed=4),
        row(temperature=0.0),
        row(top_p=0.7, seed=9),
        row([3, 5, 5], frequency_penalty=1.0, seed=1),
        row(min_p=0.1, seed=9, logprobs=3),
        row(top_k=12, seed=2),
    ]
    alone = [sample(logits[i : i + 1], rows[i : i + 1], EOS)[0] for i in range(6)]
    assert list(sample(logits, rows, EOS)) == alone
    mirrored = sample(logits.flip(0), rows[::-1], EOS)
    assert list(mirrored[::-1]) == alone


def test_seed_and_position_change_the_draw() -> None:
    flat = np.zeros(1000)
    by_seed = {draw(flat, row(seed=seed)).token_id for seed in range(50)}
    by_position = {draw(flat, row([3] * n, seed=1)).token_id for n in range(1, 51)}
    assert len(by_seed) > 40
    assert len(by_position) > 40
    assert draw(flat, row(seed=-3)) == draw(flat, row(seed=-3))


def test_sampling_leaves_the_logits_alone() -> None:
    logits = torch.tensor(LOGITS, dtype=torch.float32)[None]
    before = logits.clone()
    sample(logits, [row(repetition_penalty=2.0, min_tokens=5, temperature=0.3, top_k=2)], EOS)
    assert torch.equal(logits, before)


def penalised(
    tokens: list[int], num_prompt: int, params: dict[str, float], logits: Floats = LOGITS
) -> Floats:
    logits = logits.copy()
    repetition = params.get("repetition_penalty", 1.0)
    for token in set(tokens):
        logits[token] = (
            logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
        )
    for token, times in Counter(tokens[num_prompt:]).items():
        logits[token] -= params.get("frequency_penalty", 0.0) * times
        logits[token] -= params.get("presence_penalty", 0.0)
    return logits


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.8},
        {"frequency_penalty": 0.6},
        {"presence_penalty": 1.5},
        {"presence_penalty": -0.7},
        {"repetition_penalty": 0.5, "frequency_penalty": 0.4, "presence_penalty": 0.2},
    ],
)
@pytest.mark.parametrize("tokens", [[3, 3, 2], [3, 6, 6, 6, 2, 5], [5, 1, 3, 3, 0, 4]])
def test_penalties(params: dict[str, float], tokens: list[int]) -> None:
    want = softmax(penalised(tokens, 2, params))
    shares = draws(LOGITS, 1500, tokens=tokens, num_prompt=2, **params)
    assert chi_square(shares, want, 1500) < quantile(7)
    greedy = draw(LOGITS, row(tokens, 2, temperature=0.0, **params)).token_id
    assert greedy == int(want.argmax())


@pytest.mark.parametrize(
    ("tokens", "params", "banned"),
    [
        ([3, 1], {"min_tokens": 3, "stop_token_ids": (6, 3)}, {0, 6, 3}),
        ([3, 1, 1, 1], {"min_tokens": 3, "stop_token_ids": (6,)}, set()),
        ([3], {"min_tokens": 1, "ignore_eos": True, "stop_token_ids": (3,)}, {3}),
        ([3], {"min_tokens": 1}, {0}),
    ],
)
def test_no_stop_token_before_min_tokens(
    tokens: list[int], params: dict[str, Any], banned: set[int]
) -> None:
    shares = draws(np.zeros(8), 400, tokens=tokens, **params)
    assert {token for token in range(8) if shares[token] == 0} == banned
    greedy = draw(LOGITS, row(tokens, temperature=0.0, **params)).token_id
    assert greedy not in banned


def shaped(tokens: list[int], num_prompt: int, params: dict[str, Any]) -> Floats:
    """The oracle of everything: probabilities after ``tokens``, in the documented order."""
    logits = LOGITS.copy()
    if "allowed_token_ids" in params:
        logits[[t for t in range(8) if t not in params["allowed_token_ids"]]] = -np.inf
    for word in params.get("bad_words", ()):
        if len(word) == 1 or tokens[-(len(word) - 1) :] == list(word[:-1]):
            logits[word[-1]] = -np.inf
    if len(tokens) - num_prompt < params.get("min_tokens", 0):
        logits[[0, *params.get("stop_token_ids", ())]] = -np.inf
    for token, value in params.get("logit_bias", {}).items():
        logits[token] += value
    return truncated(params, penalised(tokens, num_prompt, params, logits))


EVERYTHING: dict[str, Any] = {
    "temperature": 1.3,
    "bad_words": ((2, 3, 6), (5, 1), (4,)),
    "allowed_token_ids": (0, 1, 2, 3, 4, 6),
    "logit_bias": {1: 2.0, 3: -1.0},
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.3,
    "presence_penalty": -0.4,
    "min_tokens": 2,
    "top_p": 0.93,
}


@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": {1: 1.5, 5: 4.0, 3: -100.0}},
        {"allowed_token_ids": (5, 2, 0)},
        {"bad_words": ((4,), (2, 3, 6), (3, 6))},
        {"bad_words": ((2, 3, 2, 3, 7), (3, 3), (1, 2, 3, 5))},
        {"allowed_token_ids": (5, 2, 0), "min_tokens": 9, "top_k": 3},
        EVERYTHING,
    ],
)
def test_biases_bans_and_their_combinations(params: dict[str, Any]) -> None:
    tokens = [1, 2, 3]
    want = shaped(tokens, 2, params)
    shares = draws(LOGITS, 1500, tokens=tokens, num_prompt=2, **params)
    assert chi_square(shares, want, 1500) < quantile(int((want > 0).sum()) - 1)
    greedy = draw(LOGITS, row(tokens, 2, **{**params, "temperature": 0.0})).token_id
    assert greedy == int(want.argmax())


@pytest.mark.parametrize("masked", [False, True])
def test_with_guesses_two_places_have_the_joint_distribution_of_two_draws(masked: bool) -> None:
    """The second place sees the first one's token in penalties, bad words and length."""
    count, guess, mask = 2000, 1, np.ones(8, dtype=bool)
    if masked:
        mask[[2, 6]] = False
    ban = {"allowed_token_ids": tuple(t for t in EVERYTHING["allowed_token_ids"] if mask[t])}
    params = {**EVERYTHING, **ban}
    first = shaped([2], 1, params)
    want = np.array([first[t] * shaped([2, t], 1, params) for t in range(8)])
    allowed = {7: torch.tensor(mask).expand(2, -1)} if masked else {}
    logits = torch.tensor(LOGITS, dtype=torch.float32).expand(2, -1)
    joint, accepted = np.zeros((8, 8)), 0
    for seed in range(count):
        asked = structs.replace(row([2], seed=seed, **EVERYTHING), count=2, draft=(guess,))
        got = [s.token_id for s in sample(logits, [asked], EOS, allowed)]
        accepted += len(got) == 2
        if len(got) == 1:
            then = row([2, *got], seed=seed, **EVERYTHING)
            got += [s.token_id for s in sample(logits[1:], [then], EOS, allowed)]
        joint[got[0], got[1]] += 1 / count
    cells = int((want > 0).sum())
    assert 0.2 * count < accepted < 0.9 * count
    assert chi_square(joint, want, count) < quantile(cells - 1)


def test_where_no_token_may_come_none_is_drawn() -> None:
    nothing = torch.zeros(1, 8, dtype=torch.bool)
    logits = torch.tensor(LOGITS, dtype=torch.float32)[None]
    for params in ({}, {"temperature": 0.0}, {"top_p": 0.5, "top_k": 2}, {"typical_p": 0.5}):
        assert sample(logits, [row(**params)], EOS, {7: nothing}) == (Sampled(7, NO_TOKEN),)
    dead = row([3, 5], allowed_token_ids=(2,), bad_words=((5, 2),), logprobs=2, top_p=0.5)
    assert sample(logits, [dead], EOS) == (Sampled(7, NO_TOKEN),)
    # A guess behind it is never taken.
    drafted = structs.replace(dead, count=2, draft=(2,))
    assert sample(logits.expand(2, -1), [drafted], EOS) == (Sampled(7, NO_TOKEN),)


@pytest.mark.parametrize("spread", [0.5, 4.0, 12.0])
def test_a_draw_from_many_is_that_with_noise_on_every_token(spread: float) -> None:
    """What is spared never changes which token wins."""
    random = np.random.default_rng(1)
    logits = torch.tensor(random.standard_normal((40, 30_011)) * spread, dtype=torch.float32)
    for seed, at in enumerate(logits):
        noise = gumbel(position_key(seed, 1), torch.arange(30_011))
        assert sample(at[None], [row(seed=seed)], EOS)[0].token_id == int((at + noise).argmax())


@pytest.mark.parametrize("size", [7, 255, 1000, 20_000])
@pytest.mark.parametrize("count", [1, 3, 60])
def test_the_largest_are_topks(size: int, count: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)).round(decimals=1)
    want, ids = values.topk(min(count, size)), largest(values, count)
    assert torch.equal(ids[0], want.values)
    assert torch.equal(values[ids[1]], want.values)
    assert len(set(ids[1].tolist())) == min(count, size)


def test_logprobs_are_the_models_own() -> None:
    """Neither temperature nor penalties nor truncation shows in them."""
    asked = row([3, 3], temperature=0.2, presence_penalty=2.0, top_k=2, logprobs=3, seed=5)
    got = draw(LOGITS, asked)
    want = np.log(softmax(LOGITS))
    assert got.logprob == pytest.approx(want[got.token_id], abs=1e-6)
    assert [token for token, _ in got.top] == [3, 6, 0]
    for token, logprob in got.top:
        assert logprob == pytest.approx(want[token], abs=1e-6)


@pytest.mark.parametrize(("asked", "count"), [(None, None), (0, 0), (2, 2), (50, 8)])
def test_as_many_logprobs_as_asked(asked: int | None, count: int | None) -> None:
    got = draw(LOGITS, row(logprobs=asked))
    assert (None if got.logprob is None else len(got.top)) == count


def test_guesses_are_taken_while_they_are_what_would_be_drawn() -> None:
    """Each place draws as if the guesses before it had been drawn one by one."""
    params: dict[str, Any] = {"seed": 3, "temperature": 1.3, "presence_penalty": 1.5}
    logits = np.stack([LOGITS, LOGITS[::-1], LOGITS * 2, LOGITS])
    alone = [3]
    for place in logits:
        alone.append(draw(place, row(list(alone), **params)).token_id)
    many = torch.tensor(logits, dtype=torch.float32)
    true, false = alone[1:], (alone[3] + 1) % len(LOGITS)
    for draft, come in [(true[:3], 4), ([*true[:2], false], 3), ([false, *true[1:3]], 1)]:
        asked = structs.replace(row([3], **params), count=4, draft=tuple(draft))
        got = [s.token_id for s in sample(many[: 1 + len(draft)], [asked], EOS)]
        assert got == true[:come]


def test_only_what_a_guide_allows_is_drawn_at_each_place() -> None:
    allowed = torch.zeros(2, 8, dtype=torch.bool)
    allowed[0, 5] = allowed[1, 1] = True
    many = torch.tensor(LOGITS, dtype=torch.float32).expand(2, -1)
    for params in ({"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.5}):
        asked = structs.replace(row(**params), count=2, draft=(5,))
        assert [s.token_id for s in sample(many, [asked], EOS, {7: allowed})] == [5, 1]


def mixed_in_numpy(seed: int, position: int, ids: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """The noise's hash in unsigned arithmetic, which torch's int32 has to reproduce."""

    def mix(z: int) -> int:
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    key = mix(mix(seed % 2**64) ^ position)
    x: npt.NDArray[Any] = ids ^ np.uint32(key % 2**32)
    x = (x ^ (x >> 17)) * np.uint32(0xED5AD4BB) + np.uint32(key >> 32)
    x = (x ^ (x >> 11)) * np.uint32(0xAC4C1B51)
    x = (x ^ (x >> 15)) * np.uint32(0x31848BAB)
    bits: npt.NDArray[np.uint32] = (x ^ (x >> 14)) & np.uint32(0x7FFFFFFF)
    return bits


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (1, 5), (-1, 131071), (2**63 + 11, 7)])
def test_noise_bits_equal_unsigned_arithmetic(seed: int, position: int) -> None:
    ids = np.arange(5000, dtype=np.uint32)
    got = token_bits(position_key(seed, position), torch.arange(5000)).numpy()
    np.testing.assert_array_equal(got, mixed_in_numpy(seed, position, ids))


def test_noise_is_gumbel_and_finite() -> None:
    noise = torch.cat([gumbel(position_key(seed, 3), torch.arange(100_000)) for seed in range(10)])
    assert bool(noise.isfinite().all())
    assert float(noise.mean()) == pytest.approx(0.57722, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)
    uniform = torch.exp(-torch.exp(-noise.double()))
    shares = torch.histc(uniform, 20, 0.0, 1.0) / len(noise)
    assert chi_square(shares.numpy(), np.full(20, 0.05), len(noise)) < 43.8  # 19 degrees


def test_noise_of_a_subset_is_the_subset_of_the_noise() -> None:
    ids = torch.tensor([5, 900, 17])
    assert torch.equal(gumbel(12, ids), gumbel(12, torch.arange(1000))[ids])
