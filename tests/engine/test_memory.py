"""The sum that is made before a model is loaded, and what the process sets up for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from forebay_engine.config import EngineConfig
from forebay_engine.errors import StartRefused
from forebay_engine.memory import (
    available_bytes,
    laid_out_bytes,
    refuse_what_does_not_fit,
    weight_bytes,
)
from forebay_engine.process import load_runner, set_up_threads
from forebay_engine.ready_memory import ReadyMemory
from forebay_engine.runner import Runner
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import Row, StepPlan

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """2 MiB of bfloat16 weights in two files."""
    for name in ("a", "b"):
        tensors = {"w": torch.zeros(512, 1024, dtype=torch.bfloat16)}
        save_file(tensors, tmp_path / f"{name}.safetensors", {"format": "pt"})
    return tmp_path


@pytest.mark.parametrize(("dtype", "mib"), [("auto", 2), ("bfloat16", 2), ("float32", 4)])
def test_weights_are_counted_in_the_type_they_will_have(folder: Path, dtype: str, mib: int) -> None:
    assert weight_bytes(folder, dtype) == mib * MIB


@pytest.mark.parametrize(
    ("quantization", "dtype", "kib"),
    [
        # embedding, head, layer, packed integers, FP8, norm
        ("none", "auto", 8 * (2 + 2) + 4 * 2 + 4 * 4 + 4 * 2 + 2),
        ("int8", "auto", 8 * (2 + 1) + 4 * 1 + 4 * 4 + 4 * 2 + 2),
        ("int4", "auto", 8 * (2 + 1) + 4 * 0.75 + 4 * 4 + 4 * 2 + 2),
        ("fp8", "auto", 8 * (2 + 1) + 4 * 2 + 4 * 4 + 4 * 2 + 2),
        # Exactness is asked for: all is dequantised.
        ("none", "float32", 8 * (4 + 4) + 4 * 4 + 4 * 4 * 8 + 4 * 4 + 4),
        ("int8", "float32", 8 * (4 + 4) + 4 * 4 + 4 * 4 * 8 + 4 * 4 + 4),
    ],
)
def test_every_tensor_is_counted_as_it_is_held(
    quantization: str, dtype: str, kib: float, tmp_path: Path
) -> None:
    tensors = {
        "model.embed_tokens.weight": torch.zeros(8, 1024, dtype=torch.bfloat16),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(4, 1024, dtype=torch.bfloat16),
        "model.layers.0.mlp.down_proj.qweight": torch.zeros(4, 1024, dtype=torch.int32),
        "model.layers.0.mlp.gate_proj.weight": torch.zeros(4, 1024).to(torch.float8_e4m3fn),
        "model.norm.weight": torch.zeros(1024, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert weight_bytes(tmp_path, dtype, quantization) == kib * 1024


def test_experts_in_one_tensor_are_rounded_as_layers_are(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.zeros(4, 2, 1024, dtype=torch.bfloat16),
        "model.layers.0.mlp.experts.down_proj": torch.zeros(4, 1, 1024, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert weight_bytes(tmp_path, "auto") == 2 * 12 * 1024
    assert weight_bytes(tmp_path, "auto", "int8") == 12 * 1024


def test_an_own_head_is_counted_once_and_float16_becomes_float32(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": torch.zeros(8, 1024, dtype=torch.float16),
        "lm_head.weight": torch.zeros(8, 1024, dtype=torch.float16),
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert weight_bytes(tmp_path, "auto") == 2 * 8 * 1024 * 4
    assert weight_bytes(tmp_path, "bfloat16", "int4") == 8 * 1024 * (2 + 1)


@pytest.mark.parametrize("head", ["lm_head.weight", None])
def test_the_copy_in_int8_of_a_large_head_is_counted(head: str | None, tmp_path: Path) -> None:
    matrix = torch.zeros(1024, 16, dtype=torch.bfloat16)
    tensors = {"model.embed_tokens.weight": matrix} | ({head: matrix + 1} if head else {})
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    plain, figures = 2 * matrix.nbytes, 3 * 4 * 1024
    assert weight_bytes(tmp_path, "auto") == plain + 1024 * 16 + figures
    assert weight_bytes(tmp_path, "float32") == 2 * plain + 1024 * 16 + figures
    assert weight_bytes(tmp_path, "auto", "int8") == plain - matrix.nbytes // 2
    assert weight_bytes(tmp_path, "auto", on_gpu=True) == (plain if head else plain // 2)


@pytest.mark.parametrize(
    ("quantization", "dtype", "kib"),
    [("none", "auto", 8 * 2 + 4 * 2 + 4 * 1), ("fp8", "auto", 8 * (2 + 1) + 4 * 1 + 4 * 1)],
)
def test_a_gpu_keeps_float16_fp8_and_one_copy_of_a_tied_head(
    quantization: str, dtype: str, kib: float, tmp_path: Path
) -> None:
    tensors = {
        "model.embed_tokens.weight": torch.zeros(8, 1024, dtype=torch.float16),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(4, 1024, dtype=torch.float16),
        "model.layers.0.mlp.gate_proj.weight": torch.zeros(4, 1024).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert weight_bytes(tmp_path, dtype, quantization, on_gpu=True) == kib * 1024


def test_what_does_not_fit_is_refused_with_the_sum(folder: Path) -> None:
    config = EngineConfig(model=str(folder), kv_cache_bytes=100 * MIB)
    refuse_what_does_not_fit(config, available=502 * MIB)
    with pytest.raises(
        StartRefused,
        match=r"2 MiB of weights \+ 100 MiB of KV cache \+ 400 MiB .* = 502 MiB, but 501 MiB are",
    ):
        refuse_what_does_not_fit(config, available=501 * MIB)


def test_this_machine_has_some_memory() -> None:
    available = available_bytes()
    assert available is None or 0 < available < 1 << 50


def test_a_model_that_is_none_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StartRefused, match=r"config\.json"):
        load_runner(EngineConfig(model=str(tmp_path), kv_cache_bytes=MIB))


def test_a_real_model_is_loaded_and_warm(tiny_checkpoint: Callable[[str], Path]) -> None:
    config = EngineConfig(model=str(tiny_checkpoint("llama")), kv_cache_bytes=MIB, threads=1)
    assert load_runner(config).vocab_size == 384


def test_weights_lie_in_memory_that_was_ready(tiny_checkpoint: Callable[[str], Path]) -> None:
    folder = tiny_checkpoint("gemma3")
    config = EngineConfig(model=str(folder), num_blocks=2, threads=1)
    sampling = SamplingParams(temperature=0.0, logprobs=4)
    plan = StepPlan((Row(0, (5, 6, 7), 0, 3, ((0,), (0,)), True, sampling, 3),))

    size = laid_out_bytes(config)
    assert 0 < size < weight_bytes(folder, "auto")
    memory = ReadyMemory(2 * size)
    runner = Runner(config, memory=memory)
    answer = runner.execute(plan)
    # Norms are not laid out, panels are filled up.
    assert 0.9 * size < memory._taken < 1.5 * size
    runner.warm_up()
    assert memory.take(1) is None
    assert runner.execute(plan) == answer == Runner(config).execute(plan)


def test_a_processor_lays_out_all_but_embeddings(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": torch.zeros(8, 1024, dtype=torch.bfloat16),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(4, 1024, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    tied = EngineConfig(model=str(tmp_path))
    assert laid_out_bytes(tied) == (8 + 4) * 1024 * 2
    assert laid_out_bytes(replace(tied, quantization="int8")) == (8 + 4) * 1024
    tensors["lm_head.weight"] = torch.zeros(6, 1024, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert laid_out_bytes(tied) == (6 + 4) * 1024 * 2


def test_openmp_is_told_before_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "unset")
    set_up_threads(3)
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert os.environ["OMP_NUM_THREADS"] == "3"
    set_up_threads(0)
    assert int(os.environ["OMP_NUM_THREADS"]) >= 1
