"""FP8 checkpoints: weights in float8_e4m3fn with scales.

One scale, one for each output or one for each block of ``weight_block_size``. DeepSeek's and Qwen's
``weight_scale_inv`` is what the values are multiplied with, in spite of its name. Scales
for activations have no use here, as tokens get their own or stay as they are, nor those of a cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from forebay_engine.hf_config import ModelError
from forebay_engine.quantization.stored import Tensors
from forebay_kernels.matrix import Fp8, Matrix

_UNUSED = (".input_scale", ".activation_scale", ".input_scale_ub")
_CACHE = (".k_scale", ".v_scale", ".kv_scale", ".q_scale", ".prob_scale", ".output_scale")


class BlockFp8:
    """Reads ``quant_method: fp8``: with a scale for each block, or one for all."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._block = settings.get("weight_block_size")

    def matrix(self, tensors: Tensors, name: str, out: int, into: int) -> Matrix | None:
        for scale in ("weight_scale_inv", "weight_scale"):
            if f"{name}.{scale}" in tensors:
                return fp8_matrix(tensors, name, scale, out, into, self._block)
        return None

    def finish(self, tensors: Tensors) -> None:
        skip_cache_scales(tensors)


def fp8_matrix(
    tensors: Tensors, name: str, scale: str, out: int, into: int, block: list[int] | None
) -> Fp8:
    """The layer whose scales are stored as ``name``.``scale``."""
    weight = tensors.raw(f"{name}.weight", out, into)
    if weight.dtype != torch.float8_e4m3fn:
        raise ModelError(f"{name}.weight is {weight.dtype}; of FP8 only float8_e4m3fn is supported")
    scales = tensors.raw(f"{name}.{scale}").float()
    tensors.skip(f"{name}{ending}" for ending in _UNUSED)
    return Fp8(weight, *_spread(f"{name}.{scale}", scales, out, into, block))


def skip_cache_scales(tensors: Tensors) -> None:
    """Scales of keys and values: the cache has the model's type."""
    for ending in _CACHE:
        tensors.skip(tensors.left(ending))


def _spread(
    name: str, scale: Tensor, out: int, into: int, block: list[int] | None
) -> tuple[Tensor, int]:
    """Scales ``[out, groups]`` and the columns of a group."""
    if scale.numel() == 1:
        return scale.reshape(1, 1).repeat(out, 1), into
    if scale.numel() == out and scale.shape[0] == out:
        return scale.reshape(out, 1), into
    rows, columns = block or (0, 0)
    if rows and tuple(scale.shape) == (-(-out // rows), -(-into // columns)):
        return scale.repeat_interleave(rows, dim=0)[:out].contiguous(), columns
    raise ModelError(
        f"{name}: scales of the shape {list(scale.shape)} fit neither the whole matrix "
        f"{[out, into]}, nor its outputs, nor blocks of {block}"
    )
