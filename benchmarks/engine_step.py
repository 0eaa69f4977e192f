"""Where the time of a step goes: linear layers, attention, everything else.

    python benchmarks/engine_step.py [--model FOLDER] [--threads 2] [--quantization int8 ...]

Times real steps of the runner in this process: decode steps of 1, 4, 8 and 16 rows behind prompts
of 128 tokens, then one prompt. Every kind runs in a process of its own, with the compiled kernels
and with torch's, one after the other, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

PROMPT = 128
ROWS = (1, 4, 8, 16)
STEPS = 24


def main() -> None:
    """Print a table, or with ``--one`` the figures of one process as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default="~/.cache/forebay/models/gemma-3-270m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quantization", nargs="*", default=["none"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.model = asked.model.expanduser()
    if asked.one:
        print(json.dumps(figures(asked.model, asked.threads, asked.quantization[0])))
        return
    bandwidth = read_bandwidth(asked.threads) / 1e9
    print(f"{asked.threads} threads; a sum over 512 MB reads {bandwidth:.1f} GB/s\n")
    print("| weights | kernels | rows | ms a step | linears | attention | rest | tokens/s | GB/s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kind in asked.quantization:
        rounds: dict[str, list[Any]] = defaultdict(list)
        for _ in range(asked.rounds):
            for choice in ("compiled", "torch"):
                rounds[choice].append(_in_a_process(asked, kind, choice))
        for choice, results in rounds.items():
            for found in zip(*results, strict=True):  # the round with the fastest step
                print(_line(kind, choice, min(found, key=lambda one: one["step"])))


def _in_a_process(asked: argparse.Namespace, kind: str, choice: str) -> Any:
    command = [sys.executable, __file__, "--one", "--model", str(asked.model)]
    command += ["--threads", str(asked.threads), "--quantization", kind]
    threads = {"OMP_NUM_THREADS": str(asked.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    environment = os.environ | threads | {"FOREBAY_CPU_KERNELS": choice}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def _line(kind: str, choice: str, found: dict[str, Any]) -> str:
    step, rate = found["step"], found["tokens"] / found["step"]
    shares = [found["linears"], found["attention"]]
    rest = step - sum(shares)
    percent = " | ".join(f"{100 * part / step:.0f} %" for part in (*shares, rest))
    speed = f"{found['weights'] / found['linears'] / 1e9:.1f}" if found["weights"] else "-"
    return (
        f"| {kind} | {choice} | {found['name']} | {1000 * step:.1f} | {percent} "
        f"| {rate:.0f} | {speed} |"
    )


def figures(model: Path, threads: int, quantization: str) -> list[dict[str, Any]]:
    """Seconds of the median step and of its parts, for each number of rows and a prompt."""
    from forebay_engine.config import EngineConfig
    from forebay_engine.runner import Runner

    options: dict[str, Any] = {} if quantization == "none" else {"quantization": quantization}
    config = EngineConfig(model=str(model), threads=threads, kv_cache_bytes=256 << 20, **options)
    runner = Runner(config)
    runner.warm_up()
    weights = _weight_bytes(runner)
    found = []
    with _timed_parts() as parts:
        for number in ROWS:
            tokens = [[2 + (7 * i + 13 * r) % 5000 for i in range(PROMPT)] for r in range(number)]
            for prompt in range(number):
                runner.execute(_plan(runner, tokens, [prompt], PROMPT))
            steps, drawn = [], [5] * number
            for _ in range(STEPS):
                for row, token in zip(tokens, drawn, strict=True):
                    row.append(token)
                spent, result = _step(parts, partial(runner.execute, _plan(runner, tokens)))
                steps.append(spent)
                drawn = [item.token_id for item in result.sampled]
            found.append(_median(f"{number}", number, steps, weights))
        prompts = [
            _step(parts, lambda: runner.execute(_plan(runner, [tokens[0]], [0], PROMPT)))[0]
            for _ in range(5)
        ]
        found.append(_median(f"prompt of {PROMPT}", PROMPT, prompts, weights))
    return found


def _plan(
    runner: Any, tokens: list[list[int]], rows: list[int] | None = None, count: int = 1
) -> Any:
    """Greedy steps of the last ``count`` tokens of rows."""
    from forebay_engine.sequence import SamplingParams
    from forebay_engine.step import Row, StepPlan

    pages = -(-(PROMPT + STEPS) // runner.block_size)
    made = []
    for row in range(len(tokens)) if rows is None else rows:
        ids = tokens[row][:PROMPT] if count > 1 else tokens[row]
        table = tuple(range(row * pages, (row + 1) * pages))
        made.append(
            Row(
                seq_id=row,
                token_ids=ids,
                start=len(ids) - count,
                count=count,
                block_tables=(table,) * len(runner.cache_groups),
                sample=True,
                sampling=SamplingParams(temperature=0.0),
                num_prompt=PROMPT,
            )
        )
    return StepPlan(tuple(made))


@contextmanager
def _timed_parts() -> Iterator[dict[str, float]]:
    """Seconds spent in linear layers and in attention, added up; what finds logits is linear."""
    import forebay_kernels as kernels
    from forebay_engine.linear import Linear
    from forebay_kernels.cpu import Screen, Tape

    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args, **settings)
            spent[name] += time.perf_counter() - begin
            return result

        return call

    Linear.__call__ = timed("linears", Linear.__call__)  # type: ignore[method-assign]
    Screen.shortlist = timed("linears", Screen.shortlist)  # type: ignore[method-assign]
    kernels.paged_attention = timed("attention", kernels.paged_attention)

    def replay(self: Tape) -> None:
        names = {"linear": "linears", "quantized_linear": "linears", "attention": "attention"}
        for name, seconds in self.timed_replay():
            spent[names.get(name, "rest")] += seconds

    Tape.replay = replay  # type: ignore[method-assign]
    yield spent


def _step(parts: dict[str, float], run: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    parts.clear()
    begin = time.perf_counter()
    result = run()
    return {"step": time.perf_counter() - begin, **parts}, result


def _median(name: str, tokens: int, steps: list[dict[str, float]], weights: int) -> dict[str, Any]:
    middle = {
        key: statistics.median(step.get(key, 0.0) for step in steps)
        for key in ("step", "linears", "attention")
    }
    return {"name": name, "tokens": tokens, "weights": weights, **middle}


def _weight_bytes(runner: Any) -> int:
    """Bytes of all packed weights that a step reads, a screen's in place of those behind it."""
    from forebay_kernels.cpu import PackedLinear, Screen

    found = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of objects that warn when they are looked at
        for each in gc.get_objects():
            if isinstance(each, PackedLinear | Screen):
                found += each.nbytes
            if isinstance(each, Screen):
                found -= each.product.nbytes
    return found


def read_bandwidth(threads: int) -> float:
    """Bytes a second that a sum over 512 MB reads, the best of some."""
    import torch

    torch.set_num_threads(threads)
    data = torch.ones(128 << 20)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - begin)
    return data.nbytes / min(times)


if __name__ == "__main__":
    main()
