"""FP8 layers whose tokens the norm or gate before them has rounded: the same as rounded apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forebay_engine import linear
from forebay_engine.config import EngineConfig
from forebay_engine.gpu.runner import DeviceRunner
from forebay_engine.hf_config import read_config
from forebay_engine.layers import LayerCache, RmsNorm
from forebay_engine.linear import Linear, Rounded
from forebay_engine.models import build_model
from forebay_engine.models.moe import Experts
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import Row, StepPlan
from forebay_engine.weights import Weights
from forebay_kernels import PagedBatch, dispatch, reference
from forebay_kernels.gpu import fp8
from forebay_kernels.gpu.fp8 import PackedFp8, pack_fp8
from forebay_kernels.matrix import Dense, Fp8, Matrix
from replaying import CheckingRecorder

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs Triton's interpreter")

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)

Checkpoint = Callable[[str], Path]


class Unrecorded:
    """Replays by running the step."""

    def record(self, step: Callable[[], object]) -> Callable[[], object]:
        return step


class Seen:
    """What FP8 products are given where Triton computes norms, gates and products.

    From 3 tokens on instead of 17, as the interpreter takes 5 ms and more for each. And of float32,
    too: there nothing is lost if a norm or gate is stored before it is rounded to e4m3, so that the
    two ways are the same to the last bit.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        #: Values and scale of each product with rounded tokens; how many it rounded by itself.
        self.given: list[tuple[Tensor, Tensor]] = []
        self.apart = 0
        product, quantized, quantize = linear._product, PackedFp8.quantized, fp8.quantize_fp8

        def packed(matrix: Matrix, bias: Tensor | None, dtype: torch.dtype) -> Any:
            if isinstance(matrix, Fp8):
                return pack_fp8(matrix, bias)
            return product(matrix, bias, dtype)

        def multiplied(
            layer: PackedFp8, values: Tensor, scale: Tensor, dtype: torch.dtype
        ) -> Tensor:
            self.given.append((values, scale))
            return quantized(layer, values, scale, dtype)

        def rounded(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
            self.apart += 1
            return quantize(x, group)

        patch.setattr(linear, "_product", packed)
        patch.setattr(PackedFp8, "quantized", multiplied)
        patch.setattr(fp8, "quantize_fp8", rounded)
        patch.setattr(PackedFp8, "rounds", lambda self, x: len(x) > 2)
        # Attention and draws, which take the interpreter a minute, are left to torch.
        patch.setattr(dispatch, "has_triton", lambda x: x.dim() == 2 and x.shape[1] < 300)


def settings(folder: Path, dtype: str) -> EngineConfig:
    return EngineConfig(
        model=str(folder), dtype=dtype, quantization="fp8", max_model_len=8, max_sequences=4,
        block_size=8, num_blocks=8, threads=1,
    )  # fmt: skip


def answers(runner: DeviceRunner) -> list[list[int]]:
    """A chunk of three tokens, a replay of four rows of which three are there, and one of a row."""
    known = [[2, 60, 300], [7], [310]]
    for starts, count in (((0,), 3), ((3, 0, 0), 1), ((4,), 1)):
        rows = tuple(
            Row(i, known[i], start, count, ([i],) * len(runner.cache_groups), True, GREEDY, 1)
            for i, start in enumerate(starts)
        )
        for item in runner.execute(StepPlan(rows)).sampled:
            known[item.seq_id].append(item.token_id)
    return known


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_tokens_are_those_of_layers_that_round_by_themselves(
    family: str, tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is drawn, and the bits of all that is multiplied, over chunks and replays."""
    seen = Seen(monkeypatch)
    monkeypatch.setattr(DeviceRunner, "_rehearse", lambda self: None)
    monkeypatch.setattr(DeviceRunner, "_largest_step", lambda *_: torch.zeros(1, 64))
    config = settings(tiny_checkpoint(family), "float32")
    runner = DeviceRunner(config, device=CPU, recorder=Unrecorded(), memory=None)
    runner.warm_up()
    found, given, apart = answers(runner), seen.given, seen.apart
    assert len(given) == 2 * 3 * 4  # steps of more than two tokens, layers, products
    assert apart == 2 * 3  # of those what attention gives
    seen.given, seen.apart = [], 0
    monkeypatch.setattr(Linear, "group", lambda self, x: None)
    assert answers(runner) == found
    assert seen.apart == len(seen.given) == len(given)
    for (values, scale), (other_values, other_scale) in zip(given, seen.given, strict=True):
        assert torch.equal(values.view(torch.uint8), other_values.view(torch.uint8))
        assert torch.equal(scale, other_scale)


def test_a_replay_rounds_as_the_recorded_step_did(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that a graph would not repeat says who rounds: the same calls, rows there or not."""
    seen = Seen(monkeypatch)
    # By torch, whose calls can be compared; and no step with few rows is recorded.
    monkeypatch.setattr(dispatch, "has_triton", lambda x: False)
    monkeypatch.setattr(fp8, "quantize_fp8", reference.quantize_fp8)
    monkeypatch.setattr("forebay_engine.gpu.runner.buckets", lambda most: [most])
    monkeypatch.setattr(DeviceRunner, "_rehearse", lambda self: None)
    recorder = CheckingRecorder()
    config = settings(tiny_checkpoint("llama"), "bfloat16")
    runner = DeviceRunner(config, device=CPU, recorder=recorder, memory=None)
    runner.warm_up()
    seen.given = []
    answers(runner)
    assert recorder.replays == [2]
    assert len(seen.given) == 3 * 3 * 4  # steps, layers, products


@pytest.mark.parametrize("group", [64, 32])
def test_a_layer_asks_for_what_it_would_round(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 17 tokens on, by the columns that have a scale together; in float32 nothing."""
    monkeypatch.setattr(Matrix, "device", torch.device("cuda"))
    matrix = Fp8(torch.randn(16, 64).to(torch.float8_e4m3fn), torch.rand(16, 64 // group), group)
    x = torch.randn(17, 64, dtype=torch.bfloat16)
    added, inner, outer = torch.randn_like(x), torch.rand(64), torch.rand(64)
    layer, norm = Linear(matrix), RmsNorm(outer, 1e-6)
    assert layer.group(x) == group
    assert layer.group(x[:16]) is None
    assert Linear(matrix).group(x.float()) is None

    stream, expected = x.clone(), x.clone()
    normed = norm.read_by(layer, stream, added, RmsNorm(inner, 1e-6))
    values, scale = reference.add_rms_norm_fp8(expected, added, inner, outer, 1e-6, group)
    assert isinstance(normed, Rounded)
    assert torch.equal(normed.values.float(), values.float())
    assert torch.equal(normed.scale, scale)
    assert torch.equal(stream, expected)
    assert isinstance(norm.read_by(layer, x[:16], added[:16], None), Tensor)
    with pytest.raises(TypeError, match="rounded tokens for a layer that takes none"):
        Linear(Dense(x[:16]))(normed)


def test_a_mixture_reads_tokens_as_they_are(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of their readers only attention's can say that it wants them rounded."""
    seen, read = Seen(monkeypatch), []

    def mixture(self: Experts, x: Tensor) -> Tensor:
        read.append(x)
        return torch.zeros_like(x)

    monkeypatch.setattr(Experts, "__call__", mixture)
    monkeypatch.setattr(dispatch, "has_triton", lambda x: False)
    folder = tiny_checkpoint("mixtral")
    shape = read_config(folder)
    with Weights(folder, torch.bfloat16, CPU, "fp8") as weights:
        model = build_model(shape, weights)
    size = (shape.num_kv_heads, 1, 8, shape.head_dim)
    caches = [LayerCache.empty(size, torch.bfloat16, CPU) for _ in range(shape.num_layers)]
    batch = PagedBatch(
        query_starts=(0, 5), seq_lens=(5,), num_decodes=0, slots=torch.arange(5),
        block_tables=torch.zeros(1, 1, dtype=torch.int32), lengths=torch.tensor([5]),
    )  # fmt: skip
    with torch.inference_mode():
        model.forward(torch.arange(2, 7), torch.arange(5), caches, batch)
    assert [x.dtype for x in read] == [torch.bfloat16] * 3
    assert (len(seen.given), seen.apart) == (2 * 3, 3)
