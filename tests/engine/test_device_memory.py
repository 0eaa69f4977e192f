"""How a GPU's memory is shared out, told by one that has none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from forebay_engine.config import EngineConfig
from forebay_engine.errors import StartRefused
from forebay_engine.gpu.memory import Shares
from forebay_engine.gpu.runner import DeviceRunner
from forebay_engine.hf_config import ModelError
from forebay_engine.process import choose_device, load_runner

MIB = 1 << 20

Checkpoint = Callable[[str], Path]


@dataclass
class Memory:
    """Says what is free, one figure after the other."""

    said: list[int]
    whole: int = 100 * MIB
    asked: int = field(default=0)

    def total(self) -> int:
        return self.whole

    def free(self) -> int:
        self.asked += 1
        return self.said[min(self.asked, len(self.said)) - 1]


def settings(folder: Path) -> EngineConfig:
    return EngineConfig(model=str(folder), block_size=4, max_model_len=64, threads=1)


def test_the_kv_cache_gets_what_is_left(
    tiny_checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 100 MiB the share is 90, 7 were taken before and 80 are with weights and a step."""
    config = settings(tiny_checkpoint("llama"))
    memory = Memory([93 * MIB, 20 * MIB])
    with caplog.at_level(logging.INFO):
        runner = DeviceRunner(config, device=torch.device("cpu"), recorder=None, memory=memory)
    page = 3 * 2 * 2 * 16 * 4 * 4  # layers, keys and values, heads, dim, slots, float32
    assert [group.num_blocks for group in runner.cache_groups] == [10 * MIB // page]
    assert "0.9 of the GPU's 100 MiB are 90 MiB; 7 MiB were taken before, and 80 MiB" in caplog.text
    assert "the KV cache gets 10 MiB" in caplog.text
    asked = replace(config, kv_cache_bytes=2 * MIB)
    memory = Memory([93 * MIB, 20 * MIB])
    runner = DeviceRunner(asked, device=torch.device("cpu"), recorder=None, memory=memory)
    assert [group.num_blocks for group in runner.cache_groups] == [2 * MIB // page]


def test_weights_that_cannot_fit_are_refused_before_they_are_read(
    tiny_checkpoint: Checkpoint,
) -> None:
    config = replace(settings(tiny_checkpoint("llama")), kv_cache_bytes=90 * MIB)
    told = (
        r"does not fit into the GPU's memory: \d MiB of weights \+ 90 MiB of KV cache = 9\d MiB, "
        r"but 90 MiB are left of its 100 MiB: 0 MiB are taken, and gpu_memory_share is 0.9; lower"
    )
    with pytest.raises(StartRefused, match=told):
        Shares.begin(Memory([100 * MIB]), config)


def test_nothing_left_for_the_cache_is_refused(tiny_checkpoint: Checkpoint) -> None:
    shares = Shares.begin(Memory([100 * MIB, 9 * MIB]), settings(tiny_checkpoint("llama")))
    with pytest.raises(
        StartRefused, match=r"91 MiB with .*: nothing is left for the KV cache; low"
    ):
        shares.kv_bytes()


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_a_share_is_more_than_nothing_and_at_most_all(share: float, tmp_path: Path) -> None:
    config = replace(settings(tmp_path), gpu_memory_share=share)
    with pytest.raises(
        StartRefused, match=r"gpu_memory_share is .*; it must be above 0 and at mos"
    ):
        Shares.begin(Memory([1]), config)


def test_a_device_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [choose_device(asked) for asked in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    with pytest.raises(StartRefused, match=r"device: cuda is asked for, but torch .* sees no GPU"):
        choose_device("cuda")
    with pytest.raises(StartRefused, match="device 'tpu' is not one of auto, cpu, cuda"):
        load_runner(EngineConfig(model="none", device="tpu"))


def test_an_unknown_type_of_the_cache_is_refused(tiny_checkpoint: Checkpoint) -> None:
    config = replace(settings(tiny_checkpoint("llama")), kv_cache_dtype="int8")
    with pytest.raises(ModelError, match="kv_cache_dtype 'int8' is not one of auto, fp8"):
        DeviceRunner(config, device=torch.device("cpu"), recorder=None, memory=None)
