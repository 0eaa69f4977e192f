"""A KV cache in FP8: half the bytes of bfloat16, and answers that are nearly the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from forebay_engine.config import EngineConfig
from forebay_engine.gpu.runner import DeviceRunner
from forebay_engine.hf_config import ModelError
from forebay_engine.runner import Runner
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import Row, StepPlan

Checkpoint = Callable[[str], Path]

PROMPT = [2, *((7 * i) % 370 + 5 for i in range(30))]


def settings(folder: Path, **own: Any) -> EngineConfig:
    common = {"num_blocks": 12, "block_size": 4, "threads": 1, "kv_cache_dtype": "fp8"}
    return EngineConfig(model=str(folder), **{**common, **own})


def scored(runner: Any, prompt: list[int] = PROMPT) -> torch.Tensor:
    """Log-probabilities of the prompt's tokens, the first half of it read from the cache."""
    params = SamplingParams(temperature=0.0, prompt_logprobs=0)
    found = []
    for start, end in ((0, 15), (15, 16), (16, len(prompt))):
        row = Row(
            seq_id=1,
            token_ids=prompt,
            start=start,
            count=end - start,
            block_tables=(tuple(range(2, 11)),) * len(runner.cache_groups),
            sample=end == len(prompt),
            sampling=params,
            num_prompt=len(prompt),
        )
        found += [token.logprob for token in runner.execute(StepPlan((row,))).prompt]
    return torch.tensor(found)


@pytest.mark.parametrize("family", ["llama", "gemma3", "granite"])
def test_it_thinks_nearly_as_the_exact_cache(family: str, tiny_checkpoint: Checkpoint) -> None:
    """e4m3 has 3 bits of mantissa: a key is off by at most 6 %, and errors average out."""
    config = settings(tiny_checkpoint(family))
    runner = Runner(config)
    assert all(cache.keys.dtype == torch.float8_e4m3fn for cache in runner._caches)
    exact = scored(Runner(replace(config, kv_cache_dtype="auto")))
    found = scored(runner)
    assert 0.0 < float((found - exact).abs().mean()) < 0.1


def test_a_runner_for_gpus_stores_the_same(tiny_checkpoint: Checkpoint) -> None:
    config = settings(tiny_checkpoint("gemma3"))
    device = DeviceRunner(config, device=torch.device("cpu"), recorder=None, memory=None)
    assert torch.allclose(scored(device), scored(Runner(config)), atol=1e-5)


def test_pages_are_four_times_as_many_as_of_float32(tiny_checkpoint: Checkpoint) -> None:
    own = {"num_blocks": 0, "kv_cache_bytes": 768 * 4 * 5}
    config = settings(tiny_checkpoint("llama"), **own)
    assert [group.num_blocks for group in Runner(config).cache_groups] == [20]


def with_scales(folder: Path, target: Path, scales: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    save_file(tensors | scales, target / "model.safetensors", {"format": "pt"})
    return target


def test_scales_of_the_checkpoint_are_used(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Some that fit the values, and one that leaves keys too small for e4m3."""
    folder = tiny_checkpoint("llama")
    prefix = "model.layers.0.self_attn"
    exact = scored(Runner(settings(folder, kv_cache_dtype="auto")))
    near = {f"{prefix}.k_scale": torch.tensor(0.25), f"{prefix}.v_scale": torch.tensor([0.5, 2.0])}
    coarse = {f"{prefix}.k_proj.k_scale": torch.tensor([4000.0])}
    errors = [
        float((scored(Runner(settings(made))) - exact).abs().mean())
        for made in (
            folder,
            with_scales(folder, tmp_path / "near", near),
            with_scales(folder, tmp_path / "coarse", coarse),
        )
    ]
    assert errors[1] < 2.0 * errors[0] < errors[2]
    assert errors[1] != errors[0]
    wrong = with_scales(folder, tmp_path / "wrong", {f"{prefix}.k_scale": torch.ones(3)})
    with pytest.raises(ModelError, match="k_scale has 3 values, where one or one for each of 2 KV"):
        Runner(settings(wrong))
