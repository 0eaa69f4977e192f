"""Decode steps that are replayed from a tape are those that would be computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from torch import Tensor

from forebay_engine import stack
from forebay_engine.batch import build_batch
from forebay_engine.config import EngineConfig
from forebay_engine.runner import Runner
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import Row, StepPlan

#: Pages of a row, of 16 tokens each.
PAGES = 6


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "_PAGES", 2)


def plan(groups: int, ends: Sequence[int], count: int = 1) -> StepPlan:
    """Rows that run their last ``count`` tokens, on pages of their own in every group."""
    return StepPlan(
        tuple(
            Row(
                seq_id=number,
                token_ids=[5 + (7 * p + 13 * number) % 300 for p in range(end)],
                start=end - count,
                count=count,
                block_tables=(range(number * PAGES, number * PAGES - (-end // 16)),) * groups,
                sample=True,
                sampling=SamplingParams(temperature=0.0),
                num_prompt=1,
            )
            for number, end in enumerate(ends)
        )
    )


def hidden(runner: Runner, steps: StepPlan) -> Tensor:
    batch = build_batch(steps, runner.block_size, torch.device("cpu"), runner._windows)
    with torch.inference_mode():
        found = runner._model.forward(batch.token_ids, batch.positions, runner._caches, batch.paged)
    return found.clone()


def runners(folder: Path, **more: Any) -> Iterator[Runner]:
    """One that records and one that doesn't."""
    for records in (True, False):
        config = EngineConfig(
            model=str(folder), kv_cache_bytes=4 << 20, threads=1, max_model_len=96, **more
        )
        runner = Runner(config)
        runner._model._stack._records = records  # type: ignore[attr-defined]
        yield runner


#: Steps of so many rows, which grow by a page now and then, come and go.
STEPS = [
    [3],
    [4],
    [5, 9, 17],
    [6, 10, 18],
    [15, 31, 33],
    [16, 32, 34],
    [17, 33, 35],
    [18],
    [40, 40, 40, 40, 40],
    [41, 64, 65, 80, 90],
    [19],
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "phi3", "mistral", "gemma2", "gemma3"]
)
def test_replayed_steps_are_computed_steps(
    family: str, dtype: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    taped, plain = runners(tiny_checkpoint(family), dtype=dtype)
    groups = len(taped.cache_groups)
    for prompt in (plan(groups, [90] * 5, 90), plan(groups, [70, 60], 20)):
        assert torch.equal(hidden(taped, prompt), hidden(plain, prompt))
    tapes = taped._model._stack._tapes  # type: ignore[attr-defined]
    assert not tapes
    for ends in STEPS:
        step = plan(groups, ends)
        assert torch.equal(hidden(taped, step), hidden(plain, step))
    # 1 row of 2 pages; 3 rows of 2 and of 4; 5 rows of 4 and of 6.
    assert sorted(key[:2] for key in tapes) == [(1, 2), (3, 2), (3, 4), (5, 4), (5, 6)]
    assert not plain._model._stack._tapes  # type: ignore[attr-defined]


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_products_with_quantised_weights_are_recorded(
    quantization: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    taped, plain = runners(tiny_checkpoint("llama"), dtype="bfloat16", quantization=quantization)
    prompt = plan(1, [50] * 3, 50)
    assert torch.equal(hidden(taped, prompt), hidden(plain, prompt))
    for ends in ([20, 30, 40], [21, 31, 41], [22, 32, 42]):
        assert torch.equal(hidden(taped, plan(1, ends)), hidden(plain, plan(1, ends)))
    assert len(taped._model._stack._tapes) == 1  # type: ignore[attr-defined]


def test_what_no_tape_holds_is_computed_as_before(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    """Experts are chosen by torch, in between."""
    taped, plain = runners(tiny_checkpoint("mixtral"), dtype="float32")
    prompt = plan(1, [30] * 2, 30)
    assert torch.equal(hidden(taped, prompt), hidden(plain, prompt))
    for ends in ([20, 30], [21, 31], [22, 32]):
        assert torch.equal(hidden(taped, plan(1, ends)), hidden(plain, plan(1, ends)))
    assert not taped._model._stack._tapes  # type: ignore[attr-defined]
    assert not taped._model._stack._records  # type: ignore[attr-defined]


def test_other_caches_begin_anew(tiny_checkpoint: Callable[[str], Path]) -> None:
    taped, plain = runners(tiny_checkpoint("llama"), dtype="float32")
    for _ in range(2):
        prompt = plan(1, [30], 30)
        assert torch.equal(hidden(taped, prompt), hidden(plain, prompt))
        for end in (30, 31):
            assert torch.equal(hidden(taped, plan(1, [end])), hidden(plain, plan(1, [end])))
        for runner in (taped, plain):
            runner._caches = [
                stack.LayerCache(torch.zeros_like(c.keys), torch.zeros_like(c.values))
                for c in runner._caches
            ]


def test_the_oldest_tape_gives_way(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack, "_TAPES", 2)
    taped, plain = runners(tiny_checkpoint("llama"), dtype="float32")
    prompt = plan(1, [30] * 3, 30)
    assert torch.equal(hidden(taped, prompt), hidden(plain, prompt))
    for rows in (1, 2, 1, 3, 1, 2):
        step = plan(1, [30] * rows)
        assert torch.equal(hidden(taped, step), hidden(plain, step))
    assert list(taped._model._stack._tapes) == [(1, 2), (2, 2)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_pooled_vector_outlives_the_next_step(
    pooling: Any, tiny_checkpoint: Callable[[str], Path]
) -> None:
    runner, _ = runners(tiny_checkpoint("llama"), dtype="float32")
    vectors = []
    for token in (7, 9, 11):
        (row,) = plan(1, [1]).rows
        row = structs.replace(row, token_ids=[token], sample=False, pooling=pooling)
        (pooled,) = runner.execute(StepPlan((row,))).pooled
        vectors.append((pooled.vector, pooled.vector.copy()))
    assert all((now == then).all() for now, then in vectors)
    assert not (vectors[0][0] == vectors[2][0]).all()
