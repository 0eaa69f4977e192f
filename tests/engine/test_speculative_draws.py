"""What is drawn with guesses has exactly the distribution of what is drawn without."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import torch

from forebay_engine.sampler import sample
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import Row

VOCAB, DRAWS = 6, 2000
PROMPT = [0, 3]
SAMPLING = SamplingParams(
    temperature=0.8,
    top_p=0.9,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    max_tokens=9,
    ignore_eos=True,
)


def logits(tokens: list[int]) -> list[float]:
    """A model: each token is likelier or not by the two before it."""
    return [math.sin(1.7 * t + 2.3 * tokens[-1] + 0.9 * tokens[-2]) * 1.5 for t in range(VOCAB)]


def exact(tokens: list[int]) -> list[float]:
    """The distribution of the next token, worked out by itself."""
    found = logits(tokens)
    for t in set(tokens):
        found[t] = found[t] / 1.3 if found[t] > 0 else found[t] * 1.3
    for t in set(tokens[len(PROMPT) :]):
        found[t] -= 0.4
    weights = [math.exp(value / 0.8) for value in found]
    mass, kept = 0.0, [0.0] * VOCAB
    for t in sorted(range(VOCAB), key=lambda t: -weights[t]):
        if mass < 0.9:
            kept[t] = weights[t]
        mass += weights[t] / sum(weights)
    return [weight / sum(kept) for weight in kept]


def step(tokens: list[int], draft: tuple[int, ...], seed: int) -> list[int]:
    """The tokens of a step that verifies these guesses."""
    places = [logits([*tokens, *draft[:number]]) for number in range(1 + len(draft))]
    sampling = replace(SAMPLING, seed=seed)
    row = Row(0, tokens, len(tokens) - 1, 1 + len(draft), ((0,),), True, sampling, 2, draft)
    return [item.token_id for item in sample(torch.tensor(places), [row], frozenset())]


def test_two_tokens_have_their_joint_distribution_whatever_was_guessed() -> None:
    first = exact(PROMPT)
    expected = {
        (a, b): first[a] * p
        for a in range(VOCAB)
        if first[a]
        for b, p in enumerate(exact([*PROMPT, a]))
    }
    likely = max(range(VOCAB), key=first.__getitem__)
    found: Counter[tuple[int, int]] = Counter()
    accepted = 0
    for seed in range(DRAWS):
        tokens = step(PROMPT, (likely,), seed)
        accepted += len(tokens) == 2
        if len(tokens) == 1:
            tokens += step([*PROMPT, *tokens], (), seed)
        found[tokens[0], tokens[1]] += 1
    possible = {pair: p for pair, p in expected.items() if p > 0}
    assert found.keys() <= possible.keys()
    distance = math.fsum((found[at] - DRAWS * p) ** 2 / (DRAWS * p) for at, p in possible.items())
    free = len(possible) - 1
    # 99.9 % of chi-square with so many degrees of freedom (Wilson and Hilferty 1931).
    assert distance < free * (1 - 2 / (9 * free) + 3.09 * math.sqrt(2 / (9 * free))) ** 3
    # A guess comes true as often as the model says it: no scheme accepts a certain guess more.
    spread = math.sqrt(first[likely] * (1 - first[likely]) / DRAWS)
    assert abs(accepted / DRAWS - first[likely]) < 4 * spread
    # Without guesses, the same seeds draw the same tokens.
    for seed in range(50):
        one = step(PROMPT, (), seed)
        assert step(PROMPT, (likely,), seed)[0] == one[0]
        assert step(PROMPT, (one[0], 0), seed)[:2] == one + step([*PROMPT, *one], (), seed)
