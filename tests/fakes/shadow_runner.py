"""A runner for the scheduler that has no model but a memory.

It writes, into each slot of the cache, the sequence's tokens up to there, and looks up every slot
that attention would read: a stale, foreign or half-written one fails the test. Tokens are drawn
from a hash of those before them, so a sequence's answer is a function of its prompt, whatever
happens to its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from random import Random

from forebay_engine.cache import CacheGroup, KVCache
from forebay_engine.costs import StepCosts
from forebay_engine.scheduler import Scheduler
from forebay_engine.sequence import SamplingParams
from forebay_engine.speculation import Guess, Speculation
from forebay_engine.step import Row, Sampled, StepPlan, StepResult

EOS = 9


def drawn(tokens: tuple[int, ...]) -> int:
    """The next token after ``tokens``: any digit, now and then EOS."""
    return hash((97, *tokens)) % 10


def expected(prompt: list[int], sampling: SamplingParams) -> list[int]:
    tokens, answer = list(prompt), 0
    while answer < sampling.max_tokens:
        tokens.append(drawn(tuple(tokens)))
        answer += 1
        if tokens[-1] == EOS and not sampling.ignore_eos and answer >= sampling.min_tokens:
            break
    return tokens


class ShadowRunner:
    """``windows``: of the groups of layers."""

    def __init__(self, block_size: int, windows: Items[int | None] = (None,)) -> None:
        self.block_size = block_size
        self.windows = windows
        #: By group, page and place in it: the tokens up to the one that is kept there.
        self.slots: dict[tuple[int, int, int], tuple[int, ...]] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        # All writes of a step happen before any read is trusted, as on a device.
        for row in plan.rows:
            for group in range(len(self.windows)):
                for position in range(row.start, row.start + row.count):
                    self.slots[self._slot(row, group, position)] = self._prefix(row, position)
        for row in plan.rows:
            for group, window in enumerate(self.windows):
                first = 0 if window is None else max(0, row.start - window + 1)
                for position in range(first, row.start + row.count):
                    slot = self._slot(row, group, position)
                    assert self.slots[slot] == self._prefix(row, position)
        return StepResult(tuple(item for row in plan.rows if row.sample for item in _draw(row)))

    def _slot(self, row: Row, group: int, position: int) -> tuple[int, int, int]:
        page = row.block_tables[group][position // self.block_size]
        assert page >= 0
        return group, page, position % self.block_size

    def _prefix(self, row: Row, position: int) -> tuple[int, ...]:
        return tuple([*row.token_ids, *row.draft][: position + 1])


def _draw(row: Row) -> Iterator[Sampled]:
    """A token after the last known one, and after each guess that came true."""
    known = list(row.token_ids)
    for guess in [*row.draft, None]:
        token = drawn(tuple(known))
        yield Sampled(row.seq_id, token)
        if guess != token:
            return
        known.append(token)


def make_scheduler(
    *,
    blocks: int = 8,
    block_size: int = 2,
    budget: int = 8,
    sequences: int = 8,
    model_len: int = 100,
    prefix_cache: bool = True,
    windows: Items[int | None] = (None,),
    speculation: Speculation | None = None,
) -> Scheduler:
    groups = [CacheGroup(blocks, window) for window in windows]
    return Scheduler(
        KVCache(groups, block_size, prefix_cache=prefix_cache),
        max_step_tokens=budget,
        max_sequences=sequences,
        max_model_len=model_len,
        eos_token_ids=frozenset({EOS}),
        speculation=speculation,
    )


class Guesser:
    """Guesses right or wrong by chance, whatever came before."""

    def __init__(self, seed: int) -> None:
        self._chance = Random(seed)

    def guess(self, row: Row, most: int) -> Guess:
        tokens = list(row.token_ids)
        for _ in range(self._chance.randint(0, most)):
            right = self._chance.random() < 0.7
            tokens.append(drawn(tuple(tokens)) if right else self._chance.randrange(10))
        return Guess(tuple(tokens[len(row.token_ids) :]), self._chance.randrange(9))

    def forget(self, seq_id: int) -> None:
        pass


def guessing(seed: int, most: int) -> Speculation:
    """Verifies all guesses: steps cost the same, however large."""
    return Speculation(Guesser(seed), StepCosts((1,), (1.0,)), most, frozenset({EOS}))


def run(scheduler: Scheduler, runner: ShadowRunner) -> Iterator[StepPlan]:
    while plan := scheduler.plan():
        scheduler.apply(runner.execute(plan))
        scheduler.check()
        yield plan


def finish(scheduler: Scheduler) -> list[StepPlan]:
    windows = [group.window for group in scheduler.cache.groups]
    return list(run(scheduler, ShadowRunner(scheduler.cache.block_size, windows)))
