"""What grammars cost: the masks by themselves, and a step with and without them.

    python benchmarks/guided.py [MODEL_FOLDER]

Prints microseconds of each mask along answers of random tokens, compile times, and the median time
of a decode step of eight rows, guided and not; the two kinds of step take turns.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from forebay_engine.config import EngineConfig
from forebay_engine.guided import Grammar, Grammars
from forebay_engine.runner import Runner
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import Guide, Row, StepPlan
from forebay_engine.tokenizer import Tokenizer
from forebay_engine.wire import GuideSpec

DEMO = "~/.cache/forebay/models/gemma-3-270m"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}},
    },
    "required": ["name", "age", "tags"],
}
SPECS = {
    "JSON schema": GuideSpec("json", json.dumps(SCHEMA)),
    "any object": GuideSpec("json", '{"type": "object"}'),
    "expression": GuideSpec("regex", r"([a-z]{2,9} ){3,20}[0-9]{4}"),
    "grammar": GuideSpec("grammar", 'root ::= "(" root ")" | [0-9]+ ("+" root)?'),
}
ROWS, STEPS = 8, 40


def timed_masks(grammar: Grammar, answers: int = 8, length: int = 60) -> Iterator[float]:
    """Seconds of each mask along answers of random tokens."""
    random = np.random.default_rng(0)
    for _ in range(answers):
        guide = grammar.start(SamplingParams())
        for _ in range(length):
            begin = time.perf_counter()
            mask = guide.masks(())
            yield time.perf_counter() - begin
            choices = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            if guide.take(int(random.choice(choices))):
                break


def timed_step(runner: Runner, guides: list[Guide | None]) -> float:
    """Seconds of a decode step of one row a guide."""
    sampling = SamplingParams(temperature=1.0)
    groups = len(runner.cache_groups)
    plan = StepPlan(
        tuple(
            Row(i, (2,), 0, 1, ((i,),) * groups, True, sampling, 1, guide=guide)
            for i, guide in enumerate(guides)
        )
    )
    begin = time.perf_counter()
    runner.execute(plan)
    return time.perf_counter() - begin


async def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else DEMO).expanduser()
    runner = Runner(EngineConfig(model=str(folder), kv_cache_bytes=64 << 20))
    runner.warm_up()
    grammars = Grammars(Tokenizer.from_folder(folder), runner.vocab_size, runner.eos_token_ids)
    begin = time.perf_counter()
    await grammars.get(GuideSpec("regex", "a"))
    print(f"trie of {runner.vocab_size} tokens: {time.perf_counter() - begin:.2f} s, once")
    print(f"{'':12} compile ms  mask us: median  90 %  99 %   step ms: free  guided")
    for name, spec in SPECS.items():
        begin = time.perf_counter()
        grammar = await grammars.get(spec)
        compiled = time.perf_counter() - begin
        masks = np.array(list(timed_masks(grammar))) * 1e6
        free, guided = [], []
        for _ in range(STEPS):
            free.append(timed_step(runner, [None] * ROWS))
            guides: list[Guide | None] = [grammar.start(SamplingParams()) for _ in range(ROWS)]
            guided.append(timed_step(runner, guides))
        median, most, nearly = np.quantile(masks, [0.5, 0.9, 0.99])
        steps = [1000 * statistics.median(times) for times in (free, guided)]
        print(
            f"{name:12} {1000 * compiled:10.1f} {median:16.0f} {most:5.0f} {nearly:5.0f}"
            f" {steps[0]:15.1f} {steps[1]:7.1f}"
        )


if __name__ == "__main__":
    asyncio.run(main())
