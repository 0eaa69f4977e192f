"""Products with FP8 weights, and the kernels that round tokens, on the shapes of Llama-3.1-8B.

Weights of a call are taken in turn from copies that together are larger than the L2, for in a model
they come from memory each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from math import ceil

import torch
import torch.nn.functional as F
from cases import Case
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
#: Four times an H200's L2, in bytes.
_COLD = 200 << 20
#: Of sums in float32, and of tokens rounded to three bits of mantissa.
_EXACT, _ROUNDED = 1e-2, 5e-2


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    for name, (out, into) in (_SMALL if small else _LAYERS).items():
        for tokens in (1, 20) if small else _TOKENS:
            yield _product(device, name, tokens, out, into, into, small)
            yield _bf16(device, name, tokens, out, into, small)
            if small or name == "gate_up":
                yield _product(device, name, tokens, out, into, into // 32 if small else 128, small)
    for tokens in (3,) if small else (64, _MANY):
        yield from _rounding(device, tokens, 48 if small else 4096, 40 if small else 14_336)


def _product(
    device: torch.device, name: str, tokens: int, out: int, into: int, group: int, small: bool
) -> Case:
    group = max(group, 32)
    values = torch.randn(out, into, device=device).to(torch.float8_e4m3fn)
    scale = torch.rand(out, ceil(into / group), device=device) + 0.5
    matrix = Fp8(values, scale, group)
    x = _tokens(device, tokens, into, small)
    copies = 1 if small else ceil(_COLD / values.nbytes)
    packed = [
        one
        for _ in range(copies)
        if (one := pack_fp8(Fp8(values.clone(), scale.clone(), group))) is not None
    ]
    layout = "a scale a channel" if group == into else f"groups of {group}"
    few = tokens <= _FEW
    return Case(
        name=f"fp8: {name} [{out}, {into}], {tokens} tokens, {layout}",
        run=_in_turn([partial(one, x) for one in packed]),
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
    copies = 1 if small else ceil(_COLD / weight.nbytes)
    return Case(
        name=f"bf16 beside fp8: {name} [{out}, {into}], {tokens} tokens",
        run=_in_turn([partial(F.linear, x, weight.clone()) for _ in range(copies)]),
        reference=lambda: x.float() @ weight.float().T,
        tolerance=_EXACT,
        bytes=weight.nbytes + 2 * tokens * (into + out),
        flops=2 * tokens * out * into,
    )


def _rounding(device: torch.device, tokens: int, width: int, inner: int) -> Iterator[Case]:
    """Alone, behind the norm of a sum, behind a gate: each reads and writes once."""
    x = torch.randn(tokens, width, device=device).to(torch.bfloat16)
    added = x * 2.0**-10  # too little to change a value, so that any run can be checked
    weight = torch.rand(width, device=device) + 0.5
    both = torch.randn(tokens, 2 * inner, device=device).to(torch.bfloat16)
    # What computes it, what says what is right, the values, and the bytes of each.
    kernels: list[tuple[str, _Rounding, _Rounding, int, int]] = [
        (
            "quantize_fp8",
            partial(quantize_fp8.quantize_fp8, x),
            partial(reference.quantize_fp8, x),
            width,
            3,
        ),
        (
            "rms_norm_fp8",
            partial(quantize_fp8.rms_norm_fp8, x, weight, 1e-6),
            partial(reference.rms_norm_fp8, x, weight, 1e-6),
            width,
            3,
        ),
        (
            "add_rms_norm_fp8",
            partial(quantize_fp8.add_rms_norm_fp8, x, added, None, weight, 1e-6),
            partial(reference.rms_norm_fp8, x, weight, 1e-6),
            width,
            7,
        ),
        (
            "silu_mul_fp8",
            partial(quantize_fp8.silu_mul_fp8, both),
            partial(reference.silu_mul_fp8, both),
            inner,
            5,
        ),
    ]
    for name, run, wanted, values, each in kernels:
        yield Case(
            name=f"{name}: {tokens} tokens of {values}",
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


def _in_turn(calls: list[Callable[[], Tensor]]) -> Callable[[], Tensor]:
    each = cycle(calls)
    return lambda: next(each)()
