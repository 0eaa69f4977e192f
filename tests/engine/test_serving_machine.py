"""The scheduler as a state machine: requests come, go, fail and are aborted at any point.

Every row's attention is checked by the shadow runner, every book by the scheduler's own check. Half
of the time it runs ahead of a runner that writes nothing before it is asked for the result.
"""

from __future__ import annotations

from array import array
from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forebay_engine.blocks import RELEASED
from forebay_engine.queues import Entry
from forebay_engine.sequence import FinishReason, SamplingParams, Sequence
from forebay_engine.step import Row, StepResult
from late_runner import Late, LateRunner, copied
from shadow_runner import ShadowRunner, expected, finish, guessing, make_scheduler

prompts = st.lists(st.integers(0, 2), min_size=1, max_size=9)
samplings = st.builds(
    SamplingParams,
    max_tokens=st.sampled_from([1, 2, 5, 7, 7]),
    min_tokens=st.integers(0, 3),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), (3, 5, 7)]),
    # Of such the next token can't be drawn behind an unknown one.
    bad_words=st.sampled_from([()] * 4 + [((99,),)]),
)
#: Of the groups of layers: all see everything, all slide, or both; down to one position seen.
windows = st.sampled_from([(None,), (3,), (None, 1), (None, 4), (None, 7)])


class Form:
    """Allows everything, but has to be told each token."""

    may_end = True
    failure = None

    def take(self, token_id: int) -> bool:
        return False


