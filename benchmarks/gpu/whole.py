"""Models of real shapes on the engine as a whole, and what is measured of each.

It imports neither torch nor the engine: the parts have names where those can't be loaded.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import models
from rows import Row

if TYPE_CHECKING:
    from bench import Bench
    from clock import Ceilings


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model: what a step reads, and computes for each token."""

    weights: int
    kv_token: int
    params: int

    @classmethod
    def of(cls, config: dict[str, Any], weight: float, kv: int) -> Sizes:
        """``weight`` and ``kv``: bytes of a value of layers and of keys; the head has two."""
        hidden, dim = config["hidden_size"], config["head_dim"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        layer = hidden * dim * (2 * heads + 2 * kv_heads) + 3 * hidden * config["intermediate_size"]
        layers, head = config["num_hidden_layers"] * layer, config["vocab_size"] * hidden
        kv_token = 2 * config["num_hidden_layers"] * kv_heads * dim * kv
        return cls(int(layers * weight + head * 2), kv_token, layers + head)

    def decode(self, rows: int, length: int, best: Ceilings, unit: str) -> float:
        """Tokens a second if all is read once a step, and then computed."""
        read = (self.weights + rows * length * self.kv_token) / best.copy
        return rows / (read + best.least(0, 2 * self.params * rows, unit))


@dataclass(frozen=True, slots=True)
class Setup:
    """A model in one configuration, and what is measured of it."""

    name: str
    config: dict[str, Any]
    settings: dict[str, Any]
    measures: tuple[Callable[[Bench], Iterator[Row]], ...]
    #: Bytes of a weight and of a value in the cache, and the ceiling of its products.
    weight: float = 2.0
    kv: int = 2
    unit: str = "bf16"

    @property
    def folder(self) -> str:
        """Of the model, which several share."""
        return f"{self.config['model_type']}-{self.config['hidden_size']}"


def steady(bench: Bench, *, rows: int, length: int, tokens: int, goal: float) -> Iterator[Row]:
    """Tokens a second while all of the rows decode."""
    found = bench.answers([(length, tokens)] * rows)
    begin = max(answer.arrivals[0] for answer in found)
    end = min(answer.arrivals[-1] for answer in found)
    inside = sum(begin < when <= end for answer in found for when in answer.arrivals)
    bound = bench.sizes.decode(rows, length + tokens // 2, bench.best, bench.setup.unit)
    name = f"{bench.setup.name}: {rows} x {length} tokens, decoding"
    yield Row(name, inside / (end - begin), "tok/s", bound, goal)


def busy(bench: Bench, *, rows: int, length: int, tokens: int) -> Iterator[Row]:
    """What a decode step costs the host, and for how long the device waits for it."""
    bench.answers([(length, 4)] * rows)
    bench.host_seconds()
    bench.watched.marks.clear()
    bench.answers([(length, tokens)] * rows)
    steps = max(1, len(bench.watched.marks) or tokens)
    host = 1e3 * bench.host_seconds() / steps
    where = f"{bench.setup.name}: {rows} x {length} tokens"
    yield Row(f"{where}, host work a step", host, "ms", None, 0.5, least=True)
    idle = 100 * bench.watched.idle()
    note = "for its next step"
    yield Row(f"{where}, the device waits", idle, "%", None, 3.0, least=True, note=note)


def mixed(
    bench: Bench, *, rows: int, low: int, high: int, goal: float, note: str = ""
) -> Iterator[Row]:
    """Requests of unlike lengths, all there at the start: output tokens a second."""
    lengths = random.Random(1)
    requests = [(lengths.randint(low, high), lengths.randint(low, high)) for _ in range(rows)]
    answers = bench.answers(requests)
    took = max(one.arrivals[-1] for one in answers) - min(one.sent for one in answers)
    out = sum(wanted for _, wanted in requests)
    sizes, best = bench.sizes, bench.best
    seen = sum(wanted * (given + wanted / 2) for given, wanted in requests)
    computed = sum(given + wanted for given, wanted in requests)
    bound = out / (
        (seen * sizes.kv_token + high * sizes.weights) / best.copy
        + best.least(0, 2 * sizes.params * computed, bench.setup.unit)
    )
    name = f"{bench.setup.name}: {rows} requests of {low} to {high} tokens in and out"
    yield Row(name, out / took, "tok/s", bound, goal, note=note)


def prefill(bench: Bench, *, length: int, goal: float) -> Iterator[Row]:
    """Prompt tokens a second of one prompt alone, the median of five."""
    times = sorted(
        answer.arrivals[0] - answer.sent
        for _ in range(5)
        for answer in bench.answers([(length, 1)])
    )
    each = bench.best.least(0, 2 * bench.sizes.params, bench.setup.unit)
    name = f"{bench.setup.name}: a prompt of {length} tokens"
    yield Row(name, length / times[2], "tok/s", 1 / each if each else None, goal)


#: docs/source/performance/perf-overview.md of NVIDIA/TensorRT-LLM, on one H200.
_TENSORRT_LLM = "published for TensorRT-LLM 1.0: 17,744"

_steady = partial(steady, length=1024, tokens=128)
SETUPS = (
    Setup(
        "Qwen3 0.6B",
        models.QWEN3_06B,
        {"max_sequences": 256},
        (
            partial(_steady, rows=1, goal=1000.0),
            partial(mixed, rows=256, low=100, high=1024, goal=24000.0),
        ),
    ),
    Setup(
        "Llama 3.1 8B",
        models.LLAMA_8B,
        {"max_sequences": 256, "max_model_len": 8192},
        (
            partial(_steady, rows=1, goal=225.0),
            partial(_steady, rows=16, goal=0.0),
            partial(_steady, rows=64, goal=7800.0),
            partial(_steady, rows=256, goal=13000.0),
            partial(prefill, length=2048, goal=33000.0),
            partial(busy, rows=256, length=128, tokens=128),
        ),
    ),
    Setup(
        "Llama 3.1 8B, FP8",
        models.LLAMA_8B,
        {
            "max_sequences": 512,
            "max_model_len": 8192,
            "quantization": "fp8",
            "kv_cache_dtype": "fp8",
        },
        (partial(mixed, rows=512, low=1000, high=1000, goal=13000.0, note=_TENSORRT_LLM),),
        weight=1.0,
        kv=1,
        unit="fp8",
    ),
    Setup(
        "Llama 3.1 8B, int4",
        models.LLAMA_8B,
        {"max_sequences": 16, "max_model_len": 8192, "quantization": "int4"},
        # 2.3 and 2 times what bf16 is to reach at least.
        (partial(_steady, rows=1, goal=2.3 * 225.0), partial(_steady, rows=16, goal=0.0)),
        weight=0.5 + 4 / 128,
    ),
)
SMALL = (
    Setup(
        "tiny",
        models.TINY,
        {"device": "cpu", "max_sequences": 4, "max_step_tokens": 64, "num_blocks": 32},
        (
            partial(steady, rows=2, length=20, tokens=6, goal=1.0),
            partial(mixed, rows=3, low=4, high=9, goal=1.0),
            partial(prefill, length=30, goal=1.0),
            partial(busy, rows=2, length=8, tokens=4),
        ),
    ),
)
