"""The tables of benchmarks/engine_cpu.py: medians over rounds, and ratios within each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

#: One round: by engine, what was measured (the fields of engine_cpu.Result).
Round = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Goal:
    """A ratio between two engines, and the least (or the most) that it should be."""

    name: str
    #: None: this round lacks a side of it.
    ratio: Callable[[Round], float | None]
    bound: float
    at_least: bool = True

    def row(self, rounds: Sequence[Round]) -> str | None:
        found = [value for each in rounds if (value := self.ratio(each)) is not None]
        if not found:
            return None
        middle = median(found)
        met = middle >= self.bound if self.at_least else middle <= self.bound
        asked = f"{'≥' if self.at_least else '≤'} {self.bound:g}"
        return f"| {self.name} | {asked} | {_spread(found, '{:.2f}')} | {'yes' if met else 'no'} |"


def rate(engine: str, *peers: str, streams: int) -> Callable[[Round], float | None]:
    """Output tokens a second, over those of the fastest of the peers."""

    def ratio(results: Round) -> float | None:
        own = _point(results, engine, streams, "rate")
        others = [v for peer in peers if (v := _point(results, peer, streams, "rate")) is not None]
        return own / max(others) if own is not None and others else None

    return ratio


def ttft(engine: str, *peers: str, streams: int) -> Callable[[Round], float | None]:
    """Median time to the first token, over that of the quickest of the peers."""

    def ratio(results: Round) -> float | None:
        own = _point(results, engine, streams, "ttft_p50")
        others = [
            v for peer in peers if (v := _point(results, peer, streams, "ttft_p50")) is not None
        ]
        return own / min(others) if own is not None and others else None

    return ratio


def prefix(engine: str) -> Callable[[Round], float | None]:
    def ratio(results: Round) -> float | None:
        own = results.get(engine, {})
        first, second = own.get("prefix_first"), own.get("prefix_second")
        return second / first if first and second else None

    return ratio


VLLM = ("vllm", "vllm-compiled")
GOALS = [
    *(
        Goal(f"bf16 rate over vLLM's, {n} streams", rate("forebay", *VLLM, streams=n), 1.5)
        for n in (1, 8)
    ),
    *(
        Goal(f"bf16 TTFT over vLLM's, {n} streams", ttft("forebay", *VLLM, streams=n), 1.0, False)
        for n in (1, 8)
    ),
    Goal("bf16 rate over transformers', 8", rate("forebay", "transformers", streams=8), 3.0),
    *(
        Goal(
            f"{ours} rate over llama.cpp's {theirs}, {n} streams",
            rate(f"forebay-{ours}", f"llamacpp-{theirs.lower()}", streams=n),
            bound,
        )
        for ours, theirs in (("int8", "Q8_0"), ("int4", "Q4_K_M"))
        for n, bound in ((1, 1.0), (8, 1.5))
    ),
    Goal("TTFT behind a known prefix over the first", prefix("forebay"), 0.1, False),
]


def summary_tables(rounds: Sequence[Round]) -> str:
    """Markdown, as in docs/benchmarks.md."""
    engines = list(dict.fromkeys(name for results in rounds for name in results))
    tables = [_rates(rounds, engines), _engines(rounds, engines)]
    goals = [row for goal in GOALS if (row := goal.row(rounds)) is not None]
    if goals:
        tables.append(_table(["goal", "asked", "found", "met"], goals))
    return "\n\n".join(tables)


def neighbour_table(rounds: Sequence[dict[str, dict[int, float]]]) -> str:
    """Shares of a quiet machine's one-thread rate; Forebay's are to be 0.8 at least."""
    cells: dict[tuple[str, int], list[float]] = {}
    for shares in rounds:
        for engine, by_streams in shares.items():
            for streams, share in by_streams.items():
                cells.setdefault((engine, streams), []).append(share)
    rows = [
        f"| {engine} | {streams} | {_spread(values, '{:.2f}')} |"
        for (engine, streams), values in cells.items()
    ]
    return _table(["engine", "streams", "of the quiet one-thread rate"], rows)


def _rates(rounds: Sequence[Round], engines: Sequence[str]) -> str:
    rows = []
    for engine in engines:
        numbers = {n for results in rounds for n in results.get(engine, {}).get("points", ())}
        for streams in sorted(numbers):

            def of(name: str, engine: str = engine, streams: int = streams) -> list[float]:
                values = (_point(results, engine, streams, name) for results in rounds)
                return [value for value in values if value is not None]

            cells = [
                _spread(of("rate"), "{:.1f}"),
                f"{_ms(of('ttft_p50'))} / {_ms(of('ttft_p99'))}",
                f"{_ms(of('gap_p50'))} / {_ms(of('gap_p99'))}",
                _ms(of("cpu_per_token")),
            ]
            rows.append(f"| {engine} | {streams} | " + " | ".join(cells) + " |")
    columns = ["engine", "streams", "output tok/s", "TTFT p50 / p99", "inter-token p50 / p99"]
    return _table([*columns, "CPU per token"], rows)


def _engines(rounds: Sequence[Round], engines: Sequence[str]) -> str:
    def cells(engine: str) -> Iterator[str]:
        def of(name: str) -> list[float]:
            values = (results.get(engine, {}).get(name) for results in rounds)
            return [value for value in values if value is not None]

        yield engine
        yield ", ".join(str(n) for n in sorted(set(of("threads")))).replace("0", "own choice")
        yield _spread(of("cold_start"), "{:.1f} s")
        yield _spread([value / 1e6 for value in of("memory")], "{:,.0f} MB")
        yield _ms(of("prefix_first"))
        yield _ms(of("prefix_second"))

    columns = ["engine", "threads", "cold start", "memory", "TTFT, 1,000 tokens new", "known"]
    return _table(columns, ["| " + " | ".join(cells(engine)) + " |" for engine in engines])


def _table(columns: Sequence[str], rows: Sequence[str]) -> str:
    return "\n".join(["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", *rows])


def _point(results: Round, engine: str, streams: int, name: str) -> float | None:
    value: float | None = results.get(engine, {}).get("points", {}).get(streams, {}).get(name)
    return value


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "–"
    middle = form.format(median(values))
    if len(values) == 1:
        return middle
    least, most = (
        form.format(value).removesuffix(" MB").removesuffix(" s")
        for value in (min(values), max(values))
    )
    return f"{middle} ({least}–{most})"


def _ms(values: Sequence[float]) -> str:
    return f"{median(values) * 1e3:,.1f} ms" if values else "–"
