"""The native engine beside vLLM and llama.cpp on this machine's processor, in one run.

    python benchmarks/engine_cpu.py                                     # all of it: an hour
    python benchmarks/engine_cpu.py --engines forebay llamacpp --streams 1 8 --rounds 1
    python benchmarks/engine_cpu.py --neighbour --engines forebay      # beside a busy process

Every engine serves the same model to the same client: prompts of token ids, no two with the same
beginning, greedy, and exactly as many tokens out as asked for. N streams are N connections, each
of which sends its next request when it has the answer to the last. Engines run one at a time,
started anew in each round, every engine once and then again, so that a bad minute hits all alike.
Each runs with the number of threads that gave it most tokens in a trial before the first round.

- output tok/s: tokens of all answers over the time from the first request to the last token
- TTFT: from sending a request to the first text; inter-token: between pieces of text
- CPU s/token: CPU time of the engine's process tree over output tokens, prompts included
- memory: resident, shared pages counted once, after the last measurement
- cold start: from the start of the process to the end of a first answer of one token
- prefix: TTFT of a prompt of 1,000 and some tokens, then of another that shares the 1,000

Figures are medians over the rounds, in brackets the least and the most. Ratios are taken within
each round. The model's files have been read before, so cold means without the disk.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from statistics import median

import psutil
import uvloop
from comparison import neighbour_table, summary_tables
from engines import ENGINES, FOLDER, ROOT, EngineFailed, Running, Starter, busy_neighbour
from generation import Generation, GenerationFailed
from tokenizers import Tokenizer

PREFIX, TAIL, PREFIX_TOKENS = 1000, 24, 4
#: Rows of a batch for transformers' `generate`.
BATCH = 8
#: A load average above this is not an idle machine.
_IDLE_LOAD = 0.3


@dataclass(frozen=True, slots=True)
class Options:
    engines: Sequence[str]
    streams: Sequence[int]
    rounds: int
    prompt: int
    tokens: int
    requests: int
    threads: dict[str, int]


@dataclass(frozen=True, slots=True)
class Point:
    """One engine at one number of streams in one round; seconds."""

    rate: float
    cpu_per_token: float
    ttft_p50: float | None = None
    ttft_p99: float | None = None
    gap_p50: float | None = None
    gap_p99: float | None = None
    #: Shares of all cores' time meanwhile: taken by the hypervisor, and by other processes.
    steal: float = 0.0
    others: float = 0.0


@dataclass(slots=True)
class Result:
    """One engine in one round."""

    threads: int
    cold_start: float | None = None
    memory: int | None = None
    points: dict[int, Point] = field(default_factory=dict)
    prefix_first: float | None = None
    prefix_second: float | None = None


@cache
def text_tokens() -> list[int]:
    """This project's own pages, behind a `<bos>`."""
    text = "\n".join(path.read_text() for path in sorted(ROOT.glob("docs/**/*.md")))
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tokens: list[int] = tokenizer.encode("<bos>" + text, add_special_tokens=False).ids
    return tokens


class Prompts:
    """Slices of the text, each beginning elsewhere, behind a `<bos>`."""

    def __init__(self) -> None:
        self._starts = count(0, 37)

    def take(self, length: int) -> list[int]:
        bos, *text = text_tokens()
        start = next(self._starts) % (len(text) - length)
        return [bos, *text[start : start + length - 1]]


