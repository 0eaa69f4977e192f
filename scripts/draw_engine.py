"""Draw the pictures of docs/engine.md from runs of the engine's own scheduler and cache.

    python scripts/draw_engine.py            # writes docs/images/engine-*.svg

Nothing is staged: requests go into the real scheduler over the real block pool, the plan of every
step is recorded, and what is drawn is the record. Only the model is a stand-in, which answers with
words that were given to it; so the pictures come out the same everywhere, and without torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from svg import FAINT, INK, Drawing

from forebay_engine.acceptance import Acceptance
from forebay_engine.blocks import RELEASED
from forebay_engine.cache import CacheGroup, KVCache
from forebay_engine.costs import StepCosts
from forebay_engine.prompt_lookup import PromptLookup
from forebay_engine.scheduler import Scheduler
from forebay_engine.sequence import SamplingParams
from forebay_engine.sequence import Sequence as Tokens
from forebay_engine.speculation import ImmediateSpeculation, Limits, Speculation
from forebay_engine.step import Row, Sampled, StepResult

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
BLOCK = 4
#: Told apart by those who see colours differently too (Okabe and Ito), and light enough for text.
COLOURS = ("#56b4e9", "#e69f00", "#5fc9a0", "#cc79a7", "#f0e442")
PREFILL, DECODE, WAITING = "#56b4e9", "#e69f00", "#e4e4e4"
YES, NO, DRAWN = "#5fc9a0", "#f2a48a", "#56b4e9"


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: when it comes, in steps, and what the stand-in answers."""

    name: str
    step: int
    prompt: Sequence[int]
    answer: Sequence[int]


@dataclass(frozen=True, slots=True)
class Step:
    """What one step did, by sequence, and how the cache stood while it ran."""

    rows: dict[int, Row]
    #: Of each row: the guesses that came true, then one more token.
    drawn: dict[int, list[int]]
    waiting: list[int]
    #: Of each group of layers and sequence: its pages.
    tables: list[dict[int, list[int]]]
    #: Pages that hold a prefix and that nobody holds, of the first group.
    cached: set[int]


@dataclass(slots=True)
class Run:
    """A scheduler with requests, and the record of its steps."""

    requests: Sequence[Asked]
    scheduler: Scheduler
    steps: list[Step] = field(default_factory=list)
    sequences: list[Tokens] = field(default_factory=list)

    def run(self) -> Run:
        due = sorted(enumerate(self.requests), key=lambda item: item[1].step)
        while due or self.scheduler.running or self.scheduler.waiting:
            while due and due[0][1].step <= len(self.steps):
                self._add(*due.pop(0))
            plan = self.scheduler.plan()
            if plan is None:
                raise RuntimeError(f"nothing to do at step {len(self.steps)}")
            rows = {row.seq_id: _kept(row) for row in plan.rows}
            tables = self._tables(rows)
            cached = set(self.scheduler.cache.pools[0]._idle)  # the books of the pool itself
            drawn = {row.seq_id: self._answer(row) for row in plan.rows if row.sample}
            waiting = [s.id for s in self.sequences if s.id not in rows and not s.finish_reason]
            self.steps.append(Step(rows, drawn, waiting, tables, cached))
            tokens = [Sampled(id, token) for id, found in drawn.items() for token in found]
            self.scheduler.apply(StepResult(tuple(tokens)))
        return self

    def _add(self, number: int, asked: Asked) -> None:
        sampling = SamplingParams(max_tokens=len(asked.answer), ignore_eos=True)
        sequence = Tokens(number, list(asked.prompt), sampling, arrival=float(asked.step))
        self.sequences.append(sequence)
        self.scheduler.add(sequence)

    def _answer(self, row: Row) -> list[int]:
        """The words that come next, as far as they were guessed, and one more."""
        answer = self.requests[row.seq_id].answer
        at = len(row.token_ids) - row.num_prompt
        right = 0
        while right < len(row.draft) and row.draft[right] == answer[at + right]:
            right += 1
        return list(answer[at : at + right + 1])

    def _tables(self, rows: dict[int, Row]) -> list[dict[int, list[int]]]:
        groups = range(len(self.scheduler.cache.groups))
        return [{id: list(row.block_tables[g]) for id, row in rows.items()} for g in groups]


