"""What a step launches on a GPU: a decoder run as there, by Triton's interpreter, and counted.

Each launch in a captured graph takes 1.3 us or more, so at one stream their number is the time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

import forebay_kernels as kernels
from forebay_engine.batch import build_batch
from forebay_engine.hf_config import read_config
from forebay_engine.layers import LayerCache
from forebay_engine.linear import Linear
from forebay_engine.models import build_model
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import Row, StepPlan
from forebay_engine.weights import Weights
from forebay_kernels import dispatch
from forebay_kernels.gpu.fp8 import PackedFp8
from forebay_kernels.matrix import Matrix

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="counts the launches of Triton's interpreter"
)

CPU = torch.device("cpu")
#: Operators of torch that launch nothing.
FREE = {"view", "slice", "empty", "empty_like"}


@contextmanager
def launches(
    patch: pytest.MonkeyPatch, product: tuple[type, str] = (Linear, "__call__")
) -> Iterator[Counter[str]]:
    """Count by name: kernels in Triton, torch's operators, products and attention as one each."""
    found: Counter[str] = Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = func.overloadpacket.__name__
            if name not in FREE:
                found[name] += 1
            return func(*args, **(kwargs or {}))

    def counted(run: Callable[..., Any], name: Callable[[Any], str]) -> Callable[..., Any]:
        def one(self: Any, *args: Any, **settings: Any) -> Any:
            found[name(self)] += 1
            before = found.copy()
            with _disable_current_modes():
                result = run(self, *args, **settings)
            found.clear()
            found.update(before)  # of what lies within, nothing
            return result

        return one

    with patch.context() as patched, Watch():
        patched.setattr(dispatch, "has_triton", lambda x: True)
        launch = counted(GridExecutor.__call__, lambda executor: executor.fn.__name__.strip("_"))
        patched.setattr(GridExecutor, "__call__", launch)
        patched.setattr(*product, counted(getattr(*product), lambda _: "product"))
        patched.setattr(
            kernels, "paged_attention", counted(kernels.paged_attention, lambda _: "attention")
        )
        yield found


class Step:
    """The next token of two sequences through a decoder."""

    def __init__(self, folder: Path, dtype: torch.dtype, quantization: str = "none") -> None:
        self.shape = shape = read_config(folder)
        with Weights(folder, dtype, CPU, quantization) as weights, torch.no_grad():
            self._model = build_model(shape, weights)
        row: dict[str, Any] = {"count": 1, "sample": True, "sampling": SamplingParams()}
        self._batch = build_batch(
            StepPlan(
                tuple(
                    Row(i, [7] * length, length - 1, block_tables=(pages,), num_prompt=1, **row)
                    for i, (length, pages) in enumerate([(3, [2]), (10, [0, 4])])
                )
            ),
            8,
            CPU,
        )
        size = (shape.num_layers, 2, shape.num_kv_heads, 5, 8, shape.head_dim)
        self._held = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)

    def caches(self) -> list[LayerCache]:
        """What the layers know: each time the same."""
        return [LayerCache(keys, values) for keys, values in self._held.clone()]

    def run(self, caches: list[LayerCache]) -> Tensor:
        """The last hidden states."""
        batch = self._batch
        with torch.no_grad():
            return self._model.forward(batch.token_ids, batch.positions, caches, batch.paged)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3", "gemma2"])
def test_a_layer_is_four_products_attention_and_four_small_kernels(
    family: str, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step(tiny_checkpoint(family), torch.float32)
    held, expected = step.caches(), step.caches()
    want = step.run(expected)
    with launches(monkeypatch) as found:
        got = step.run(held)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    for one, other in zip(held, expected, strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(one.values, other.values, atol=2e-5, rtol=1e-5)
    layers = step.shape.num_layers
    assert found == {
        "embedding_kernel": 1,
        "angles_kernel": 2 if family.startswith("gemma") else 1,
        "norm_kernel": 1,
        "product": 4 * layers,
        "prepare_kernel": layers,
        "attention": layers,
        "gate_kernel": layers,
        "add_norm_kernel": 2 * layers,
    }


def test_a_layer_in_fp8_has_one_small_kernel_more(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It rounds what attention gives; norms and gates round what the other products read.

    In bfloat16, so that the products are ``torch._scaled_mm`` with tokens in e4m3.
    """
    monkeypatch.setattr(Matrix, "device", torch.device("cuda"))
    monkeypatch.setattr(PackedFp8, "rounds", lambda self, x: True)  # else from 17 tokens on
    step = Step(tiny_checkpoint("llama"), torch.bfloat16, "fp8")
    caches = step.caches()
    step.run(caches)  # lays out the weights
    with launches(monkeypatch, (PackedFp8, "quantized")) as found:
        step.run(caches)
    layers = step.shape.num_layers
    before = {
        "embedding_kernel": 1,
        "angles_kernel": 1,
        "product": 4 * layers,
        "prepare_kernel": layers,
        "attention": layers,
    }
    assert found == {
        **before,
        "norm_quantize_kernel": 2 * layers,
        "quantize_kernel": 2 * layers,  # of attention, and behind the gate
        "add_norm_kernel": 1,  # the last
    }
    # As it would be without: 8 small kernels a layer instead of 5.
    monkeypatch.setattr(Linear, "group", lambda self, x: None)
    with launches(monkeypatch, (PackedFp8, "quantized")) as found:
        step.run(caches)
    assert found == {
        **before,
        "norm_kernel": 1,
        "add_norm_kernel": 2 * layers,
        "gate_kernel": layers,
        "quantize_kernel": 4 * layers,
    }
