"""The scheduler against a shadow runner: one case for each promise."""

from __future__ import annotations

import subprocess
import sys

import pytest

from forebay_engine.cache import CacheGroup, KVCache
from forebay_engine.errors import RequestRefused
from forebay_engine.scheduler import Scheduler
from forebay_engine.sequence import FinishReason, SamplingParams, Sequence
from forebay_engine.step import Sampled, StepResult
from shadow_runner import ShadowRunner, expected, finish, make_scheduler, run


def make_sequence(id: int, prompt: list[int], **sampling: object) -> Sequence:
    return Sequence(id, prompt, SamplingParams(**sampling))  # type: ignore[arg-type] # by keyword


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
        scheduler.add(sequence, salt=salt)
        assert list(run(scheduler, runner))
        assert sequence.num_cached == (4 if id == 2 else 0)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "param", "sentence"),
    [
        (0, 1, "prompt", "empty"),
        (3, -1, "max_tokens", "at least 0"),
        (60, 41, "max_tokens", "holds 100 tokens, but 101 .* 60 of prompt and 41"),
        (100, 1, "prompt", "holds 100 tokens"),
        (17, 0, "max_tokens", "need 9 blocks of 2 tokens, but the KV cache has 8"),
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


@pytest.mark.parametrize("prompt", [1, 5, 16])
def test_without_an_answer_a_prompt_is_computed_and_nothing_drawn(prompt: int) -> None:
    scheduler, runner = make_scheduler(), ShadowRunner(2)
    sequence = make_sequence(0, list(range(1, prompt + 1)), max_tokens=0)
    scheduler.add(sequence)
    *steps, last = [
        (plan, scheduler.apply(runner.execute(plan))) for plan in iter(scheduler.plan, None)
    ]
    assert not any(progress for _, progress in steps)
    assert last[1] == [(sequence, [])]
    rows = [row for plan, _ in [*steps, last] for row in plan.rows]
    assert not any(row.sample for row in rows)
    assert sum(row.count for row in rows) == sequence.num_computed == prompt
    assert sequence.finish_reason is FinishReason.LENGTH
    assert (scheduler.counters.finished, scheduler.counters.generated_tokens) == (1, 0)
    assert scheduler.cache.in_use == 0
    scheduler.check()


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
    assert scheduler.cache.in_use == 2
    assert scheduler.apply(ShadowRunner(2).execute(plan)) == []
    assert (scheduler.cache.in_use, scheduler.counters.aborted) == (0, 1)
    assert sequence.finish_reason is FinishReason.ABORT

    scheduler.add(make_sequence(1, [1, 2, 3, 4], max_tokens=4))
    plan = scheduler.plan()
    assert plan is not None
    scheduler.apply(ShadowRunner(2).execute(plan))
    scheduler.abort(1)
    assert scheduler.cache.in_use == 0
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


def test_a_part_of_each_step_is_kept_for_short_prompts() -> None:
    """Two long prompts would take every step; the short ones behind them are not held up."""
    scheduler = make_scheduler(blocks=200, budget=16, model_len=300)
    for id, length in enumerate((100, 100, 3, 4)):
        scheduler.add(make_sequence(id, [id] * length, max_tokens=1))
    first, second, *rest = finish(scheduler)
    # A quarter of the step for short prompts, what they leave of it for the first long one.
    assert {row.seq_id: row.count for row in first.rows} == {0: 12, 2: 3, 3: 1}
    assert {row.seq_id: row.count for row in second.rows} == {0: 13, 3: 3}
    assert all(plan.num_tokens == 16 for plan in [first, second, *rest][:-1])
    # The first long one is through before the second begins.
    assert [len(plan.rows) for plan in rest[: (100 - 25) // 16]] == [1] * 4


def test_short_prompts_do_not_starve_the_long_one() -> None:
    scheduler, runner = make_scheduler(blocks=400, budget=16, model_len=600), ShadowRunner(2)
    long = make_sequence(0, [7] * 300, max_tokens=1)
    scheduler.add(long)
    for id in range(1, 1000):
        scheduler.add(make_sequence(id, [id % 5, 1, 2, 3], max_tokens=1))
        plan = scheduler.plan()
        assert plan is not None
        # Half of the step at least.
        count = next(row.count for row in plan.rows if row.seq_id == 0)
        assert count >= min(8, 300 - long.num_computed)
        scheduler.apply(runner.execute(plan))
        if long.finish_reason is not None:
            break
    assert long.finish_reason is not None


def admitted(scheduler: Scheduler, runner: ShadowRunner) -> list[int]:
    """Sequences in the order in which they come in."""
    return [row.seq_id for plan in run(scheduler, runner) for row in plan.rows if row.start == 0]


@pytest.mark.parametrize(("later", "order"), [(9.0, [1, 0]), (11.0, [0, 1])])
def test_a_level_of_priority_is_worth_ten_seconds_of_waiting(
    later: float, order: list[int]
) -> None:
    scheduler, runner = make_scheduler(sequences=1), ShadowRunner(2)
    sampling = SamplingParams(max_tokens=2)
    scheduler.add(Sequence(0, [1, 2, 3], sampling, priority=1, arrival=0.0))
    scheduler.add(Sequence(1, [3, 2, 1], sampling, priority=0, arrival=later))
    assert admitted(scheduler, runner) == order


def test_however_many_arrive_before_it_in_rank_nobody_waits_for_ever() -> None:
    """One request a second, each more urgent by three levels: 30 s later they go behind."""
    scheduler, runner = make_scheduler(sequences=1), ShadowRunner(2)
    sampling = SamplingParams(max_tokens=1)
    scheduler.add(Sequence(0, [1, 2, 3], sampling, priority=3, arrival=0.0))
    order = []
    for second in range(40):
        scheduler.add(Sequence(second + 1, [second % 7, 1], sampling, 0, float(second)))
        plan = scheduler.plan()
        assert plan is not None
        order += [row.seq_id for row in plan.rows]
        scheduler.apply(runner.execute(plan))
    assert order.index(0) == 30


def test_the_last_in_rank_gives_way_and_not_the_last_that_came() -> None:
    scheduler = make_scheduler(blocks=8, prefix_cache=False)
    sampling = SamplingParams(max_tokens=9, ignore_eos=True)
    patient, urgent = Sequence(0, [1, 1, 2], sampling, 1), Sequence(1, [2, 1, 2], sampling, 0)
    scheduler.add(patient)
    scheduler.add(urgent)
    restarts = {0: 0, 1: 0}
    for plan in run(scheduler, ShadowRunner(2)):
        for row in plan.rows:
            restarts[row.seq_id] += row.start == 0
    assert scheduler.counters.preempted > 0
    assert restarts[0] > restarts[1] == 1
    for sequence in (patient, urgent):
        assert sequence.token_ids == expected(sequence.prompt_ids, sequence.sampling)


def test_a_deadline_ends_a_sequence_wherever_it_is() -> None:
    scheduler, runner = make_scheduler(sequences=2), ShadowRunner(2)
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    for id, deadline in enumerate((5.0, 9.0, 7.0)):
        scheduler.add(Sequence(id, [id, 1], sampling, deadline=deadline))
    plan = scheduler.plan()
    assert plan is not None
    # One that runs in the step keeps its pages until the step has ended.
    assert [sequence.id for sequence in scheduler.expire(5.0)] == [0]
    assert scheduler.cache.in_use == 2
    assert [sequence.id for sequence, _ in scheduler.apply(runner.execute(plan))] == [1]
    assert [sequence.id for sequence in scheduler.expire(8.9)] == [2]
    assert scheduler.expire(8.9) == []
    assert (scheduler.running, scheduler.waiting) == (1, 0)
    assert [sequence.finish_reason for sequence in scheduler.expire(100.0)] == ["deadline"]
    assert scheduler.plan() is None
    assert (scheduler.cache.in_use, scheduler.counters.expired) == (0, 3)


def test_choices_of_a_prompt_share_its_pages_without_a_prefix_cache_as_well() -> None:
    for windows in ((None,), (None, 4)):
        scheduler = make_scheduler(blocks=60, budget=32, prefix_cache=False, windows=windows)
        runner = ShadowRunner(2, windows)
        prompt = [*range(8), 1]
        choices = [make_sequence(i, prompt, max_tokens=6, ignore_eos=True) for i in range(4)]
        scheduler.add(*choices)
        counts = [
            (plan.num_tokens, scheduler.cache.pools[0].in_use) for plan in run(scheduler, runner)
        ]
        # Nine tokens once; then the last one for each of the others, and nine decodes of all.
        assert [tokens for tokens, _ in counts[:3]] == [9, 1 + 3, 4]
        # Four shared pages, and one for each, with three tokens at most.
        assert counts[1][1] == 4 + 4
        assert [choice.num_cached for choice in choices] == [0, 8, 8, 8]
        # Another prompt of the same tokens shares nothing.
        scheduler.add(other := make_sequence(9, prompt, max_tokens=1))
        assert list(run(scheduler, runner))
        assert other.num_cached == 0


def test_layers_with_a_window_need_pages_for_a_window_only() -> None:
    """In a cache that has 6 pages for such layers, and 60 for the others."""
    cache = KVCache([CacheGroup(60), CacheGroup(6, window=4)], 2)
    scheduler = Scheduler(cache, max_step_tokens=16, max_sequences=8, max_model_len=110)
    sequence = make_sequence(0, [1] * 50, max_tokens=60, ignore_eos=True)
    scheduler.add(sequence)
    most = 0
    for _ in run(scheduler, ShadowRunner(2, (None, 4))):
        most = max(most, cache.pools[1].in_use)
    assert sequence.num_output == 60
    assert most <= 6


def test_what_a_window_and_its_step_need_is_there_or_refused() -> None:
    cache = KVCache([CacheGroup(60), CacheGroup(3, window=4)], 2)
    with pytest.raises(ValueError, match="too small for a context of 110"):
        Scheduler(cache, max_step_tokens=16, max_sequences=8, max_model_len=110)
    # Six tokens fit its three pages as they are.
    Scheduler(cache, max_step_tokens=16, max_sequences=8, max_model_len=6)


def test_nobody_is_let_in_on_pages_that_a_running_prompt_will_need() -> None:
    scheduler = make_scheduler(blocks=20, budget=4)
    scheduler.add(make_sequence(0, [0] * 30, max_tokens=1))
    scheduler.add(make_sequence(1, [1] * 20, max_tokens=1))
    finish(scheduler)
    assert scheduler.counters.preempted == 0
