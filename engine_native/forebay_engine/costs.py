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
    chances: Items[Items[float]], costs: StepCosts, *, tokens: int, draws: int, budget: int
) -> list[int]:
    """Of each row, how many guesses to verify for the most tokens a second.

    A step yields a token for each row that draws one, and one for each guess that comes true. The
    likeliest guesses are taken first; their number is the one with the best yield per second.

    :param chances: of each row's guesses, that it and all before it come true; none rises.
    :param tokens: in the step without guesses.
    :param draws: rows that draw a token.
    :param budget: most guesses in all.
    """
    ranked = sorted(
        ((chance, row) for row, chain in enumerate(chances) for chance in chain),
        key=lambda item: -item[0],
    )
    expected, drafted = float(draws), set[int]()
    best, taken = _MARGIN * expected / costs.of(tokens, 0), 0
    for number, (chance, row) in enumerate(ranked[:budget], 1):
        expected += chance
        drafted.add(row)
        rate = expected / costs.of(tokens + number, len(drafted))
        if rate > best:
            best, taken = rate, number
    lengths = Counter(row for _, row in ranked[:taken])
    return [lengths[row] for row in range(len(chances))]


def measured(
    execute: Callable[[StepPlan], object], groups: Items[CacheGroup], block_size: int
) -> StepCosts:
    """Time real steps, before any request; writes into the first pages of each group."""
    largest = min(group.num_blocks for group in groups) // 2
    sizes = tuple(size for size in _SIZES if size <= largest)
    seconds = tuple(_fastest(execute, _steps(size, 0, block_size, len(groups))) for size in sizes)
    # No step is cheaper than a smaller one: what looks like it is the machine's noise.
    costs = StepCosts(sizes, tuple(accumulate(seconds, max)))
    rows = sizes[-1] // 2
    if not rows:
        return costs
    several = _fastest(execute, _steps(rows, 1, block_size, len(groups)))
    return replace(costs, drafted_row=max(0.0, several - costs.of(2 * rows, 0)) / rows)


def _steps(rows: int, guesses: int, block_size: int, groups: int) -> StepPlan:
    """Rows of one token and some guesses, each on pages of its own."""
    pages = -(-(1 + guesses) // block_size)
    return StepPlan(
        tuple(
            Row(
                seq_id=-1 - row,
                token_ids=(0,),
                start=0,
                count=1 + guesses,
                block_tables=(tuple(range(row * pages, (row + 1) * pages)),) * groups,
                sample=True,
                sampling=SamplingParams(temperature=0.0),
                num_prompt=1,
                draft=(0,) * guesses,
            )
            for row in range(rows)
        )
    )


def _fastest(execute: Callable[[StepPlan], object], plan: StepPlan) -> float:
    """Seconds of the fastest run but for the first, which may lay out kernels."""
    execute(plan)
    found = []
    for _ in range(_RUNS):
        begin = perf_counter()
        execute(plan)
        found.append(perf_counter() - begin)
    return min(found)
