"""The scheduler against a shadow runner: one case for each promise."""

from __future__ import annotations

import subprocess
import sys

import pytest

from forebay_engine.errors import RequestRefused
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
