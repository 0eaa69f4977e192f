"""That kernels of every tile have run before the first request, which else waits for a compiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from forebay_engine.config import EngineConfig
from forebay_engine.gpu.runner import DeviceRunner
from forebay_engine.step import StepPlan
from forebay_kernels.gpu.prefill_plan import SHORT
from forebay_kernels.gpu.tuning import choose

CPU = torch.device("cpu")


def tile(count: int, group: int) -> tuple[int, bool]:
    """What attention of a prompt of so many tokens is compiled for."""
    shape = {"dim": 128, "bits": 16, "softcap": 0}
    return choose("prefill_attention", CPU, queries=count * group, **shape)["rows"], count <= SHORT


@pytest.mark.parametrize("group", [1, 2, 4, 5, 7, 8, 16])
def test_prompts_of_all_lengths_find_their_attention_compiled(
    group: int, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(
        model=str(tiny_checkpoint("qwen3")), dtype="float32", num_blocks=20, block_size=16,
        max_sequences=2, max_step_tokens=256,
    )  # fmt: skip
    runner = DeviceRunner(config, device=CPU, recorder=None, memory=None)
    counts = set()
    execute = DeviceRunner.execute

    def executed(self: DeviceRunner, plan: StepPlan) -> Any:
        counts.add(plan.rows[-1].count)
        return execute(self, plan)

    monkeypatch.setattr(DeviceRunner, "execute", executed)
    runner.warm_up()
    most = max(counts)
    assert most > 200
    rehearsed = {tile(count, group) for count in counts if count > 1}
    assert rehearsed == {tile(count, group) for count in range(2, most + 1)}