def _kept(row: Row) -> Row:
    """The row as it is now: its lists live on."""
    return Row(
        row.seq_id,
        tuple(row.token_ids),
        row.start,
        row.count,
        tuple(tuple(table) for table in row.block_tables),
        row.sample,
        row.sampling,
        row.num_prompt,
        row.draft,
    )


def scheduler(
    *,
    blocks: int,
    budget: int,
    sequences: int,
    windows: Sequence[int | None] = (None,),
    speculation: Speculation | None = None,
) -> Scheduler:
    return Scheduler(
        KVCache([CacheGroup(blocks, window) for window in windows], BLOCK),
        max_step_tokens=budget,
        max_sequences=sequences,
        max_model_len=blocks * BLOCK,
        speculation=speculation,
    )


class Words:
    """Tokens that are words, so that pictures can be read."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def ids(self, text: str) -> list[int]:
        for word in text.split():
            if word not in self.names:
                self.names.append(word)
        return [self.names.index(word) for word in text.split()]

    def text(self, token: int) -> str:
        return self.names[token]


def busy_day() -> Run:
    """Five requests, more than the cache holds at once; the third begins like the first."""
    common = list(range(100, 108))
    requests = [
        Asked("A", 0, [*common, *range(200, 206)], range(10)),
        Asked("B", 0, list(range(300, 306)), range(12)),
        Asked("C", 6, [*common, *range(400, 405)], range(8)),
        Asked("D", 8, list(range(500, 526)), range(6)),
        Asked("E", 9, list(range(600, 602)), range(6)),
    ]
    return Run(requests, scheduler(blocks=16, budget=8, sequences=4)).run()


def too_little_cache() -> Run:
    """Two answers that grow until the cache is full; the later one gives way."""
    requests = [
        Asked("A", 0, list(range(6)), range(20)),
        Asked("B", 1, list(range(50, 57)), range(14)),
    ]
    return Run(requests, scheduler(blocks=8, budget=8, sequences=4)).run()


def draw_batch(run: Run, title: str) -> str:
    """Who runs in which step, with how many tokens; below, how full each step is."""
    cell, lane, left, top = 30, 34, 190, 76
    width = left + cell * len(run.steps) + 24
    height = top + lane * len(run.requests) + 150
    art = Drawing(width, height, title)
    art.legend(
        left,
        52,
        [
            (PREFILL, "chunk of a prompt", False),
            (DECODE, "decode", False),
            (WAITING, "waits", False),
        ],
    )
    for number, asked in enumerate(run.requests):
        y = top + lane * number
        art.text(20, y + 15, asked.name, weight=600)
        art.text(40, y + 15, f"{len(asked.prompt)} in, {len(asked.answer)} out", size=12)
        cached = run.sequences[number].num_cached
        if cached:
            art.text(40, y + 28, f"{cached} found in the cache", size=10, fill=FAINT)
        for at, step in enumerate(run.steps):
            x = left + cell * at
            row = step.rows.get(number)
            if row is not None:
                art.box(x, y, cell, lane - 8, PREFILL if _is_prompt(row) else DECODE)
                art.text(x + cell / 2, y + 18, row.count, anchor="middle", size=12)
            elif number in step.waiting:
                art.box(x, y + 8, cell, lane - 24, WAITING)
    _budget_bars(art, run, left, cell, height - 34)
    return art.svg()


def _is_prompt(row: Row) -> bool:
    """Also a chunk of what was computed before and thrown away: it is a prompt again."""
    return row.count > 1 or not row.sample or row.start < row.num_prompt


def _budget_bars(art: Drawing, run: Run, left: int, cell: int, bottom: int) -> None:
    budget, unit = 8, 8
    art.text(20, bottom - 20, "tokens in the step", size=12)
    for at, step in enumerate(run.steps):
        x, y = left + cell * at, float(bottom)
        for row in step.rows.values():
            y -= unit * row.count
            fill = PREFILL if _is_prompt(row) else DECODE
            art.box(x + 3, y, cell - 6, unit * row.count, fill)
        art.text(x + cell / 2, bottom + 18, at, anchor="middle", size=11, fill=FAINT)
    level = bottom - unit * budget
    right = left + cell * len(run.steps)
    art.line(left, level, right, level, dashed=True)
    art.text(left - 8, level + 4, f"budget {budget}", anchor="end", size=11, fill=FAINT)
    art.text(left - 8, bottom + 18, "step", anchor="end", size=11, fill=FAINT)


def draw_blocks(run: Run) -> str:
    """Who holds which block in each step."""
    blocks = run.scheduler.cache.pools[0].num_blocks
    cell, lane, left, top = 30, 18, 90, 76
    width, height = left + cell * len(run.steps) + 24, top + lane * blocks + 40
    art = Drawing(width, height, "Blocks of the cache over the same steps")
    entries = [(COLOURS[n], asked.name, False) for n, asked in enumerate(run.requests)]
    art.legend(left, 52, [*entries, (INK, "kept for reuse, held by nobody", True)])
    for block in range(blocks):
        y = top + lane * block
        art.text(left - 8, y + 13, f"block {block}", anchor="end", size=11, fill=FAINT)
        colour = INK
        for at, step in enumerate(run.steps):
            x = left + cell * at
            holders = [id for id, table in sorted(step.tables[0].items()) if block in table]
            for number, id in enumerate(holders):
                share = (cell - 1) / len(holders)
                art.box(x + number * share, y, share, lane - 2, COLOURS[id])
                colour = COLOURS[id]
            if not holders and block in step.cached:
                art.box(x, y, cell - 1, lane - 2, colour, opacity=0.3)
            elif not holders:
                art.box(x, y, cell - 1, lane - 2, "white", stroke="#eee")
    for at in range(len(run.steps)):
        middle = left + cell * (at + 0.5)
        art.text(middle, top + lane * blocks + 16, at, anchor="middle", size=11, fill=FAINT)
    art.text(left - 8, top + lane * blocks + 16, "step", anchor="end", size=11, fill=FAINT)
    return art.svg()


def draw_prefix() -> str:
    """Block tables of three prompts that begin alike, word by word."""
    words = Words()
    system = "You are a kind helper . Answer in one line ."
    questions = ["Why is the sky blue ?", "Why is the sea salty ?", "Name three rivers ."]
    requests = [
        Asked("ABC"[n], n, words.ids(f"{system} {text}"), words.ids("Well , so"))
        for n, text in enumerate(questions)
    ]
    run = Run(requests, scheduler(blocks=24, budget=32, sequences=4)).run()
    word, lane, left, top = 54, 64, 120, 56
    most = max(len(asked.prompt) for asked in requests)
    width = left + word * (-(-most // BLOCK) * BLOCK) + 40
    art = Drawing(width, top + lane * len(requests) + 24, "Three prompts that begin alike")
    seen: set[int] = set()
    for number, asked in enumerate(requests):
        first = next(step for step in run.steps if number in step.rows)
        table, y = first.tables[0][number], top + lane * number
        cached = run.sequences[number].num_cached
        art.text(20, y + 22, asked.name, weight=600)
        art.text(40, y + 22, f"{cached} cached", size=11, fill=FAINT)
        art.text(40, y + 37, f"{len(asked.prompt) - cached} computed", size=11, fill=FAINT)
        for page, block in enumerate(table):
            x = left + page * word * BLOCK
            shared = page * BLOCK < cached
            fill = YES if shared else DECODE
            art.box(x, y, word * BLOCK - 6, 46, fill, opacity=1 if shared else 0.55)
            for place, token in enumerate(asked.prompt[page * BLOCK : (page + 1) * BLOCK]):
                middle = x + word * (place + 0.5) - 3
                art.text(middle, y + 21, words.text(token), anchor="middle", size=11)
            origin = "shared" if shared else "own"
            art.text(x + 6, y + 40, f"block {block}, {origin}", size=10, fill="#555")
            seen.add(block)
    return art.svg()


def draw_window() -> str:
    """One sequence in a model with two kinds of layers: its pages by position, step by step."""
    asked = Asked("A", 0, list(range(14)), range(16))
    run = Run([asked], scheduler(blocks=16, budget=8, sequences=1, windows=(None, 6))).run()
    pages = max(len(table) for step in run.steps for table in (step.tables[0][0],))
    page, lane, left, top = 34, 17, 80, 92
    gap = left + page * pages + 70
    width, height = gap + page * pages + 30, top + lane * len(run.steps) + 20
    art = Drawing(width, height, "A sequence's pages in layers of two kinds")
    heads = ((left, "layers that see everything"), (gap, "layers that see 6 tokens"))
    for group, (x0, name) in enumerate(heads):
        art.text(x0, 58, name, weight=600)
        art.text(x0, 78, "pages by position →", size=11, fill=FAINT)
        for at, step in enumerate(run.steps):
            y = top + lane * at
            if group == 0:
                art.text(left - 8, y + 12, f"step {at}", anchor="end", size=11, fill=FAINT)
            for number, block in enumerate(step.tables[group][0]):
                x = x0 + page * number
                if block == RELEASED:
                    art.box(x, y, page - 2, lane - 3, "white", stroke="#bbb", dashed=True)
                else:
                    art.box(x, y, page - 2, lane - 3, COLOURS[group])
    return art.svg()


def draw_speculation() -> str:
    """An answer that quotes its prompt: guesses, and how many of them came true."""
    words = Words()
    prompt = words.ids(
        "Correct this : the cat sits on the mat and the dog lie on the rug and the bird sit "
        "in the tree . Corrected :"
    )
    answer = words.ids(
        "the cat sits on the mat and the dog lies on the rug and the bird sits in the tree ."
    )
    # Every step costs about the same, as one does that reads the weights whatever its tokens.
    costs = StepCosts(tokens=(1, 64), seconds=(1.0, 1.1))
    speculation = ImmediateSpeculation(PromptLookup(), Acceptance(costs), Limits(5))
    asked = Asked("A", 0, prompt, answer)
    run = Run([asked], scheduler(blocks=32, budget=64, sequences=1, speculation=speculation)).run()
    box, lane, left, top = 62, 34, 150, 84
    width, height = left + box * 7 + 110, top + lane * len(run.steps) + 20
    title = f"{len(answer)} tokens in {len(run.steps)} steps: guesses, and what came of them"
    art = Drawing(width, height, title)
    entries = [(YES, "guess that came true", False), (NO, "guess that did not", False)]
    art.legend(20, 52, [*entries, (DRAWN, "drawn by the model", False)])
    art.text(left - 12, 74, "behind", anchor="end", size=11, fill=FAINT)
    art.text(left, 74, "the step's answer, and what it did not keep", size=11, fill=FAINT)
    for at, step in enumerate(run.steps):
        y, row, drawn = top + lane * at, step.rows[0], step.drawn[0]
        behind = "the prompt" if at == 0 else f"… {words.text(row.token_ids[-1])}"
        art.text(left - 12, y + 18, behind, anchor="end", size=12)
        right, wrong = drawn[:-1], row.draft[len(drawn) - 1 :]
        cells = [(token, YES) for token in right] + [(drawn[-1], DRAWN)]
        for number, (token, colour) in enumerate(cells):
            art.box(left + box * number, y, box - 3, lane - 8, colour)
            middle = left + box * (number + 0.5)
            art.text(middle, y + 18, words.text(token), anchor="middle", size=12)
        for number, token in enumerate(wrong, len(cells)):
            x = left + box * number + 14
            art.box(x, y, box - 3, lane - 8, NO)
            art.text(x + box / 2, y + 18, words.text(token), anchor="middle", size=12)
    return art.svg()


PICTURES: dict[str, Callable[[], str]] = {
    "engine-batch": lambda: draw_batch(busy_day(), "Five requests, step by step"),
    "engine-blocks": lambda: draw_blocks(busy_day()),
    "engine-preemption": lambda: draw_batch(too_little_cache(), "Two requests, one too many"),
    "engine-prefix": draw_prefix,
    "engine-speculation": draw_speculation,
    "engine-window": draw_window,
}


def pictures() -> Iterator[tuple[str, str]]:
    """Names of files, and what belongs in them."""
    for name, draw in PICTURES.items():
        yield f"{name}.svg", draw()


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for name, svg in pictures():
        (IMAGES / name).write_text(svg, encoding="utf-8")
        print(IMAGES / name, file=sys.stderr)


if __name__ == "__main__":
    main()
