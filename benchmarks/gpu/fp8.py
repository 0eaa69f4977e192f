"""Products with FP8 weights, and the kernels that round tokens, on the shapes of Llama-3.1-8B."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import ceil

import torch
import torch.nn.functional as F
from cases import Case, Make
from torch import Tensor

from forebay_kernels import reference
from forebay_kernels.gpu import quantize_fp8
from forebay_kernels.gpu.fp8 import pack_fp8
from forebay_kernels.matrix import Fp8

#: Outputs and inputs.
_LAYERS = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28_672, 4096),
    "down": (4096, 14_336),
}
_Rounding = Callable[[], tuple[Tensor, Tensor]]
_SMALL = {"small": (80, 128)}
_TOKENS = (1, 16, 64, 256, 4096)
#: Up to here tokens stay as they are (the table ``fp8_path``).
_FEW = 16
#: From here on there is enough to copy for a share of the copy ceiling to be asked for.
_MANY = 4096
#: Of sums in float32, and of tokens rounded to three bits of mantissa.
_EXACT, _ROUNDED = 1e-2, 5e-2


def cases(device: torch.device, small: bool) -> Iterator[Make]:
    for name, (out, into) in (_SMALL if small else _LAYERS).items():
        for tokens in (1, 20) if small else _TOKENS:
            shape = device, name, tokens, out, into
            yield partial(_product, *shape, into, small)
            yield partial(_bf16, *shape, small)
            if small or name == "gate_up":
                yield partial(_product, *shape, into // 32 if small else 128, small)
    for tokens in (3,) if small else (64, _MANY):
        for kernel in ("quantize_fp8", "rms_norm_fp8", "add_rms_norm_fp8", "silu_mul_fp8"):
            widths = (48, 40) if small else (4096, 14_336)
            yield partial(_rounding, device, kernel, tokens, *widths)


def _product(
    device: torch.device, name: str, tokens: int, out: int, into: int, group: int, small: bool
) -> Case:
    group = max(group, 32)
    values = torch.randn(out, into, device=device).to(torch.float8_e4m3fn)
    scale = torch.rand(out, ceil(into / group), device=device) + 0.5
    matrix = Fp8(values, scale, group)
    x = _tokens(device, tokens, into, small)
    packed = pack_fp8(matrix)
    if packed is None:
        raise ValueError(f"groups of {group}: no kernel takes them")
    layout = "a scale a channel" if group == into else f"groups of {group}"
    few = tokens <= _FEW
    return Case(
        name=f"fp8: {name} [{out}, {into}], {tokens} tokens, {layout}",
        run=partial(packed, x),
        reference=lambda: x.float() @ matrix.dequantize().T,
        tolerance=_EXACT if few else _ROUNDED,
        bytes=values.nbytes + scale.nbytes + 2 * tokens * (into + out),
        flops=2 * tokens * out * into,
        unit="bf16" if few else "fp8",
        goal=0.7 if few else None,
    )


def _bf16(device: torch.device, name: str, tokens: int, out: int, into: int, small: bool) -> Case:
    """What it is to be faster than."""
    x = _tokens(device, tokens, into, small)
    weight = torch.randn(out, into, device=device).to(x.dtype)
    return Case(
        name=f"bf16 beside fp8: {name} [{out}, {into}], {tokens} tokens",
        run=partial(F.linear, x, weight),
        reference=lambda: x.float() @ weight.float().T,
        tolerance=_EXACT,
        bytes=weight.nbytes + 2 * tokens * (into + out),
        flops=2 * tokens * out * into,
    )


def _rounding(device: torch.device, kernel: str, tokens: int, width: int, inner: int) -> Case:
    """Alone, behind the norm of a sum, behind a gate: each reads and writes once."""
    x = torch.randn(tokens, width, device=device).to(torch.bfloat16)
    added = x * 2.0**-10  # too little to change a value, so that any run can be checked
    weight = torch.rand(width, device=device) + 0.5
    both = torch.randn(tokens, 2 * inner, device=device).to(torch.bfloat16)
    run: _Rounding
    wanted: _Rounding
    match kernel:  # each value is read in two bytes, or four, and written in one
        case "quantize_fp8":
            run, wanted = partial(quantize_fp8.quantize_fp8, x), partial(reference.quantize_fp8, x)
            values, each = width, 3
        case "rms_norm_fp8":
            run = partial(quantize_fp8.rms_norm_fp8, x, weight, 1e-6)
            wanted = partial(reference.rms_norm_fp8, x, weight, 1e-6)
            values, each = width, 3
        case "add_rms_norm_fp8":
            run = partial(quantize_fp8.add_rms_norm_fp8, x, added, None, weight, 1e-6)
            wanted = partial(reference.rms_norm_fp8, x, weight, 1e-6)
            values, each = width, 7
        case _:
            run = partial(quantize_fp8.silu_mul_fp8, both)
            wanted = partial(reference.silu_mul_fp8, both)
            values, each = inner, 5
    return Case(
        name=f"{kernel}: {tokens} tokens of {values}",
        run=run,
        reference=wanted,
        tolerance=_ROUNDED,
        bytes=each * tokens * values,
        goal=0.8 if tokens >= _MANY else None,
    )


def _tokens(device: torch.device, tokens: int, width: int, small: bool) -> Tensor:
    # Triton's interpreter multiplies bfloat16 wrongly.
    dtype = torch.float16 if small else torch.bfloat16
    return torch.randn(tokens, width, device=device, dtype=dtype)
