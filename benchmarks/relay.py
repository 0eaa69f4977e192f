"""What a gateway costs: Forebay beside Envoy and vllm-router, in front of one mock upstream.

    make bench
    python benchmarks/relay.py --rounds 5 --targets forebay envoy --json

The target runs on core 0; the mock upstream and this load generator share core 1. Rounds are
interleaved (every target once, then again), so that a noisy machine hurts all alike, and the
table shows medians. Ratios are taken within a round (in brackets: the least and the most), and
are what to compare: absolute figures move with the machine.

- requests/s: closed loop on 10 connections, canned answers; CPU per request: CPU time of the
  target's process tree divided by the requests it answered, which a busy machine distorts less
- added latency: median at one connection, less the direct median of the same round
- CPU per event: the same over a window in which 256 streams run at 50 events a second each,
  divided by the events that reached the client in it
- memory: resident set of the tree in that window
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from urllib.request import urlopen

import psutil
import uvloop
from load import StreamCounts, run_requests, run_streams

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ROOT / "scripts" / "backends" / "backends.sh"
TARGET_CORE, LOAD_CORE = 0, 1
CONNECTIONS, STREAMS, INTERVAL = 10, 256, 0.02
FOREBAY_CONFIG = """\
listen: {{port: {port}}}
admin: {{port: 0}}
logging: {{level: warning}}
models:
  mock: {{backends: [mock], policy: {policy}}}
backends:
  mock: {{adapter: openai, url: "{upstream}", examine: false}}
"""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One target in one round. Times in seconds, memory in bytes."""

    requests_per_second: float
    p50_at_one: float
    p99_at_ten: float
    cpu_per_request: float
    cpu_per_event: float
    events_per_second: float
    memory: int
    failures: int


def free_port() -> int:
    """A port P such that P and P+1 are free: the peers put their metrics on P+1."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            with suppress(OSError):
                second.bind(("127.0.0.1", port + 1))
                return port


def forebay(port: int, upstream: str, policy: str = "round_robin") -> list[str]:
    config = Path(tempfile.mkdtemp(prefix="forebay-relay-")) / "forebay.yaml"
    config.write_text(FOREBAY_CONFIG.format(port=port, upstream=upstream, policy=policy))
    executable = Path(sys.executable).with_name("forebay")
    return [str(executable), "serve", "--config", str(config)]


def peer(name: str, *options: str) -> Callable[[int, str], list[str]]:
    return lambda port, upstream: [
        str(BACKENDS),
        "serve",
        name,
        str(port),
        upstream,
        *options,
    ]


COMMANDS: dict[str, Callable[[int, str], list[str]]] = {
    "forebay": forebay,
    "envoy": peer("envoy", "--concurrency", "1"),
    "vllm-router": peer("vllm-router"),
}


@contextmanager
def running(command: list[str], core: int, url: str) -> Iterator[psutil.Process]:
    """A server pinned to a core, from its first answer on until the block ends."""
    process = subprocess.Popen(
        ["taskset", "--cpu-list", str(core), *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        wait_until_up(url, process)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=15)
        process.kill()


def wait_until_up(url: str, process: subprocess.Popen[bytes], seconds: float = 30.0) -> None:
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        if process.poll() is not None:
            _, errors = process.communicate()
            raise SystemExit(f"{url} ended at its start:\n{errors.decode()[-2000:]}")
        with suppress(OSError), urlopen(f"{url}/v1/models", timeout=2):
            return
        time.sleep(0.1)
    raise SystemExit(f"{url} did not answer within {seconds:.0f} s")


def tree(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


async def measure_streams(
    url: str, target: psutil.Process, seconds: float
) -> tuple[float, float, int, list[str]]:
    """CPU seconds per event, events per second, resident bytes, and what went wrong."""
    counts = StreamCounts()
    settle = 2.0  # seconds in which all streams are opened
    tokens = int((settle + seconds + 1) / INTERVAL)
    streams = asyncio.create_task(run_streams(url, "mock", STREAMS, tokens, counts))
    await asyncio.sleep(settle)
    processes = tree(target)
    cpu, events, started = cpu_seconds(processes), counts.events, time.perf_counter()
    await asyncio.sleep(seconds)
    cpu, events = cpu_seconds(processes) - cpu, counts.events - events
    elapsed = time.perf_counter() - started
    memory = sum(process.memory_info().rss for process in processes)
    with suppress(TimeoutError):
        await asyncio.wait_for(streams, timeout=60)
    failures = counts.failures + ["never ended"] * (
        STREAMS - counts.complete - len(counts.failures)
    )
    return cpu / max(events, 1), events / elapsed, memory, failures


async def measure(url: str, target: psutil.Process, seconds: float) -> Measurement:
    single = await run_requests(url, "mock", 1, seconds)
    processes = tree(target)
    before = cpu_seconds(processes)
    many = await run_requests(url, "mock", CONNECTIONS, seconds)
    cpu_per_request = (cpu_seconds(processes) - before) / max(many.answered, 1)
    cpu, events, memory, failures = await measure_streams(url, target, seconds)
    for failure in failures[:3]:
        print(f"{url}: {failure}", file=sys.stderr)
    return Measurement(
        requests_per_second=many.rate,
        p50_at_one=single.percentile(0.5),
        p99_at_ten=many.percentile(0.99),
        cpu_per_request=cpu_per_request,
        cpu_per_event=cpu,
        events_per_second=events,
        memory=memory,
        failures=single.failures + many.failures + len(failures),
    )


def one_round(targets: list[str], seconds: float) -> dict[str, Measurement]:
    """Every target once, each with a fresh process, then the mock alone."""
    port = free_port()
    upstream = f"http://127.0.0.1:{port}"
    mock = [sys.executable, str(ROOT / "benchmarks" / "mock_upstream.py")]
    mock += ["--port", str(port), "--interval", str(INTERVAL)]
    results = {}
    with running(mock, LOAD_CORE, upstream) as mock_process:
        for name in targets:
            url = f"http://127.0.0.1:{(target_port := free_port())}"
            with running(COMMANDS[name](target_port, upstream), TARGET_CORE, url) as target:
                results[name] = uvloop.run(measure(url, target, seconds))
        results["direct"] = uvloop.run(measure(upstream, mock_process, seconds))
    return results


RATIOS = {
    "requests_per_second": "rate_vs_envoy",
    "cpu_per_request": "cpu_per_request_vs_envoy",
    "cpu_per_event": "cpu_per_event_vs_envoy",
}


def summarise(rounds: list[dict[str, Measurement]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds.

    Differences and ratios are taken within each round first: medians of different rounds may come
    from quiet and busy minutes, and their ratio has been seen to flatter by three quarters.
    """
    summary: dict[str, dict[str, float]] = {}
    for name in rounds[0]:
        own = [asdict(results[name]) for results in rounds]
        row = {key: median(values[key] for values in own) for key in own[0]}
        row["added_p50"] = median(
            results[name].p50_at_one - results["direct"].p50_at_one for results in rounds
        )
        if "envoy" in rounds[0]:
            peers = [asdict(results["envoy"]) for results in rounds]
            for key, ratio in RATIOS.items():
                pairs = [mine[key] / peer[key] for mine, peer in zip(own, peers, strict=True)]
                row[ratio] = median(pairs)
                row[f"{ratio}_least"], row[f"{ratio}_most"] = min(pairs), max(pairs)
        summary[name] = row
    return summary


