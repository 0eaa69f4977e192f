"""Reading checkpoints: every tensor once, checked, from safetensors alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from forebay_engine.hf_config import ModelError
from forebay_engine.weights import Weights

CPU = torch.device("cpu")


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(2, 3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(4)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> Weights:
    return Weights(folder, dtype, CPU)


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_tensors_are_found_by_name(kind: str, request: pytest.FixtureRequest) -> None:
    with opened(request.getfixturevalue(kind), torch.bfloat16) as weights:
        assert torch.equal(weights.take("a", 2, 3), torch.ones(2, 3, dtype=torch.bfloat16))
        assert weights.take("b", 4, dtype=torch.float64).dtype == torch.float64
        weights.finish()


def test_tensors_outlive_the_files(single: Path) -> None:
    with opened(single) as weights:
        tensor = weights.take("a", 2, 3)
    (single / "model.safetensors").unlink()
    assert float(tensor.sum()) == 6.0


def test_what_is_wrong_with_a_tensor_is_named(single: Path) -> None:
    with opened(single) as weights:
        with pytest.raises(ModelError, match="the tensor c is missing"):
            weights.take("c", 1)
        with pytest.raises(ModelError, match=r"a has the shape \[2, 3\], .* \[3, 2\]"):
            weights.take("a", 3, 2)
        weights.take("b", 4)
        with pytest.raises(ModelError, match="the tensor b is taken twice"):
            weights.take("b", 4)


def test_left_over_tensors_are_named_unless_skipped(single: Path) -> None:
    with opened(single) as weights:
        weights.take("a", 2, 3)
        with pytest.raises(ModelError, match="1 tensors have no place: b"):
            weights.finish()
        weights.skip(["b", "never-there"])
        weights.finish()


def test_a_folder_without_safetensors_is_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="only safetensors are read"), opened(tmp_path):
        pass


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match=r"model.safetensors: cannot be read"), opened(tmp_path):
        pass


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    with pytest.raises(ModelError, match=r"two.safetensors: cannot be read"), opened(sharded):
        pass


def test_an_index_cannot_reach_outside_its_folder(sharded: Path) -> None:
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="names files outside the folder"), opened(sharded):
        pass


def test_progress_is_told_to_the_last_tensor(sharded: Path) -> None:
    told: list[float] = []
    with Weights(sharded, torch.float32, CPU, progress=told.append) as weights:
        weights.take("a", 2, 3)
        weights.take("b", 4)
    # Of the files' bytes, which are headers for the most part here.
    assert told == sorted(told)
    assert [round(share / told[-1], 2) for share in told] == [0.6, 1.0]
    assert 0 < told[0] < told[1] < 1
