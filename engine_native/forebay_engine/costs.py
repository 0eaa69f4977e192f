"""What a step costs, by its size, and how many guesses are therefore worth verifying."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from itertools import accumulate
from time import perf_counter

from forebay_engine.cache import CacheGroup
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import Row, StepPlan

#: What guesses must promise at least, in tokens per second against none: the table is not exact.
_MARGIN = 1.05
#: Tokens of the steps that are timed, and how often each is.
_SIZES, _RUNS = (1, 2, 4, 8, 16, 32), 3
#: Tokens that are in the cache before.
_CONTEXT = 126


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of a step, as measured on this machine."""

    #: Tokens in a step, rising; steps between two of them cost as on the line between.
    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    #: Of each row with guesses, on top: its attention has several queries.
    drafted_row: float = 0.0

    def of(self, tokens: int, drafted_rows: int) -> float:
        """Seconds of a step of so many tokens, guesses among them."""
        return self._line(tokens) + drafted_rows * self.drafted_row

    def __str__(self) -> str:
        each = zip(self.tokens, self.seconds, strict=True)
        found = ", ".join(f"{tokens}: {1000 * seconds:.1f} ms" for tokens, seconds in each)
        return f"steps by tokens: {found}; each row with guesses: {1000 * self.drafted_row:.1f} ms"

    def _line(self, tokens: int) -> float:
        if len(self.tokens) == 1:
            return self.seconds[0]
        at = min(max(1, bisect_left(self.tokens, tokens)), len(self.tokens) - 1)
        (x0, x1), (y0, y1) = self.tokens[at - 1 : at + 1], self.seconds[at - 1 : at + 1]
        return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)


def worthwhile(
    chances: Items[Items[float]],
    costs: StepCosts,
    *,
    tokens: int,
    draws: int,
    budget: int,
    depth_seconds: float = 0.0,
) -> list[int]:
    """Of each row, how many guesses to verify for the most tokens a second.

    A step yields a token for each row that draws one, and one for each guess that comes true. The
    likeliest guesses are taken first; their number is the one with the best yield per second.

    :param chances: of each row's guesses, that it and all before it come true; none rises.
    :param tokens: in the step without guesses.
    :param draws: rows that draw a token.
    :param budget: most guesses in all.
    :param depth_seconds: to make the next guess of every row that wants one.
    """
    longest = max(map(len, chances), default=0)
    best, taken = _MARGIN * draws / costs.of(tokens, 0), list[int]()
    for depth in range(1, longest + 1) if depth_seconds else [longest]:
        ranked = sorted(
            ((chance, row) for row, chain in enumerate(chances) for chance in chain[:depth]),
            key=lambda item: -item[0],
        )
        expected, drafted = float(draws), set[int]()
        for number, (chance, row) in enumerate(ranked[:budget], 1):
            expected += chance
            drafted.add(row)
            seconds = costs.of(tokens + number, len(drafted)) + depth * depth_seconds
            if expected / seconds > best:
                best, taken = expected / seconds, [row for _, row in ranked[:number]]
    lengths = Counter(taken)
    return [lengths[row] for row in range(len(chances))]


def measured(
    execute: Callable[[StepPlan], object], groups: Items[CacheGroup], block_size: int
) -> StepCosts:
    """Time real steps, before any request; writes into the first pages of each group."""
    smallest = min(group.num_blocks for group in groups)
    context = max(0, min(_CONTEXT, smallest * block_size - 2))
    pages = -(-(context + 2) // block_size)

    def plan(rows: int, guesses: int) -> StepPlan:
        tables = [
            (tuple(range(row * pages, (row + 1) * pages)),) * len(groups) for row in range(rows)
        ]
        return StepPlan(tuple(_row(table, context, guesses) for table in tables))

    sizes = tuple(size for size in _SIZES if size * pages <= smallest) or (1,)
    rows = sizes[-1] // 2
    plans = [plan(size, 0) for size in sizes] + ([plan(rows, 1)] if rows else [])
    seconds = _fastest(execute, plans)
    # No step costs more than a larger one: what looks like it is the machine's noise, which adds.
    rising = tuple(reversed(list(accumulate(reversed(seconds[: len(sizes)]), min))))
    costs = StepCosts(sizes, rising)
    if not rows:
        return costs
    return replace(costs, drafted_row=max(0.0, seconds[-1] - costs.of(2 * rows, 0)) / rows)


def _row(tables: tuple[tuple[int, ...], ...], context: int, guesses: int) -> Row:
    return Row(
        seq_id=-1 - tables[0][0],
        token_ids=(0,) * (context + 1),
        start=context,
        count=1 + guesses,
        block_tables=tables,
        sample=True,
        sampling=SamplingParams(temperature=0.0),
        num_prompt=context,
        draft=(0,) * guesses,
    )


def _fastest(execute: Callable[[StepPlan], object], plans: Items[StepPlan]) -> list[float]:
    """Seconds of each plan's fastest run but for the first, which may lay out kernels.

    All in turn and then again, so that a bad moment hits none in all of its runs.
    """
    found = [list[float]() for _ in plans]
    for _ in range(1 + _RUNS):
        for plan, taken in zip(plans, found, strict=True):
            begin = perf_counter()
            execute(plan)
            taken.append(perf_counter() - begin)
    return [min(taken[1:]) for taken in found]
