"""What drawing a token costs: microseconds a row, by what the row asks for.

    python benchmarks/sampler.py [--rows 16] [--vocab 262144] [--context 4096] [--seconds 1]

Logits are random with the spread of a language model's; best of all repeats, one thread.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from forebay_engine.sampler import sample
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import Row
from forebay_engine.watermark import Watermark

#: Standard deviation of Gemma 3 270M's logits over its vocabulary.
SPREAD = 4.5
KEY = bytes(32)
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy, 5 logprobs": {"temperature": 0.0, "logprobs": 5},
    "greedy, penalties": {"temperature": 0.0, "frequency_penalty": 0.5},
    "temperature 1": {},
    "temperature 1, 5 logprobs": {"logprobs": 5},
    "top_k 50": {"top_k": 50},
    "top_p 0.95": {"top_p": 0.95},
    "top_k 50, top_p 0.95": {"top_k": 50, "top_p": 0.95},
    "min_p 0.05": {"min_p": 0.05},
    "typical_p 0.95": {"typical_p": 0.95},
    "top_p 0.95, typical_p 0.95": {"top_p": 0.95, "typical_p": 0.95},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    "logit bias, 10 bad words": {
        "logit_bias": {5: 1.0, 9: -1.0},
        "bad_words": tuple((t, t + 1) for t in range(10)),
    },
    "100 allowed ids": {"allowed_token_ids": tuple(range(100))},
    "watermark gumbel": {"watermark": Watermark(scheme="gumbel", key=KEY)},
    "watermark kgw, lefthash": {"watermark": Watermark(seeding="lefthash", key=KEY)},
    "watermark kgw, selfhash": {"watermark": Watermark(key=KEY)},
}


def rows_of(params: dict[str, Any], count: int, token_ids: list[int]) -> list[Row]:
    return [
        Row(
            seq_id=number,
            token_ids=token_ids,
            start=len(token_ids) - 1,
            count=1,
            block_tables=((0,),),
            sample=True,
            sampling=SamplingParams(seed=number, **params),
            num_prompt=len(token_ids) // 2,
        )
        for number in range(count)
    ]


def measure(logits: torch.Tensor, rows: list[Row], seconds: float) -> float:
    """Best time of one call, in microseconds a row."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        begin = time.perf_counter()
        sample(logits, rows, frozenset({1}))
        best = min(best, time.perf_counter() - begin)
    return best / len(rows) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=262144)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=1.0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(asked.rows, asked.vocab, generator=generator) * SPREAD).bfloat16()
    token_ids = torch.randint(asked.vocab, (asked.context,), generator=generator).tolist()
    print(f"{asked.rows} rows, {asked.vocab} tokens, {asked.context} tokens before, bf16")
    with torch.inference_mode():
        for name, params in CASES.items():
            cost = measure(logits, rows_of(params, asked.rows, token_ids), asked.seconds)
            print(f"{name:30} {cost:8.0f} µs a row")


if __name__ == "__main__":
    main()