def _ratio(key: str) -> Callable[[dict[str, float]], str]:
    return lambda row: f"{row[key]:.2f} ({row[f'{key}_least']:.2f}–{row[f'{key}_most']:.2f})"


COLUMNS: dict[str, Callable[[dict[str, float]], str]] = {
    "requests/s, 10 connections": lambda row: f"{row['requests_per_second']:,.0f}",
    "of Envoy's": _ratio("rate_vs_envoy"),
    "p99": lambda row: f"{row['p99_at_ten'] * 1e3:.1f} ms",
    "CPU per request": lambda row: f"{row['cpu_per_request'] * 1e6:.0f} µs",
    "times Envoy's": _ratio("cpu_per_request_vs_envoy"),
    "added at 1 connection": lambda row: f"{row['added_p50'] * 1e6:.0f} µs",
    "events/s, 256 streams": lambda row: f"{row['events_per_second']:,.0f}",
    "CPU per event": lambda row: f"{row['cpu_per_event'] * 1e6:.1f} µs",
    "times Envoy's ": _ratio("cpu_per_event_vs_envoy"),
    "memory": lambda row: f"{row['memory'] / 1e6:.0f} MB",
    "failures": lambda row: f"{row['failures']:.0f}",
}


def table(summary: dict[str, dict[str, float]]) -> str:
    """Markdown, as it stands in docs/benchmarks.md; a dash where a figure makes no sense."""
    lines = ["| target | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in summary.items():
        cells = [name]
        for heading, cell in COLUMNS.items():
            relative = "Envoy" in heading or "CPU" in heading or "added" in heading
            meaningless = (name == "direct" and relative) or (
                "Envoy" in heading and "envoy" not in summary
            )
            cells.append("-" if meaningless else cell(row))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--targets", nargs="+", default=list(COMMANDS), choices=list(COMMANDS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--json", action="store_true", help="medians and each round, as JSON")
    options = parser.parse_args()
    os.sched_setaffinity(0, {LOAD_CORE})
    rounds = []
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        rounds.append(one_round(options.targets, options.seconds))
    summary = summarise(rounds)
    if options.json:
        details = [{name: asdict(result) for name, result in results.items()} for results in rounds]
        print(json.dumps({"medians": summary, "rounds": details}, indent=2))
    else:
        print(table(summary))


if __name__ == "__main__":
    main()
