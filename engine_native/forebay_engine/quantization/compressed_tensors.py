"""Checkpoints of compressed-tensors (LLM Compressor): FP8, int8, and packed 4 and 8 bits.

https://github.com/vllm-project/compressed-tensors. ``weight_packed [out, in / n]`` holds n = 32 /
bits values in an int32, lowest first, each signed value plus half the range; zeros of asymmetric
ones are packed the same way along the outputs. Activations stay in the model's type, or are rounded
to int8 by the kernel's own choice, whatever the file says of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from forebay_engine.hf_config import ModelError
from forebay_engine.quantization.fp8 import fp8_matrix, skip_cache_scales
from forebay_engine.quantization.stored import Tensors, grouped, unpack
from forebay_kernels.matrix import GroupedInt8, Int8, Matrix

_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")


class CompressedTensors:
    """Reads the formats in ``_FORMATS``; which one, each layer's tensors say."""

    def __init__(self, settings: dict[str, Any]) -> None:
        formats = [settings.get("format")]
        formats += [group.get("format") for group in settings.get("config_groups", {}).values()]
        for name in formats:
            if name is not None and name not in (*_FORMATS, "dense", "mixed-precision"):
                raise ModelError(
                    f"config.json: the compressed-tensors format {name!r} is not supported (these "
                    f"are: {', '.join(_FORMATS)}); give a checkpoint in one of them"
                )
        self._block = next(
            (
                group["weights"]["block_structure"]
                for group in settings.get("config_groups", {}).values()
                if group["weights"].get("block_structure")
            ),
            None,
        )

    def matrix(self, tensors: Tensors, name: str, out: int, into: int) -> Matrix | None:
        if f"{name}.weight_packed" in tensors:
            return _packed(tensors, name, out, into)
        if f"{name}.weight_scale" not in tensors:
            return None
        if tensors.dtype_of(f"{name}.weight") == torch.int8:
            return _int8(tensors, name, out, into)
        return fp8_matrix(tensors, name, "weight_scale", out, into, self._block)

    def finish(self, tensors: Tensors) -> None:
        skip_cache_scales(tensors)


def _packed(tensors: Tensors, name: str, out: int, into: int) -> Matrix:
    packed = tensors.raw(f"{name}.weight_packed")  # [out, in * bits / 32]
    shape = tensors.raw(f"{name}.weight_shape", 2).tolist()
    if shape != [out, into] or len(packed) != out:
        raise ModelError(f"{name} is {shape}, config.json asks for {[out, into]}")
    bits = packed.shape[1] * 32 // into
    if bits not in (4, 8):
        raise ModelError(f"{name}: {bits} packed bits are not supported; quantise to 4 or 8")
    scale = tensors.raw(f"{name}.weight_scale")  # [out, groups]
    zero: Tensor | None = None
    if f"{name}.weight_zero_point" in tensors:
        stored = tensors.raw(f"{name}.weight_zero_point", out * bits // 32, scale.shape[1])
        zero = unpack(stored.T.contiguous(), bits).T  # [out, groups]
    ordered = f"{name}.weight_g_idx" in tensors
    index = tensors.raw(f"{name}.weight_g_idx", into) if ordered else None
    return grouped(name, unpack(packed, bits), scale, zero, bits, index)


def _int8(tensors: Tensors, name: str, out: int, into: int) -> Matrix:
    weight = tensors.raw(f"{name}.weight", out, into)
    scale = tensors.raw(f"{name}.weight_scale").float()
    tensors.skip(f"{name}.{ending}" for ending in ("input_scale", "input_zero_point"))
    if scale.numel() not in (1, out):
        raise ModelError(
            f"{name}: int8 with scales {list(scale.shape)}; one an output is supported"
        )
    scale = scale.flatten().expand(out).contiguous()
    if f"{name}.weight_zero_point" not in tensors:
        return Int8(weight, scale)
    zero = tensors.raw(f"{name}.weight_zero_point").float().flatten().expand(out).reshape(out, 1)
    if not zero.any():
        return Int8(weight, scale)
    return GroupedInt8(weight, scale.reshape(out, 1), zero.contiguous(), into)
