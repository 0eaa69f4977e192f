"""What guessing brings: the native engine with and without speculation, on the same requests.

    python benchmarks/speculation.py                                   # a quarter of an hour
    python benchmarks/speculation.py --draft PATH --streams 1 --rounds 1

Each workload is served by one loaded model under every mode, once and then again, so that a bad
minute hits all alike. ``distinct``: continue paragraphs that have nothing in common, drawn with
temperature 1, where there is little to guess; ``greedy``: the same, the likeliest tokens, which a
small model soon repeats; ``quotation``: a text stands in the prompt and is said once more, as in
edits and answers out of documents.

- output tok/s: tokens of all answers over the time from the first request to the last token
- accepted: guesses that came true, of those that were verified
- tokens a step: tokens drawn over steps, for each stream
- ratio: output tok/s against ``none`` in the same round

Figures are medians over the rounds, ratios with the least and the most.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median

from forebay_engine.config import EngineConfig
from forebay_engine.engine import Engine
from forebay_engine.runner import Runner
from forebay_engine.sequence import SamplingParams
from forebay_engine.tokenizer import Tokenizer
from forebay_engine.wire import Done, Event, Generate

ROOT = Path(__file__).parents[1]
MODEL = Path("~/.cache/forebay/models/gemma-3-270m").expanduser()
WORKLOADS = ("distinct", "greedy", "quotation")


@dataclass(frozen=True, slots=True)
class Figures:
    """One workload under one mode."""

    rate: float
    accepted: float | None
    per_step: float


def paragraphs() -> list[str]:
    """Texts with nothing in common: the longer paragraphs of the documentation."""
    texts = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
    found = [" ".join(part.split()) for text in texts for part in text.split("\n\n")]
    return [text for text in found if len(text) > 400 and not text.startswith(("|", "```"))]


def requests(workload: str, tokenizer: Tokenizer, count: int, tokens: int) -> list[Generate]:
    """``count`` requests of ``tokens`` output tokens each."""
    temperature = 1.0 if workload == "distinct" else 0.0
    sampling = SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=True)
    found = []
    for number, text in enumerate(islice(paragraphs(), count)):
        ids = tokenizer.encode(text, special=True)[:128]
        if workload == "quotation":
            # The model is shown a repetition, and then the beginning of another.
            said = tokenizer.decode(ids)
            ids = tokenizer.encode(f"{said}\n\n{said}\n\n{said[:60]}", special=True)
        found.append(Generate(prompts=[ids], seed=number, sampling=sampling))
    return found


async def serve(runner: Runner, config: EngineConfig, asked: Sequence[Generate]) -> Figures:
    """All requests at once, in an engine of their own."""
    engine = Engine(runner, Tokenizer.from_folder(Path(config.model)), None, config)
    stepping = asyncio.create_task(engine.run())
    begin = time.perf_counter()
    await asyncio.gather(*(answered(engine, command) for command in asked))
    seconds = time.perf_counter() - begin
    stepping.cancel()
    await asyncio.gather(stepping, return_exceptions=True)
    counters = engine.scheduler.counters
    tokens = sum(command.sampling.max_tokens for command in asked)
    drafted = counters.drafted_tokens
    return Figures(
        rate=tokens / seconds,
        accepted=counters.accepted_tokens / drafted if drafted else None,
        per_step=tokens / counters.steps / len(asked),
    )


async def answered(engine: Engine, command: Generate) -> None:
    done = asyncio.Event()

    def emit(event: Event) -> None:
        if isinstance(event, Done):
            done.set()

    await engine.submit(command, emit)
    await done.wait()


def row(workload: str, streams: int, mode: str, rounds: Sequence[dict[str, Figures]]) -> str:
    found = [figures[mode] for figures in rounds]
    ratios = [figures[mode].rate / figures["none"].rate for figures in rounds]
    accepted = [f.accepted for f in found if f.accepted is not None]
    cells = [
        workload,
        str(streams),
        Path(mode).name,
        f"{median(f.rate for f in found):.1f}",
        f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
        f"{median(accepted):.0%}" if accepted else "–",
        f"{median(f.per_step for f in found):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--draft", help="folder of a draft model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    modes = ["none", "ngram", *([options.draft] if options.draft else [])]
    plain = EngineConfig(
        model=options.model, dtype=options.dtype, threads=options.threads, prefix_cache=False
    )
    configs = {mode: replace(plain, speculation=mode) for mode in modes}
    # Without a draft model one runner serves all modes.
    runners = {mode: Runner(configs[mode]) for mode in modes[1:]}
    for runner in runners.values():
        runner.warm_up()
        print(runner.step_costs)
    runners["none"] = runners["ngram"]
    tokenizer = Tokenizer.from_folder(Path(options.model))
    print("| workload | streams | mode | output tok/s | ratio | accepted | tokens a step |")
    print("|---|---|---|---|---|---|---|")
    for workload in options.workloads:
        for streams in options.streams:
            asked = requests(workload, tokenizer, streams, options.tokens)
            rounds = [
                {mode: await serve(runners[mode], configs[mode], asked) for mode in modes}
                for _ in range(options.rounds)
            ]
            for mode in modes:
                print(row(workload, streams, mode, rounds), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
