"""What it costs to look for guesses in what was already said, beside the model.

    python benchmarks/looking.py          # a minute; needs the demo model's tokenizer

Steps of eight sequences that have 2,048 tokens and go on as their texts do: CPU time of the one
thread, for all eight together, from the rows of a step to those with guesses, and for what is
learnt of them. No model runs.

- tokens by chance: no pair of them comes twice
- documentation: this project's
- one pair for ever: at each place the most earlier ones are looked at, and none goes on alike
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from statistics import fmean, median

from speculation import MODEL, ROOT

from forebay_engine.acceptance import Acceptance
from forebay_engine.costs import StepCosts
from forebay_engine.prompt_lookup import PromptLookup
from forebay_engine.sequence import SamplingParams
from forebay_engine.speculation import ImmediateSpeculation, Limits
from forebay_engine.step import Row, Sampled
from forebay_engine.tokenizer import Tokenizer

STREAMS, CONTEXT, STEPS = 8, 2048, 300
#: Most guesses of a row, as by default; so a text is used up by no more than so much in a step.
GUESSES = 8
SIZE = CONTEXT + STEPS * (GUESSES + 1)
#: Steps by tokens, as measured with Gemma 3 270M on two cores.
COSTS = StepCosts((1, 8, 16, 32), (0.033, 0.039, 0.065, 0.12))
SAMPLING = SamplingParams(max_tokens=SIZE)


def looked(texts: Sequence[list[int]]) -> tuple[list[float], int]:
    """Seconds of CPU time of each step, and the guesses that were verified in all of them."""
    speculation = ImmediateSpeculation(PromptLookup(), Acceptance(COSTS), Limits(GUESSES))
    taken, drafted, ends = [], 0, [CONTEXT] * STREAMS
    for _ in range(STEPS):
        known = [text[:end] for text, end in zip(texts, ends, strict=True)]
        rows = [
            Row(id, tokens, len(tokens) - 1, 1, (), True, SAMPLING, 1)
            for id, tokens in enumerate(known)
        ]
        begin = time.thread_time()
        rows = speculation.extend(rows, SIZE, lambda row, wanted: wanted)
        seconds = time.thread_time() - begin
        drawn = {row.seq_id: list(answers(row, texts[row.seq_id])) for row in rows}
        begin = time.thread_time()
        speculation.take(rows, drawn, ())
        taken.append(seconds + time.thread_time() - begin)
        drafted += sum(len(row.draft) for row in rows)
        ends = [end + len(drawn[id]) for id, end in enumerate(ends)]
    return taken, drafted


def answers(row: Row, text: Sequence[int]) -> Iterator[Sampled]:
    """What the text has, up to the first guess that is not in it."""
    for at, guess in enumerate((*row.draft, None), len(row.token_ids)):
        yield Sampled(row.seq_id, text[at])
        if guess != text[at]:
            return


def kinds() -> Iterator[tuple[str, list[int]]]:
    random = Random(1)
    tokenizer = Tokenizer.from_folder(Path(MODEL))
    pages = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
    prose = tokenizer.encode("\n\n".join(pages), special=False)
    yield "tokens by chance", random.sample(range(tokenizer.vocab_size), STREAMS * SIZE)
    yield "documentation", prose * (1 + STREAMS * SIZE // len(prose))
    between = (random.randrange(3, 1 << 30) for _ in range(STREAMS * SIZE))
    yield "one pair for ever", [token for one in between for token in (1, 2, one)]


def main() -> None:
    print("| text | first step, ms | each further one, µs: median | mean | guesses verified |")
    print("|---|---|---|---|---|")
    for kind, tokens in kinds():
        texts = [tokens[at * SIZE : (at + 1) * SIZE] for at in range(STREAMS)]
        (first, *others), drafted = looked(texts)
        cells = [kind, f"{first * 1e3:.1f}", f"{median(others) * 1e6:.0f}"]
        print("|", " | ".join([*cells, f"{fmean(others) * 1e6:.0f}", str(drafted)]), "|")


if __name__ == "__main__":
    main()
