"""The scheduler as a state machine: requests come, go, fail and are aborted at any point.

Every row's attention is checked by the shadow runner, every book by the scheduler's own check.
"""

from __future__ import annotations

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forebay_engine.blocks import RELEASED
from forebay_engine.scheduler import _Entry
from forebay_engine.sequence import FinishReason, SamplingParams, Sequence
from forebay_engine.step import StepPlan, StepResult
from shadow_runner import ShadowRunner, expected, finish, guessing, make_scheduler

prompts = st.lists(st.integers(0, 2), min_size=1, max_size=9)
samplings = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 7),
    min_tokens=st.integers(0, 3),
    ignore_eos=st.booleans(),
)
#: Of the groups of layers: all see everything, all slide, or both; down to one position seen.
windows = st.sampled_from([(None,), (3,), (None, 1), (None, 4), (None, 7)])


class Serving(RuleBasedStateMachine):
    """The cache is too small for all that come."""

    @initialize(
        blocks=st.integers(8, 14),
        block_size=st.integers(2, 3),
        budget=st.integers(1, 12),
        sequences=st.integers(1, 5),
        prefix_cache=st.booleans(),
        windows=windows,
        speculation=st.sampled_from(["none", "ngram", "draft"]),
        guesses=st.integers(1, 5),
        seed=st.integers(0, 99),
    )
    def boot(
        self,
        blocks: int,
        block_size: int,
        budget: int,
        sequences: int,
        prefix_cache: bool,
        windows: tuple[int | None, ...],
        speculation: str,
        guesses: int,
        seed: int,
    ) -> None:
        self.scheduler = make_scheduler(
            blocks=blocks,
            block_size=block_size,
            budget=budget,
            sequences=sequences,
            prefix_cache=prefix_cache,
            windows=windows,
            speculation=guessing(speculation, guesses, block_size, seed),
        )
        self.guesses = guesses
        self.budget, self.limit = budget, sequences
        self.runner = ShadowRunner(block_size, windows, seed if speculation == "draft" else None)
        self.alive: dict[int, Sequence] = {}
        self.ended: set[int] = set()
        self.now = 0.0
        self.next_id = 0
        self.flying: tuple[StepPlan, list[tuple[tuple[int, ...], ...]]] | None = None
        self.first: tuple[int, int] = (-1, 0)

    @rule(
        prompt=prompts,
        sampling=samplings,
        n=st.integers(1, 3),
        priority=st.integers(-2, 2),
        seconds=st.none() | st.integers(1, 60),
    )
    def add(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        n: int,
        priority: int,
        seconds: int | None,
    ) -> None:
        deadline = None if seconds is None else self.now + seconds
        choices = [
            Sequence(self.next_id + i, prompt, sampling, priority, self.now, deadline)
            for i in range(n)
        ]
        self.next_id += n
        self.scheduler.add(*choices)
        self.alive |= {choice.id: choice for choice in choices}

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        victim = data.draw(st.sampled_from(sorted(self.alive)))
        self.scheduler.abort(victim)
        self.end(victim, FinishReason.ABORT)

    @rule(seconds=st.integers(1, 30))
    def wait(self, seconds: int) -> None:
        self.now += seconds
        late = {s.id for s in self.alive.values() if (s.deadline or 1e9) <= self.now}
        assert {sequence.id for sequence in self.scheduler.expire(self.now)} == late
        for id in late:
            self.end(id, FinishReason.DEADLINE)

    def end(self, id: int, reason: FinishReason) -> None:
        self.ended.add(id)
        assert self.alive.pop(id).finish_reason is reason
        flying = self.flying and id in {row.seq_id for row in self.flying[0].rows}
        assert flying or id not in self.scheduler._entries

    @precondition(lambda self: self.flying is None)
    @rule()
    def plan(self) -> None:
        before = {entry.sequence.id for entry in self.scheduler._running}
        held_back = {e.sequence.id for e in self.scheduler._waiting if self.is_held_back(e)}
        plan = self.scheduler.plan()
        assert (plan is not None) == bool(self.alive)
        if plan is None:
            return
        counts = [row.count for row in plan.rows]
        assert sum(counts) == plan.num_tokens <= self.budget
        assert len(counts) <= self.limit
        assert min(counts) >= 1
        assert sorted(counts, key=lambda count: count > 1) == counts
        # The first in rank of those who ran is in the step: that is the progress guarantee.
        ran = [e.sequence.id for e in self.scheduler._running if e.sequence.id in before]
        assert set(ran[:1]) <= {row.seq_id for row in plan.rows}
        for row in plan.rows:
            known = len(row.token_ids)
            assert row.sample == (row.start + row.count - len(row.draft) == known)
            # Guesses end before the answer does: one token is drawn behind them.
            assert known + len(row.draft) < row.num_prompt + row.sampling.max_tokens
        self.nobody_was_passed_over(before, held_back)
        self.flying = plan, [tuple(map(tuple, row.block_tables)) for row in plan.rows]

    def is_held_back(self, entry: _Entry) -> bool:
        """A running prompt has yet to compute what this one shares with it."""
        hit = self.scheduler.cache.match(entry.pages, entry.sequence.token_ids[:-1])
        return self.scheduler._computed_soon(entry, len(hit[0]))

    def nobody_was_passed_over(self, before: set[int], held_back: set[int]) -> None:
        """Of those let in now, none is behind one that waits, unless for a page being computed.

        Whoever is let in may take the pages that one who was held back would have found.
        """
        let_in = [e.rank for e in self.scheduler._running if e.sequence.id not in before]
        for entry in self.scheduler._waiting:
            id = entry.sequence.id
            if let_in and entry.rank < max(let_in) and id not in before | held_back:
                assert self.is_held_back(entry)

    @precondition(lambda self: self.flying is not None)
    @rule(data=st.data())
    def apply(self, data: st.DataObject) -> None:
        """Take the result; now and then some rows could not be executed."""
        assert self.flying is not None
        ids = [row.seq_id for row in self.flying[0].rows]
        chance = st.sampled_from([False] * 9 + [True])
        failed = data.draw(st.lists(st.sampled_from(ids), unique=True)) if data.draw(chance) else []
        self.finish_step(failed)

    def finish_step(self, failed: list[int]) -> None:
        assert self.flying is not None
        plan, tables = self.flying
        self.flying = None
        # What happened since the plan has not moved a page under the step.
        assert [tuple(map(tuple, row.block_tables)) for row in plan.rows] == tables
        result = self.runner.execute(plan)
        kept = StepResult(tuple(item for item in result.sampled if item.seq_id not in failed))
        progress = self.scheduler.apply(kept, failed)
        for id in set(failed) & self.alive.keys():
            self.end(id, FinishReason.ERROR)
        for sequence, taken in progress:
            assert sequence.id not in self.ended
            assert sequence.token_ids[-1] == taken[-1].token_id
            if sequence.finish_reason is not None:
                self.finished(self.alive.pop(sequence.id))

    def finished(self, sequence: Sequence) -> None:
        assert sequence.token_ids == expected(sequence.prompt_ids, sequence.sampling)
        assert sequence.id not in self.scheduler._entries

    @invariant()
    def books_agree(self) -> None:
        self.scheduler.check()

    @invariant()
    def what_is_published_is_what_was_written(self) -> None:
        size = self.scheduler.cache.block_size
        for group, pool in enumerate(self.scheduler.cache.pools):
            for block, content in pool._content.items():
                written = [self.runner.slots[group, block, offset] for offset in range(size)]
                assert array("q", [prefix[-1] for prefix in written]).tobytes() == content.tokens
                assert all(prefix == written[-1][: len(prefix)] for prefix in written)

    @invariant()
    def windows_hold_no_more_than_they_see(self) -> None:
        cache = self.scheduler.cache
        for entry in self.scheduler._running:
            for group, table in zip(cache.groups, entry.pages.tables, strict=True):
                held = len(table) - table.count(RELEASED)
                tokens = len(entry.sequence.token_ids) + 2 * self.guesses
                assert held <= group.most_pages(tokens, self.budget, cache.block_size)

    @invariant()
    def the_first_never_loses_what_it_has(self) -> None:
        running = self.scheduler._running
        if running:
            first = running[0].sequence
            assert first.id != self.first[0] or first.num_computed >= self.first[1]
            self.first = (first.id, first.num_computed)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            if self.flying is not None:
                self.finish_step([])
            if not self.alive:
                break
            self.plan()
        assert self.scheduler.plan() is None
        self.scheduler.check()
        assert self.scheduler.cache.in_use == 0
        assert self.scheduler.running == self.scheduler.waiting == 0
        counters = self.scheduler.counters
        ends = (counters.finished, counters.aborted, counters.expired, counters.failed)
        assert sum(ends) == self.next_id


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@settings(max_examples=40)
@given(
    requests=st.lists(st.tuples(prompts, samplings), min_size=1, max_size=6),
    budget=st.integers(1, 20),
    block_size=st.integers(1, 4),
    prefix_cache=st.booleans(),
    windows=windows,
)
def test_answers_depend_on_nothing_but_the_prompt(
    requests: list[tuple[list[int], SamplingParams]],
    budget: int,
    block_size: int,
    prefix_cache: bool,
    windows: tuple[int | None, ...],
) -> None:
    # Room for the longest alone, so that several must take turns.
    scheduler = make_scheduler(
        blocks=-(-16 // block_size),
        block_size=block_size,
        budget=budget,
        prefix_cache=prefix_cache,
        windows=windows,
    )
    sequences = [Sequence(i, prompt, sampling) for i, (prompt, sampling) in enumerate(requests)]
    for sequence in sequences:
        scheduler.add(sequence)
    finish(scheduler)
    for sequence in sequences:
        assert sequence.token_ids == expected(sequence.prompt_ids, sequence.sampling)
