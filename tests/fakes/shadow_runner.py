"""A runner for the scheduler that has no model but a memory.

It writes, into each slot of the cache, the sequence's tokens up to there, and looks up every slot
that attention would read: a stale, foreign or half-written one fails the test. Tokens are drawn
from a hash of those before them, so a sequence's answer is a function of its prompt, whatever
happens to its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Items
from random import Random

from forebay_engine.acceptance import Acceptance, Guess
from forebay_engine.cache import CacheGroup, KVCache
from forebay_engine.costs import StepCosts
from forebay_engine.scheduler import Scheduler
from forebay_engine.sequence import SamplingParams
from forebay_engine.speculation import (
    DraftSpeculation,
    ImmediateSpeculation,
    Limits,
    Speculation,
)
from forebay_engine.step import Guessed, Row, Sampled, StepPlan, StepResult

EOS = 9


def drawn(tokens: tuple[int, ...]) -> int:
    """The next token after ``tokens``: any digit, now and then EOS."""
    return hash((97, *tokens)) % 10


def expected(prompt: list[int], sampling: SamplingParams) -> list[int]:
    tokens, answer = list(prompt), 0
    while answer < sampling.max_tokens:
        tokens.append(drawn(tuple(tokens)))
        answer += 1
        if answer >= sampling.min_tokens and tokens[-1] in sampling.ends(frozenset({EOS})):
            break
    return tokens


#: By group, page and place in it: the tokens up to the one that is kept there.
Slots = dict[tuple[int, int, int], tuple[int, ...]]


class ShadowRunner:
    """``windows``: of the groups of layers. It has a draft model too, if ``seed`` is not None."""

    def __init__(
        self, block_size: int, windows: Items[int | None] = (None,), seed: int | None = None
    ) -> None:
        self.block_size = block_size
        self.windows = windows
        self.slots: Slots = {}
        #: The draft model's.
        self.drafted: Slots = {}
        self._chance = Random(seed) if seed is not None else None

    def spoil(self, rows: Items[Row]) -> None:
        """Leave what a step may have written that failed."""
        for row in rows:
            self._compute(self.slots, row, [-7] * (row.start + row.count), row.start, row.count)

    def execute(self, plan: StepPlan) -> StepResult:
        # All writes of a step happen before any read is trusted, as on a device.
        for row in plan.rows:
            self._compute(self.slots, row, [*row.token_ids, *row.draft], row.start, row.count)
        for row in plan.rows:
            self._check(self.slots, row, [*row.token_ids, *row.draft], row.start, row.count)
        sampled = {row.seq_id: list(_draw(row)) for row in plan.rows if row.sample}
        return StepResult(
            tuple(item for items in sampled.values() for item in items),
            guessed=tuple(self._guess(plan.rows, sampled)),
        )

    def _guess(self, rows: Items[Row], sampled: dict[int, list[Sampled]]) -> Iterator[Guessed]:
        """As :class:`~forebay_engine.draft_model.DraftModel` does, right or wrong by chance."""
        for row in rows:
            assert self._chance is not None or row.lookahead is None
            if self._chance is None or row.lookahead is None:
                continue
            drawn = [item.token_id for item in sampled.get(row.seq_id, [])]
            computed = row.start + row.count - len(row.draft) + max(0, len(drawn) - 1)
            known = [*row.token_ids, *drawn][: computed + (row.lookahead.count > 0)]
            start = min(row.lookahead.start, computed)
            guesses = guessed(known, row.lookahead.count, self._chance)
            tokens = [*known, *guesses[:-1]]
            self._compute(self.drafted, row, tokens, start, len(tokens) - start)
            self._check(self.drafted, row, tokens, start, len(tokens) - start)
            if guesses:
                yield Guessed(row.seq_id, tuple(guesses))

    def _compute(self, slots: Slots, row: Row, tokens: list[int], start: int, count: int) -> None:
        for group in range(len(self.windows)):
            for position in range(start, start + count):
                slots[self._slot(row, group, position)] = tuple(tokens[: position + 1])

    def _check(self, slots: Slots, row: Row, tokens: list[int], start: int, count: int) -> None:
        for group, window in enumerate(self.windows):
            first = 0 if window is None else max(0, start - window + 1)
            for position in range(first, start + count):
                slot = self._slot(row, group, position)
                assert slots[slot] == tuple(tokens[: position + 1])

    def _slot(self, row: Row, group: int, position: int) -> tuple[int, int, int]:
        page = row.block_tables[group][position // self.block_size]
        assert page >= 0
        return group, page, position % self.block_size


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
    ahead: Callable[[SamplingParams], bool] | None = None,
) -> Scheduler:
    groups = [CacheGroup(blocks, window) for window in windows]
    return Scheduler(
        KVCache(groups, block_size, prefix_cache=prefix_cache),
        max_step_tokens=budget,
        max_sequences=sequences,
        max_model_len=model_len,
        eos_token_ids=frozenset({EOS}),
        speculation=speculation,
        ahead=ahead,
    )


def guessed(tokens: Items[int], count: int, chance: Random) -> list[int]:
    """Guesses to follow the tokens, right or wrong by chance."""
    known = list(tokens)
    for _ in range(count):
        right = chance.random() < 0.7
        known.append(drawn(tuple(known)) if right else chance.randrange(10))
    return known[len(tokens) :]


class Guesser:
    """Guesses as many tokens as it likes, whatever came before."""

    def __init__(self, seed: int) -> None:
        self._chance = Random(seed)

    def guess(self, row: Row, most: int) -> Guess:
        found = guessed(row.token_ids, most, self._chance)
        return Guess(tuple(found), self._chance.randrange(9))

    def forget(self, seq_id: int) -> None:
        pass


class Whim(Acceptance):
    """Any number of guesses is worth it, at any time."""

    def __init__(self, seed: int) -> None:
        super().__init__(StepCosts((1,), (1.0,)))
        self._chance = Random(seed)

    def lengths(
        self, offers: Mapping[int, tuple[int, int]], *, tokens: int, draws: int, budget: int
    ) -> dict[int, int]:
        found = {}
        for seq_id, (_, most) in offers.items():
            found[seq_id] = min(budget, self._chance.choice([0, 0, 1, most]))
            budget -= found[seq_id]
        return found


def guessing(kind: str, most: int, block_size: int, seed: int) -> Speculation | None:
    """``none``, ``ngram`` or ``draft``."""
    limits = Limits(most, frozenset({EOS}))
    if kind == "ngram":
        return ImmediateSpeculation(Guesser(seed), Whim(seed), limits)
    return DraftSpeculation(Whim(seed), limits, block_size) if kind == "draft" else None


def run(scheduler: Scheduler, runner: ShadowRunner) -> Iterator[StepPlan]:
    while plan := scheduler.plan():
        scheduler.apply(runner.execute(plan))
        scheduler.check()
        yield plan


def finish(scheduler: Scheduler) -> list[StepPlan]:
    windows = [group.window for group in scheduler.cache.groups]
    return list(run(scheduler, ShadowRunner(scheduler.cache.block_size, windows)))