class Meter:
    """CPU time of an engine, and of everything else on the machine, since this was made."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._begin = self._now()

    def _now(self) -> tuple[float, float, float, float]:
        times = psutil.cpu_times()
        stolen = getattr(times, "steal", 0.0)
        idle = times.idle + getattr(times, "iowait", 0.0)
        # What a guest of this machine takes is already in user.
        total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        return self._running.cpu_seconds(), time.process_time(), total - idle - stolen, stolen

    def read(self, seconds: float) -> tuple[float, float, float]:
        """CPU seconds of the engine; shares of the machine: stolen, and used by others."""
        own, client, busy, stolen = (
            now - then for now, then in zip(self._now(), self._begin, strict=True)
        )
        machine = seconds * (psutil.cpu_count() or 1)
        return own, stolen / machine, max(0.0, busy - own - client) / machine


def percentile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


async def measure(
    running: Running, prompts: Prompts, streams: int, requests: int, options: Options
) -> Point:
    async def stream(asked: Sequence[list[int]], tokens: int) -> list[Generation]:
        return [await running.target.generate(prompt, tokens) for prompt in asked]

    async def all_streams(requests: int, tokens: int) -> list[Generation]:
        asked = [[prompts.take(options.prompt) for _ in range(requests)] for _ in range(streams)]
        found = await asyncio.gather(*(stream(own, tokens) for own in asked))
        return [generation for own in found for generation in own]

    await all_streams(1, 2)  # shapes that were never computed yet cost more
    meter, begin = Meter(running), time.perf_counter()
    found = await all_streams(requests, options.tokens)
    seconds = time.perf_counter() - begin
    cpu, steal, others = meter.read(seconds)
    made = sum(generation.tokens for generation in found)
    ttfts = [generation.ttft for generation in found]
    gaps = [gap for generation in found for gap in generation.gaps]
    return Point(
        rate=made / seconds,
        cpu_per_token=cpu / made,
        ttft_p50=percentile(ttfts, 0.5),
        ttft_p99=percentile(ttfts, 0.99),
        gap_p50=percentile(gaps, 0.5),
        gap_p99=percentile(gaps, 0.99),
        steal=steal,
        others=others,
    )


async def measure_prefix(running: Running, prompts: Prompts) -> tuple[float, float]:
    """Medians of three pairs: TTFT of the first and of the second prompt with a prefix."""
    firsts: list[float] = []
    seconds: list[float] = []
    for _ in range(3):
        prefix = prompts.take(PREFIX)
        for times in (firsts, seconds):
            tail = prompts.take(TAIL + 1)[1:]
            times.append((await running.target.generate(prefix + tail, PREFIX_TOKENS)).ttft)
    return median(firsts), median(seconds)


async def one_engine(start: Starter, threads: int, options: Options) -> Result:
    """Start it, measure all, stop it. The prompts are the same for every engine.

    :raises EngineFailed, GenerationFailed: it can't be measured.
    """
    result, prompts = Result(threads), Prompts()
    async with start(threads) as running:
        result.cold_start = running.cold_start
        for streams in options.streams:
            requests = options.requests
            result.points[streams] = await measure(running, prompts, streams, requests, options)
        result.prefix_first, result.prefix_second = await measure_prefix(running, prompts)
        result.memory = running.memory()
    return result


async def transformers(threads: int, options: Options) -> Result:
    """transformers' `generate` in a batch, in a process of its own.

    :raises EngineFailed: it ended with an error.
    """
    prompts = Prompts()
    batch = [prompts.take(options.prompt) for _ in range(BATCH)]
    asked = {"model": str(FOLDER), "threads": threads, "prompts": batch, "tokens": options.tokens}
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(ROOT / "benchmarks" / "transformers_generate.py"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )
    said, errors = await process.communicate(json.dumps(asked).encode())
    if process.returncode:
        raise EngineFailed(f"transformers: {errors.decode()[-2000:]}")
    found = json.loads(said)
    made = BATCH * options.tokens
    point = Point(rate=made / found["seconds"], cpu_per_token=found["cpu_seconds"] / made)
    return Result(threads, memory=found["memory"], points={BATCH: point})


async def measured(name: str, threads: int, options: Options) -> Result | None:
    """None, and the reason on standard error, if it can't be measured."""
    say(f"  {name}, {threads or 'its own number of'} threads")
    try:
        if name == "transformers":
            return await transformers(threads, options)
        return await one_engine(ENGINES[name], threads, options)
    except (EngineFailed, GenerationFailed) as error:
        say(f"  {name} is left out: {error}")
        return None


async def best_threads(name: str, options: Options) -> int | None:
    """The number of threads that gives most tokens, over the numbers of streams alike."""
    if name in options.threads:
        return options.threads[name]
    brief = Options(
        options.engines,
        sorted({min(options.streams), max(options.streams)}),
        rounds=1,
        prompt=options.prompt,
        tokens=options.tokens,
        requests=1,
        threads={},
    )
    scores: dict[int, float] = {}
    for threads in range(1, (os.cpu_count() or 1) + 1):
        result = await measured(name, threads, brief)
        if result is not None:
            scores[threads] = math.prod(point.rate for point in result.points.values())
    return max(scores, key=lambda threads: scores[threads]) if scores else None


