"""Quantises dense weights while they are read, so that no calibration and no tool is needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from forebay_kernels import cpu
from forebay_kernels.matrix import Fp8, Int4, Int8, Matrix, pack_int4

#: The largest value of e4m3.
_FP8_LARGEST = 448.0
#: Columns that share a scale and a zero in int4.
_GROUP = 32
#: Parts of a group's range that its 16 levels may span; clipping the ends can serve the rest.
_SPANS = (1.0, 0.92, 0.84)
#: Values worked on at once: few enough to stay in a core's cache, and for torch to leave them to
#: one thread. Its own threads wait for each other after every operation, which on a busy machine
#: made this twenty times slower than threads with a part of the rows each.
_CHUNK = 1 << 15
#: The same on a GPU, where each operation is a launch: a model of 8B in some hundred chunks.
_GPU_CHUNK = 1 << 26


def to_int8(weight: Tensor) -> Int8:
    """Symmetric, by the largest value of each output channel: ``[out, in]``."""
    if cpu.available(weight):  # to the same bits, in a third of the time
        return cpu.round_to_int8(weight)
    out, into = weight.shape
    values = torch.empty(out, into, dtype=torch.int8, device=weight.device)
    scale = torch.empty(out, dtype=torch.float32, device=weight.device)

    def quantize(rows: slice) -> None:
        wide = weight[rows].float()
        scale[rows] = wide.abs().amax(dim=1) / 127.0
        divisor = torch.where(scale[rows] > 0.0, scale[rows], 1.0)
        values[rows] = (wide / divisor[:, None]).round_().to(torch.int8)

    _for_all_rows(quantize, weight)
    return Int8(values, scale)


def to_fp8(weight: Tensor) -> Fp8:
    """In e4m3, the largest value of each output channel as 448: ``[out, in]``."""
    out, into = weight.shape
    values = torch.empty(out, into, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(out, 1, dtype=torch.float32, device=weight.device)

    def quantize(rows: slice) -> None:
        wide = weight[rows].float()
        scale[rows] = wide.abs().amax(dim=1, keepdim=True) / _FP8_LARGEST
        divisor = torch.where(scale[rows] > 0.0, scale[rows], 1.0)
        # A quotient may be rounded up beyond the largest value, which is NaN in e4m3.
        rounded = (wide / divisor).clamp_(-_FP8_LARGEST, _FP8_LARGEST)
        values[rows] = rounded.to(torch.float8_e4m3fn)

    _for_all_rows(quantize, weight)
    return Fp8(values, scale, into)


def to_int4(weight: Tensor) -> Matrix:
    """Groups of 32 columns, scale and zero of each chosen for the least squared error.

    Inputs that no group of at least 8 columns divides are left to int8.
    """
    out, into = weight.shape
    group = math.gcd(into, _GROUP)
    if group < 8:
        return to_int8(weight)
    packed = torch.empty(out, into // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(out, into // group, dtype=torch.float32, device=weight.device)
    zero = torch.empty_like(scale)

    def quantize(rows: slice) -> None:
        groups = weight[rows].float().reshape(-1, into // group, group)
        found, scale[rows], zero[rows] = _fit(groups)
        packed[rows] = pack_int4(found.flatten(1))

    _for_all_rows(quantize, weight)
    return Int4(packed, scale, zero, group)


def _fit(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels ``[..., group]``, scale and zero ``[...]`` of the best of a few spans.

    For each span the values are rounded to its levels, and then scale and zero are fitted to the
    levels by least squares.
    """
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    middle, width = (low + high) / 2.0, (high - low).clamp_min(1e-30)
    mean = groups.mean(-1, keepdim=True)
    best = torch.full_like(low, math.inf)
    scale, levels = torch.zeros_like(low), torch.zeros_like(groups)
    for span in _SPANS:
        step = width * (span / 15.0)
        q = ((groups - middle) / step + 7.5).round_().clamp_(0.0, 15.0)
        q_mean = q.mean(-1, keepdim=True)
        centred = q - q_mean
        slope = (centred * groups).sum(-1, keepdim=True) / centred.square().sum(
            -1, keepdim=True
        ).clamp_min_(1e-30)
        error = (groups - mean - centred * slope).square().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, slope, scale)
        levels = torch.where(better, q, levels)
    # A group of equal values has no slope: one step away from zero it is all of them.
    flat = scale == 0.0
    scale = torch.where(flat, torch.where(mean == 0.0, 1.0, mean), scale)
    zero = levels.mean(-1, keepdim=True) - mean / scale
    return levels, scale.squeeze(-1), zero.squeeze(-1)


def _for_all_rows(quantize: Callable[[slice], None], weight: Tensor) -> None:
    """Call ``quantize`` for a few rows at a time, with a thread for each of torch's."""
    out, into = weight.shape
    step = max(1, (_CHUNK if weight.is_cpu else _GPU_CHUNK) // into)
    inference = torch.is_inference_mode_enabled()  # which a new thread does not know of

    def one(start: int) -> None:
        with torch.inference_mode(inference):
            quantize(slice(start, start + step))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(one, range(0, out, step)))


#: By the names of the setting ``quantization``: for the layers, and for the output layer, whose
#: errors go straight into the probabilities.
ON_LOAD: dict[str, tuple[Callable[[Tensor], Matrix], Callable[[Tensor], Matrix]]] = {
    "int8": (to_int8, to_int8),
    "int4": (to_int4, to_int8),
    "fp8": (to_fp8, to_int8),
}
