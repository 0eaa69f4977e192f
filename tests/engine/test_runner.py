"""The runner's contract: what it says of the model, and which plans it takes."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from forebay_engine.batch import build_batch
from forebay_engine.cache import CacheGroup
from forebay_engine.config import EngineConfig
from forebay_engine.hf_config import ModelError
from forebay_engine.runner import Runner
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import Row, StepPlan

Checkpoint = Callable[[str], Path]

CPU = torch.device("cpu")


def planned(seq_id: int, tokens: list[int], start: int, pages: list[int], sample: bool) -> Row:
    return Row(
        seq_id=seq_id,
        token_ids=tokens,
        start=start,
        count=len(tokens) - start if sample else 2,
        block_tables=(pages,),
        sample=sample,
        sampling=SamplingParams(temperature=0.0),
        num_prompt=len(tokens),
    )


@pytest.fixture
def runner(tiny_checkpoint: Checkpoint) -> Runner:
    return Runner(EngineConfig(model=str(tiny_checkpoint("llama")), num_blocks=8, threads=1))


def test_it_says_what_the_engine_needs(runner: Runner) -> None:
    assert runner.cache_groups == (CacheGroup(8),)
    assert runner.block_size == 32
    assert runner.vocab_size == 384
    assert runner.eos_token_ids == {1}
    assert runner.max_model_len == 256  # 8 pages of 32, though the model has 512 positions


def test_ends_come_from_generation_config_first(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "more-ends")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 4]}))
    assert Runner(EngineConfig(model=str(folder), num_blocks=1)).eos_token_ids == {1, 4}


@pytest.mark.parametrize(("family", "token_bytes"), [("llama", 768), ("gemma3", 1536)])
def test_pages_fill_the_bytes_that_are_given(
    family: str, token_bytes: int, tiny_checkpoint: Checkpoint
) -> None:
    """3 layers of keys and values, 2 heads of 16 (gemma3: 32) float32."""
    config = EngineConfig(
        model=str(tiny_checkpoint(family)), kv_cache_bytes=token_bytes * 32 * 5 + 100
    )
    assert {group.num_blocks for group in Runner(config).cache_groups} == {5}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_cache_bytes": 1000}, "kv_cache_bytes: 1000 hold no page of 32 tokens"),
        ({"max_model_len": 513}, "max_model_len: 513 is more than the model's 512"),
        ({"dtype": "int4"}, "dtype 'int4' is not one of auto, float32, bfloat16"),
    ],
)
def test_settings_that_cannot_be_met_are_named(
    settings: dict[str, Any], message: str, tiny_checkpoint: Checkpoint
) -> None:
    with pytest.raises(ModelError, match=message):
        Runner(EngineConfig(model=str(tiny_checkpoint("llama")), **settings))


def test_a_shorter_length_can_be_asked(tiny_checkpoint: Checkpoint) -> None:
    config = EngineConfig(model=str(tiny_checkpoint("llama")), num_blocks=8, max_model_len=100)
    assert Runner(config).max_model_len == 100


def test_only_rows_that_ask_are_sampled_in_order(runner: Runner) -> None:
    rows = (
        planned(5, [2, 9, 9, 7], 0, [3], True),
        planned(2, [2, 8, 8, 8], 0, [1], False),
        planned(4, [2, 6], 0, [0], True),
    )
    assert [s.seq_id for s in runner.execute(StepPlan(rows)).sampled] == [5, 4]


def test_a_step_without_samples_gives_none(runner: Runner) -> None:
    assert runner.execute(StepPlan((planned(2, [2, 8, 8], 0, [1], False),))).sampled == ()


def test_batch_lays_rows_out_one_after_another() -> None:
    rows = (
        planned(1, [10, 11, 12, 13, 14, 15], 5, [7, 2], True),
        planned(2, [20, 21, 22, 23, 24], 1, [0, 4], False),
    )
    batch = build_batch(StepPlan(rows), 4, CPU)
    assert batch.token_ids.tolist() == [15, 21, 22]
    assert batch.positions.tolist() == [5, 1, 2]
    assert batch.sample_at.tolist() == [0]
    assert batch.paged.slots.tolist() == [2 * 4 + 1, 1, 2]
    assert batch.paged.query_starts == (0, 1, 3)
    assert batch.paged.seq_lens == (6, 3)
    assert batch.paged.lengths.tolist() == [6, 3]
    assert batch.paged.num_decodes == 1
    assert batch.paged.block_tables.tolist() == [[7, 2], [0, 4]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (planned(3, [2, 8], 2, [0], True), r"sequence 3: tokens 2..2 of 2 planned"),
        (planned(3, [2] * 9, 0, [0, 1], True), "sequence 3: 9 tokens do not fit its 2 pages"),
        (planned(3, [2], 0, [0], False), "sequence 3: tokens 0..2 of 1 planned"),
    ],
)
def test_contradicting_rows_are_named(row: Row, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_batch(StepPlan((row,)), 4, CPU)


def test_guesses_that_come_true_are_the_tokens_of_single_steps(runner: Runner) -> None:
    prompt = [2, 8, 9, 4]
    alone = list(prompt)
    for _ in range(4):
        single = planned(1, list(alone), 0, [0], True)
        alone.append(runner.execute(StepPlan((single,))).sampled[0].token_id)
    true = alone[len(prompt) :]
    for draft, come in [(true[:3], 4), ([true[0], (true[1] + 1) % 384, true[2]], 2)]:
        guessed = structs.replace(planned(1, prompt, 0, [1], True), count=7, draft=tuple(draft))
        drawn = runner.execute(StepPlan((guessed, planned(2, [2], 0, [2], True)))).sampled
        assert [s.token_id for s in drawn if s.seq_id == 1] == true[:come]


def test_a_token_that_nobody_knows_yet_is_the_one_that_was_just_drawn(runner: Runner) -> None:
    """Steps planned one ahead, of two sequences of which one is preempted between."""
    prompt, other = [2, 8, 9, 4], [2, 5]
    known = list(prompt)
    for _ in range(4):
        single = planned(1, list(known), 0, [0], True)
        known.append(runner.execute(StepPlan((single,))).sampled[0].token_id)
    ahead = list(prompt)
    step = StepPlan((planned(1, ahead, 0, [1], True), planned(2, other, 0, [2], True)))
    launched = runner.launch(step)
    for _ in range(3):
        unknown = structs.replace(
            planned(1, ahead, 0, [1], True), start=len(ahead), count=1, unknown=1
        )
        following = runner.launch(StepPlan((unknown,)))
        ahead.append(launched.result().sampled[0].token_id)
        launched = following
    ahead.append(launched.result().sampled[0].token_id)
    assert ahead == known
    lost = structs.replace(planned(2, other, 0, [2], True), start=2, count=1, unknown=1)
    with pytest.raises(ValueError, match="sequence 2: the last step drew no token for it"):
        runner.launch(StepPlan((lost,)))


def test_guesses_that_hang_in_the_air_are_refused() -> None:
    row = structs.replace(planned(3, [1, 2, 3], 0, [0], True), count=1, draft=(4,))
    with pytest.raises(ValueError, match="guesses do not follow its last token"):
        build_batch(StepPlan((row,)), 4, CPU)


def test_a_sample_before_the_last_token_is_refused() -> None:
    early = Row(3, [1, 2, 3], 0, 2, ((0,),), True, SamplingParams(), 3)
    with pytest.raises(ValueError, match="a sample is asked before its last token"):
        build_batch(StepPlan((early,)), 4, CPU)


def test_warm_up_chooses_and_says_the_thread_count(
    tiny_checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    runner = Runner(EngineConfig(model=str(tiny_checkpoint("llama")), num_blocks=2))
    with caplog.at_level(logging.INFO):
        runner.warm_up()
    assert "compute threads: " in caplog.text
    torch.set_num_threads(1)


def test_the_thread_count_follows_the_runner_into_every_thread(
    tiny_checkpoint: Checkpoint,
) -> None:
    runner = Runner(EngineConfig(model=str(tiny_checkpoint("llama")), num_blocks=2, threads=1))
    counts: list[int] = []

    def elsewhere() -> None:
        torch.set_num_threads(2)
        runner.execute(StepPlan((planned(1, [2, 3], 0, [0], True),)))
        counts.append(torch.get_num_threads())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert counts == [1]


def test_a_draft_model_must_have_the_same_tokens(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    target = tiny_checkpoint("llama")
    draft = shutil.copytree(tiny_checkpoint("qwen3"), tmp_path / "draft")
    config = EngineConfig(model=str(target), speculation=str(draft), num_blocks=8, threads=1)
    words = json.loads((draft / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    one, other = [word for word, number in vocabulary.items() if number in (200, 201)]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (draft / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ModelError, match=r"the tokens of .*draft are not those of"):
        Runner(config)
    shape = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps({**shape, "vocab_size": 390}))
    with pytest.raises(ModelError, match=r"draft has 390 token ids, but .* 384"):
        Runner(config)


def test_a_draft_model_that_sees_more_than_pages_are_kept_for_is_refused(
    tiny_checkpoint: Checkpoint,
) -> None:
    config = EngineConfig(
        model=str(tiny_checkpoint("mistral")), speculation=str(tiny_checkpoint("llama"))
    )
    with pytest.raises(ModelError, match="see all positions, but the model's own keep 16"):
        Runner(config)


def test_steps_are_measured_where_guesses_are_made(tiny_checkpoint: Checkpoint) -> None:
    folder = str(tiny_checkpoint("llama"))
    runner = Runner(EngineConfig(model=folder, speculation=folder, num_blocks=40, threads=1))
    runner.warm_up()
    for costs in (runner.step_costs, runner.draft_costs):
        assert costs is not None
        # Of 40 pages of 32, a row of 128 takes four.
        assert costs.tokens == (1, 2, 4, 8)
        assert list(costs.seconds) == sorted(costs.seconds)
        assert min(costs.seconds) > 0