async def compare(options: Options) -> list[dict[str, Result]]:
    say("trial: how many threads")
    found = {name: await best_threads(name, options) for name in options.engines}
    threads = {name: number for name, number in found.items() if number is not None}
    rounds = []
    for number in range(options.rounds):
        say(f"round {number + 1} of {options.rounds}")
        results = {name: await measured(name, threads[name], options) for name in threads}
        rounds.append({name: result for name, result in results.items() if result is not None})
    return rounds


async def beside_a_neighbour(options: Options) -> list[dict[str, dict[int, float]]]:
    """By round and engine: the share of a quiet machine's one-thread rate beside a busy process.

    The neighbour comes when the engine has already started; Forebay chooses its threads itself.
    """
    rounds = []
    for number in range(options.rounds):
        say(f"round {number + 1} of {options.rounds}")
        shares: dict[str, dict[int, float]] = {}
        for name in options.engines:
            quiet = await measured(name, 1, options)
            if quiet is not None:
                threads = options.threads.get(name, 0 if name.startswith("forebay") else 1)
                crowded = await rates_beside_a_neighbour(ENGINES[name], threads, options)
                shares[name] = {n: rate / quiet.points[n].rate for n, rate in crowded.items()}
        rounds.append(shares)
    return rounds


async def rates_beside_a_neighbour(
    start: Starter, threads: int, options: Options
) -> dict[int, float]:
    prompts = Prompts()
    async with start(threads) as running:
        with busy_neighbour():
            return {
                n: (await measure(running, prompts, n, options.requests, options)).rate
                for n in options.streams
            }


def refuse_a_busy_machine() -> None:
    load = os.getloadavg()[0]
    if load > _IDLE_LOAD:
        busiest = sorted(_busy_processes(), reverse=True)[:3]
        names = ", ".join(f"{name} ({share:.0f} %)" for share, name in busiest)
        raise SystemExit(
            f"--exact: the load average is {load:.2f}, not idle; busiest: {names or 'none now'}"
        )


def _busy_processes() -> Iterator[tuple[float, str]]:
    processes = list(psutil.process_iter(["name"]))
    for process in processes:
        process.cpu_percent()
    time.sleep(1)
    for process in processes:
        if process.is_running() and (share := process.cpu_percent()) > 1:
            yield share, process.info["name"]


def quietness(rounds: list[dict[str, Result]], load: float) -> str:
    points = [
        p for results in rounds for result in results.values() for p in result.points.values()
    ]
    steal, others = max(p.steal for p in points), max(p.others for p in points)
    return (
        f"Load average {load:.2f} at the beginning; at most {steal:.1%} of the cores' time was "
        f"stolen in a measurement, and {others:.1%} taken by other processes."
    )


def write(path: Path | None, found: object) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _assigned(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not number.isdigit():
        raise argparse.ArgumentTypeError(f"write ENGINE=THREADS, not {text!r}")
    return name, int(number)


def main() -> None:
    names = [*ENGINES, "transformers"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", default=names, choices=names)
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=2, help="of each stream")
    parser.add_argument("--prompt", type=int, default=128, help="tokens in")
    parser.add_argument("--tokens", type=int, default=64, help="tokens out")
    parser.add_argument(
        "--threads",
        nargs="+",
        type=_assigned,
        default=[],
        metavar="ENGINE=THREADS",
        help="spare it the trial; 0: Forebay chooses",
    )
    parser.add_argument(
        "--neighbour",
        action="store_true",
        help="beside one busy process; not for transformers",
    )
    parser.add_argument("--exact", action="store_true", help="refuse a machine that is not idle")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round there")
    o = parser.parse_args()
    options = Options(
        o.engines, sorted(o.streams), o.rounds, o.prompt, o.tokens, o.requests, dict(o.threads)
    )
    if o.neighbour and "transformers" in o.engines:
        parser.error("--neighbour needs --engines without transformers")
    if o.exact:
        refuse_a_busy_machine()
    load = os.getloadavg()[0]
    if o.neighbour:
        shares = uvloop.run(beside_a_neighbour(options))
        write(o.json, {"load": load, "shares": shares})
        print(neighbour_table(shares))
        return
    rounds = uvloop.run(compare(options))
    if not any(rounds):
        raise SystemExit("no engine could be measured")
    plain = [{name: asdict(result) for name, result in results.items()} for results in rounds]
    write(o.json, {"load": load, "rounds": plain})
    print(summary_tables(plain), "", quietness(rounds, load), sep="\n")


if __name__ == "__main__":
    main()
