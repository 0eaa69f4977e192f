"""Checkpoints of bitsandbytes: nf4 and fp4 (https://arxiv.org/abs/2305.14314), and int8
(https://arxiv.org/abs/2208.07339).

4 bits: ``weight`` holds two values a byte, the first in the high half, over the matrix read row by
row; each block of ``blocksize`` has an ``absmax``, and the value is ``quant_map[q] * absmax``. With
double quantisation ``absmax`` is a byte for ``nested_quant_map``, times ``nested_absmax`` of its
block, plus an offset. ``quant_state.bitsandbytes__nf4`` is a JSON object as bytes.

int8: ``w = weight * SCB / 127``. LLM.int8's outlier columns are a matter of activations, computed
there in float16; here the layer is int8 like any other.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from forebay_engine.hf_config import ModelError
from forebay_engine.quantization.stored import Tensors
from forebay_kernels.matrix import Int4, Int8, Matrix

_KINDS = ("nf4", "fp4")


class BitsAndBytes:
    """Reads both forms; which one, each layer's tensors say."""

    def matrix(self, tensors: Tensors, name: str, out: int, into: int) -> Matrix | None:
        weight = f"{name}.weight"
        for kind in _KINDS:
            if f"{weight}.quant_state.bitsandbytes__{kind}" in tensors:
                state = tensors.raw(f"{weight}.quant_state.bitsandbytes__{kind}")
                return _int4(tensors, weight, json.loads(bytes(state.tolist())), out, into)
        if f"{name}.SCB" not in tensors:
            return None
        if f"{name}.weight_format" in tensors and int(tensors.raw(f"{name}.weight_format")) != 0:
            raise ModelError(f"{name}: only bitsandbytes' row-major int8 is supported; save again")
        scale = tensors.raw(f"{name}.SCB", out).float() / 127.0
        return Int8(tensors.raw(weight, out, into), scale)

    def finish(self, tensors: Tensors) -> None:
        """Nothing else is stored."""


def _int4(tensors: Tensors, weight: str, state: dict[str, Any], out: int, into: int) -> Int4:
    if state["shape"] != [out, into]:
        raise ModelError(f"{weight} is {state['shape']}, config.json asks for {[out, into]}")
    # A block may run on into the next row; this part of one never does.
    group = math.gcd(into, state["blocksize"])
    if group % 2:
        raise ModelError(f"{weight}: {into} inputs, an odd number, are not supported in 4 bits")
    blocks = math.ceil(out * into / state["blocksize"])
    absmax = _absmax(tensors, weight, state, blocks).repeat_interleave(state["blocksize"] // group)
    packed = tensors.raw(weight).flatten().view(torch.uint8)  # [out * in / 2], high half first
    swapped = (packed >> 4) | (packed << 4)
    return Int4(
        swapped.reshape(out, into // 2),
        absmax[: out * into // group].reshape(out, into // group),
        None,
        group,
        tensors.raw(f"{weight}.quant_map", 16).float(),
    )


def _absmax(tensors: Tensors, weight: str, state: dict[str, Any], blocks: int) -> Tensor:
    absmax = tensors.raw(f"{weight}.absmax", blocks)
    if f"{weight}.nested_absmax" not in tensors:
        return absmax.float()
    size = state["nested_blocksize"]
    scale = tensors.raw(f"{weight}.nested_absmax", math.ceil(blocks / size)).float()
    code = tensors.raw(f"{weight}.nested_quant_map", 256).float()
    wide = scale.repeat_interleave(size)[:blocks]
    return code[absmax.int()] * wide + float(state["nested_offset"])