class Serving(RuleBasedStateMachine):
    """The cache is too small for all that come."""

    @initialize(
        blocks=st.integers(8, 14),
        block_size=st.integers(2, 3),
        budget=st.integers(1, 12),
        sequences=st.integers(1, 5),
        prefix_cache=st.booleans(),
        windows=windows,
        mode=st.sampled_from(["none", "ngram", "draft", "ahead", "ahead", "ahead"]),
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
        mode: str,
        guesses: int,
        seed: int,
    ) -> None:
        shadow = ShadowRunner(block_size, windows, seed if mode == "draft" else None)
        self.shadow, self.runner = shadow, LateRunner(shadow)
        self.scheduler = make_scheduler(
            blocks=blocks,
            block_size=block_size,
            budget=budget,
            sequences=sequences,
            prefix_cache=prefix_cache,
            windows=windows,
            speculation=guessing(mode, guesses, block_size, seed),
            ahead=self.runner.takes_unknown if mode == "ahead" else None,
        )
        self.guesses = guesses
        self.budget, self.limit = budget, sequences
        self.alive: dict[int, Sequence] = {}
        self.ended: set[int] = set()
        self.now = 0.0
        self.next_id = 0
        #: The steps under way: as launched, and what comes of them.
        self.flying: deque[tuple[list[Row], Late]] = deque()
        self.first: tuple[int, int] = (-1, 0)

    @rule(
        prompt=prompts,
        sampling=samplings,
        n=st.integers(1, 3),
        priority=st.integers(-2, 2),
        seconds=st.none() | st.integers(1, 60),
        guided=st.sampled_from([False] * 5 + [True]),
    )
    def add(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        n: int,
        priority: int,
        seconds: int | None,
        guided: bool,
    ) -> None:
        deadline = None if seconds is None else self.now + seconds
        choices = [
            Sequence(self.next_id + i, prompt, sampling, priority, self.now, deadline)
            for i in range(n)
        ]
        for choice in choices:
            choice.guide = Form() if guided else None  # type: ignore[assignment] # its masks are not asked for
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
        assert self.is_flying(id) or id not in self.scheduler._queues.entries

    def is_flying(self, id: int) -> bool:
        return any(row.seq_id == id for rows, _ in self.flying for row in rows)

    def has_to_wait(self, id: int) -> bool:
        """Nothing can be planned for it before it is known which token is drawn for it."""
        sequence = self.alive[id]
        drawing = any(row.seq_id == id and row.sample for rows, _ in self.flying for row in rows)
        told = sequence.guide is not None or bool(sequence.sampling.bad_words)
        return drawing and (told or sequence.num_output + 1 == sequence.sampling.max_tokens)

    @precondition(lambda self: len(self.flying) < self.scheduler.most_in_flight)
    @rule()
    def plan(self) -> None:
        before = {entry.sequence.id for entry in self.scheduler._queues.running}
        held_back = {e.sequence.id for e in self.scheduler._queues.waiting if self.is_held_back(e)}
        waiting = {id for id in self.alive if self.has_to_wait(id)}
        lost = self.scheduler.counters.preempted
        plan = self.scheduler.plan()
        if not self.flying:
            assert (plan is not None) == bool(self.alive)
        # Nobody loses pages that are being written.
        assert not self.flying or lost == self.scheduler.counters.preempted
        if plan is None:
            return
        assert not waiting & {row.seq_id for row in plan.rows}
        counts = [row.count for row in plan.rows]
        assert sum(counts) == plan.num_tokens <= self.budget
        assert len(counts) <= self.limit
        assert min(counts) >= 1
        assert sorted(counts, key=lambda count: count > 1) == counts
        # The first in rank of those who ran is in the step: that is the progress guarantee.
        ran = [e.sequence.id for e in self.scheduler._queues.running if e.sequence.id in before]
        ran = [id for id in ran if id not in waiting]
        assert set(ran[:1]) <= {row.seq_id for row in plan.rows}
        for row in plan.rows:
            known = len(row.token_ids) + row.unknown
            assert row.unknown <= len(self.flying)
            assert row.sample == (row.start + row.count - len(row.draft) == known)
            # Guesses end before the answer does: one token is drawn behind them.
            assert known + len(row.draft) < row.num_prompt + row.sampling.max_tokens
        self.nobody_was_passed_over(before, held_back)
        self.flying.append(([copied(row) for row in plan.rows], self.runner.launch(plan)))

    def is_held_back(self, entry: Entry) -> bool:
        """A running prompt has yet to compute what this one shares with it."""
        hit = self.scheduler.cache.match(entry.pages, entry.sequence.token_ids[:-1])
        return self.scheduler._planner.computed_soon(entry, len(hit[0]))

    def nobody_was_passed_over(self, before: set[int], held_back: set[int]) -> None:
        """Of those let in now, none is behind one that waits, unless for a page being computed.

        Whoever is let in may take the pages that one who was held back would have found.
        """
        let_in = [e.rank for e in self.scheduler._queues.running if e.sequence.id not in before]
        for entry in self.scheduler._queues.waiting:
            id = entry.sequence.id
            if let_in and entry.rank < max(let_in) and id not in before | held_back:
                assert self.is_held_back(entry)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def apply(self, data: st.DataObject) -> None:
        """Take the result; now and then the step fails, and some rows again."""
        ids = [row.seq_id for row in self.flying[0][0]]
        fails = data.draw(st.sampled_from([False] * 9 + [True]))
        failed = data.draw(st.lists(st.sampled_from(ids), unique=True)) if fails else []
        self.finish_step(fails, failed)

    @precondition(lambda self: self.flying)
    @rule()
    def go_on(self) -> None:
        """As the engine does it: one result after the other, and always the next step launched."""
        for _ in range(2):
            if len(self.flying) < self.scheduler.most_in_flight:
                self.plan()
        self.finish_step(False, [])
        if len(self.flying) < self.scheduler.most_in_flight:
            self.plan()

    def finish_step(self, fails: bool, failed: list[int]) -> None:
        rows, late = self.flying.popleft()
        result = self.again(rows) if fails else late.result()
        there = {row.seq_id for row in rows} & self.scheduler._queues.entries.keys()
        failed = [id for id in failed if id in there]
        kept = StepResult(
            tuple(item for item in result.sampled if item.seq_id not in failed),
            guessed=result.guessed,
        )
        progress = self.scheduler.apply(kept, failed)
        for id in set(failed) & self.alive.keys():
            self.end(id, FinishReason.ERROR)
        for sequence, taken in progress:
            assert sequence.id not in self.ended
            assert sequence.token_ids[-1] == taken[-1].token_id
            if sequence.finish_reason is not None:
                self.finished(self.alive.pop(sequence.id))

    def again(self, rows: list[Row]) -> StepResult:
        """As :class:`~forebay_engine.pipeline.Pipeline` does it."""
        self.shadow.spoil(rows)
        while self.flying:
            behind, _ = self.flying.pop()
            self.shadow.spoil(behind)
            self.scheduler.discard()
        again = self.scheduler.retry()
        assert all(row.unknown == 0 and row.seq_id in self.alive for row in again.rows)
        return self.runner.execute(again)

    def finished(self, sequence: Sequence) -> None:
        assert sequence.token_ids == expected(sequence.prompt_ids, sequence.sampling)
        assert self.is_flying(sequence.id) or sequence.id not in self.scheduler._queues.entries

    @invariant()
    def books_agree(self) -> None:
        self.scheduler.check()

    @invariant()
    def a_launched_step_keeps_its_pages(self) -> None:
        """Nobody else has one that it will write or read, and none has moved."""
        cache, entries = self.scheduler.cache, self.scheduler._queues.entries
        for row in (row for rows, _ in self.flying for row in rows):
            live = entries[row.seq_id].pages.tables
            for group, launched, table, pool in zip(
                cache.groups, row.block_tables, live, cache.pools, strict=True
            ):
                size = cache.block_size
                end = -(-(row.start + row.count) // size)
                seen = slice(group.first_page(row.start, size), end)
                assert launched[seen] == table[seen]
                written = launched[row.start // size : end]
                assert all(pool._holders[block] == 1 for block in written)
                assert not pool._content.keys() & set(written)

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
        for entry in self.scheduler._queues.running:
            for group, table in zip(cache.groups, entry.pages.tables, strict=True):
                held = len(table) - table.count(RELEASED)
                tokens = entry.total + 2 * self.guesses
                assert held <= group.most_pages(tokens, self.budget, cache.block_size)

    @invariant()
    def the_first_never_loses_what_it_has(self) -> None:
        running = self.scheduler._queues.running
        if running:
            first = running[0].sequence
            assert first.id != self.first[0] or first.num_computed >= self.first[1]
            self.first = (first.id, first.num_computed)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            if len(self.flying) < self.scheduler.most_in_flight and self.alive:
                self.plan()
            if self.flying:
                self.finish_step(False, [])
            elif not self.alive:
                break
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
