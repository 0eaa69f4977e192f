"""The scheduler against a runner that has no model but a memory.

The shadow runner writes, into each slot of the cache, the hash of the sequence's tokens up to
there, and looks up every slot that attention would read: a stale, foreign or half-written one fails
the test. Tokens are drawn from the hash, so a sequence's answer is a function of its prompt,
whatever happens to its neighbours.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from forebay_engine.blocks import BlockPool
from forebay_engine.errors import RequestRefused
from forebay_engine.scheduler import Scheduler
from forebay_engine.sequence import FinishReason, SamplingParams, Sequence
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
    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.slots: dict[tuple[int, int], int] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        # All writes of a step happen before any read is trusted, as on a device.
        for row in plan.rows:
            for position in range(row.start, row.start + row.count):
                self.slots[self._slot(row, position)] = self._prefix(row, position)
        for row in plan.rows:
            for position in range(row.start + row.count):
                assert self.slots[self._slot(row, position)] == self._prefix(row, position)
        return StepResult(
            tuple(
                Sampled(row.seq_id, drawn(tuple(row.token_ids[: row.start + row.count])))
                for row in plan.rows
                if row.sample
            )
        )

    def _slot(self, row: Row, position: int) -> tuple[int, int]:
        return row.block_table[position // self.block_size], position % self.block_size

    def _prefix(self, row: Row, position: int) -> int:
        return hash(tuple(row.token_ids[: position + 1]))


def make_scheduler(
    *,
    blocks: int = 8,
    block_size: int = 2,
    budget: int = 8,
    sequences: int = 8,
    model_len: int = 100,
    prefix_cache: bool = True,
) -> Scheduler:
    return Scheduler(
        BlockPool(blocks, block_size, prefix_cache=prefix_cache),
        max_step_tokens=budget,
        max_sequences=sequences,
        max_model_len=model_len,
        eos_token_ids=frozenset({EOS}),
    )


def make_sequence(id: int, prompt: list[int], **sampling: object) -> Sequence:
    return Sequence(id, prompt, SamplingParams(**sampling))  # type: ignore[arg-type] # by keyword


def run(scheduler: Scheduler, runner: ShadowRunner) -> Iterator[StepPlan]:
    while plan := scheduler.plan():
        scheduler.apply(runner.execute(plan))
        scheduler.check()
        yield plan


def finish(scheduler: Scheduler) -> list[StepPlan]:
    return list(run(scheduler, ShadowRunner(scheduler.pool.block_size)))


def test_long_prompts_are_computed_in_chunks_beside_decodes() -> None:
    scheduler = make_scheduler(blocks=40, budget=4)
    scheduler.add(make_sequence(0, [1, 2], max_tokens=8, ignore_eos=True))
    scheduler.add(make_sequence(1, [3] * 9, max_tokens=2, ignore_eos=True))
    plans = finish(scheduler)
    shape = [[(row.seq_id, row.count, row.sample) for row in plan.rows] for plan in plans]
    assert shape[:5] == [
        [(0, 2, True), (1, 2, False)],
        [(0, 1, True), (1, 3, False)],
        [(0, 1, True), (1, 3, False)],
        [(0, 1, True), (1, 1, True)],
        [(0, 1, True), (1, 1, True)],
    ]


def test_a_second_equal_prompt_computes_its_last_block_only() -> None:
    scheduler = make_scheduler(blocks=40)
    first = make_sequence(0, [1, 2, 3, 4, 5, 6], max_tokens=1)
    second = make_sequence(1, [1, 2, 3, 4, 5, 6], max_tokens=1)
    runner = ShadowRunner(2)
    scheduler.add(first)
    assert [plan.num_tokens for plan in run(scheduler, runner)] == [6]
    scheduler.add(second)
    # Six tokens are cached, but the last one is computed for its logits, so its block is too.
    assert [plan.num_tokens for plan in run(scheduler, runner)] == [2]
    assert (first.num_cached, second.num_cached) == (0, 4)
    assert scheduler.counters.cached_tokens == 4


def test_what_arrives_together_computes_what_it_shares_once() -> None:
    for prefix_cache in (True, False):
        scheduler = make_scheduler(blocks=60, budget=8, prefix_cache=prefix_cache)
        for id in range(4):
            scheduler.add(make_sequence(id, [*range(8), 1, 2, 3, 4, id, 6, id], max_tokens=1))
        finish(scheduler)
        # 15 tokens each; twelve of them, six blocks, are the same.
        assert scheduler.counters.computed_tokens == (15 + 3 * 3 if prefix_cache else 4 * 15)


def test_salts_keep_tenants_apart() -> None:
    scheduler, runner = make_scheduler(blocks=40), ShadowRunner(2)
    for id, salt in enumerate((b"a", b"b", b"a")):
        sequence = make_sequence(id, [1, 2, 3, 4, 5], max_tokens=1)
        scheduler.add(sequence, salt)
        assert list(run(scheduler, runner))
        assert sequence.num_cached == (4 if id == 2 else 0)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "param", "sentence"),
    [
        (0, 1, "prompt", "empty"),
        (3, 0, "max_tokens", "at least 1"),
        (60, 41, "max_tokens", "holds 100 tokens, but 101 .* 60 of prompt and 41"),
        (100, 1, "prompt", "holds 100 tokens"),
        (10, 8, "max_tokens", "need 9 blocks of 2 tokens, but the KV cache has 8"),
    ],
)
def test_what_can_never_fit_is_refused_with_the_arithmetic(
    prompt: int, max_tokens: int, param: str, sentence: str
) -> None:
    scheduler = make_scheduler()
    with pytest.raises(RequestRefused, match=sentence) as refusal:
        scheduler.add(make_sequence(0, [1] * prompt, max_tokens=max_tokens))
    assert refusal.value.param == param
    assert scheduler.plan() is None


def test_the_largest_request_that_fits_the_cache_is_served() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(0, [1] * 10, max_tokens=7, ignore_eos=True)
    scheduler.add(sequence)
    finish(scheduler)
    assert sequence.num_output == 7


def test_the_youngest_is_preempted_and_comes_back_with_the_same_tokens() -> None:
    scheduler = make_scheduler(blocks=8)
    sequences = [make_sequence(i, [i, 1, 2], max_tokens=9, ignore_eos=True) for i in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    finish(scheduler)
    assert scheduler.counters.preempted > 0
    for sequence in sequences:
        assert sequence.token_ids == expected(sequence.prompt_ids, sequence.sampling)


def test_an_abort_frees_at_once_but_not_under_a_running_step() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(0, [1, 2, 3, 4], max_tokens=4)
    scheduler.add(sequence)
    plan = scheduler.plan()
    assert plan is not None
    scheduler.abort(0)
    scheduler.abort(0)
    assert scheduler.pool.in_use == 2
    assert scheduler.apply(ShadowRunner(2).execute(plan)) == []
    assert (scheduler.pool.in_use, scheduler.counters.aborted) == (0, 1)
    assert sequence.finish_reason is FinishReason.ABORT

    scheduler.add(make_sequence(1, [1, 2, 3, 4], max_tokens=4))
    plan = scheduler.plan()
    assert plan is not None
    scheduler.apply(ShadowRunner(2).execute(plan))
    scheduler.abort(1)
    assert scheduler.pool.in_use == 0
    scheduler.abort(77)


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        ({"max_tokens": 3, "ignore_eos": True}, FinishReason.LENGTH),
        ({"max_tokens": 60}, FinishReason.STOP),
        ({"max_tokens": 60, "ignore_eos": True, "stop_token_ids": (4,)}, FinishReason.STOP),
        ({"max_tokens": 60, "min_tokens": 40}, None),
    ],
)
def test_a_sequence_ends_for_the_reason_it_gives(
    sampling: dict[str, object], reason: FinishReason | None
) -> None:
    scheduler = make_scheduler(blocks=64)
    sequence = make_sequence(0, [1, 2], **sampling)
    scheduler.add(sequence)
    finish(scheduler)
    if reason is None:
        assert sequence.num_output >= 40
    else:
        assert sequence.finish_reason is reason
    stops = sequence.sampling.stop_token_ids
    if stops:
        assert sequence.token_ids[-1] in stops
        assert not set(stops) & set(sequence.token_ids[2:-1])


def test_plan_and_apply_alternate() -> None:
    scheduler = make_scheduler()
    with pytest.raises(RuntimeError, match="no step"):
        scheduler.apply(StepResult(()))
    scheduler.add(make_sequence(0, [1, 2], max_tokens=2))
    plan = scheduler.plan()
    assert plan is not None
    with pytest.raises(RuntimeError, match="in flight"):
        scheduler.plan()
    with pytest.raises(RuntimeError, match="not those"):
        scheduler.apply(StepResult(()))
    two = StepResult((Sampled(0, 5), Sampled(0, 6)))
    with pytest.raises(RuntimeError, match="do not follow"):
        scheduler.apply(two)


def test_the_scheduler_needs_no_tensors() -> None:
    code = (
        "import forebay_engine.scheduler, forebay_engine.client, sys;"
        "assert not {'torch', 'triton', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=9)
samplings = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 7),
    min_tokens=st.integers(0, 3),
    ignore_eos=st.booleans(),
)


class Serving(RuleBasedStateMachine):
    """Requests come, go and are aborted at any point, in a cache that is too small for them."""

    @initialize(
        blocks=st.integers(8, 14),
        block_size=st.integers(2, 3),
        budget=st.integers(1, 12),
        sequences=st.integers(1, 5),
        prefix_cache=st.booleans(),
    )
    def boot(
        self, blocks: int, block_size: int, budget: int, sequences: int, prefix_cache: bool
    ) -> None:
        self.scheduler = make_scheduler(
            blocks=blocks,
            block_size=block_size,
            budget=budget,
            sequences=sequences,
            prefix_cache=prefix_cache,
        )
        self.budget, self.limit = budget, sequences
        self.runner = ShadowRunner(block_size)
        self.alive: dict[int, Sequence] = {}
        self.aborted: set[int] = set()
        self.next_id = 0
        self.flying: tuple[StepPlan, list[tuple[int, ...]]] | None = None
        self.oldest: tuple[int, int] = (-1, 0)

    @rule(prompt=prompts, sampling=samplings)
    def add(self, prompt: list[int], sampling: SamplingParams) -> None:
        sequence = Sequence(self.next_id, prompt, sampling)
        self.next_id += 1
        self.scheduler.add(sequence)
        self.alive[sequence.id] = sequence

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        victim = data.draw(st.sampled_from(sorted(self.alive)))
        self.scheduler.abort(victim)
        self.aborted.add(victim)
        sequence = self.alive.pop(victim)
        in_flight = self.flying and victim in {row.seq_id for row in self.flying[0].rows}
        assert in_flight or not sequence.block_table

    @precondition(lambda self: self.flying is None)
    @rule()
    def plan(self) -> None:
        plan = self.scheduler.plan()
        assert (plan is not None) == bool(self.alive)
        if plan is None:
            return
        counts = [row.count for row in plan.rows]
        assert sum(counts) == plan.num_tokens <= self.budget
        assert len(counts) <= self.limit
        assert min(counts) >= 1
        assert sorted(counts, key=lambda count: count > 1) == counts
        # The oldest is in every step: that is the progress guarantee.
        assert min(self.alive) in {row.seq_id for row in plan.rows}
        for row in plan.rows:
            assert row.sample == (row.start + row.count == len(row.token_ids))
            assert len(row.block_table) * self.runner.block_size >= row.start + row.count
        self.flying = plan, [tuple(row.block_table) for row in plan.rows]

    @precondition(lambda self: self.flying is not None)
    @rule()
    def apply(self) -> None:
        assert self.flying is not None
        plan, tables = self.flying
        self.flying = None
        # What happened since the plan has not moved a block under the step.
        assert [tuple(row.block_table) for row in plan.rows] == tables
        for sequence, drawn in self.scheduler.apply(self.runner.execute(plan)):
            assert sequence.id not in self.aborted
            assert sequence.token_ids[-1] == drawn[-1].token_id
            if sequence.finish_reason is not None:
                self._finished(self.alive.pop(sequence.id))

    def _finished(self, sequence: Sequence) -> None:
        assert sequence.token_ids == expected(sequence.prompt_ids, sequence.sampling)
        assert sequence.block_table == []

    @invariant()
    def books_agree(self) -> None:
        self.scheduler.check()

    @invariant()
    def the_oldest_never_loses_what_it_has(self) -> None:
        if self.alive:
            first = min(self.alive)
            computed = self.alive[first].num_computed
            assert first != self.oldest[0] or computed >= self.oldest[1]
            self.oldest = (first, computed)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            if self.flying is not None:
                self.apply()
            if not self.alive:
                break
            self.plan()
        assert self.scheduler.plan() is None
        assert self.scheduler.pool.in_use == 0
        assert self.scheduler.running == self.scheduler.waiting == 0
        counters = self.scheduler.counters
        assert counters.finished + counters.aborted == self.next_id


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=80, stateful_step_count=40)


@settings(max_examples=40)
@given(
    requests=st.lists(st.tuples(prompts, samplings), min_size=1, max_size=6),
    budget=st.integers(1, 20),
    block_size=st.integers(1, 4),
    prefix_cache=st.booleans(),
)
def test_answers_depend_on_nothing_but_the_prompt(
    requests: list[tuple[list[int], SamplingParams]],
    budget: int,
    block_size: int,
    prefix_cache: bool,
) -> None:
    # Room for the longest alone, so that several must take turns.
    scheduler = make_scheduler(
        blocks=-(-16 // block_size), block_size=block_size, budget=budget, prefix_cache=prefix_cache
    )
    sequences = [Sequence(i, prompt, sampling) for i, (prompt, sampling) in enumerate(requests)]
    for sequence in sequences:
        scheduler.add(sequence)
    finish(scheduler)
    for sequence in sequences:
        assert sequence.token_ids == expected(sequence.prompt_ids, sequence.sampling)
