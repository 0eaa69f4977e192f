"""Products with weights of 4 and 8 bits on the shapes of Llama-3.1-8B, and those that they replace.

What int4 is to reach as a whole is 2.3 times bfloat16 at one token and twice at 16: compare a line
with the one of ``bf16`` beside it. Clocks flush the L2 between runs, as a model's other layers do.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from cases import Case
from torch import Tensor

from forebay_kernels.gpu.linear import pack
from forebay_kernels.matrix import GroupedInt8, Int4, Int8

#: Outputs and inputs.
_LAYERS = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28_672, 4096),
    "down": (4096, 14_336),
}
_SMALL = {"small": (130, 192)}
_TOKENS = (1, 16, 32, 64, 128, 2048)
#: Of sums in float32 and outputs in 16 bits; where tokens are rounded to 8, or zeros to eighths.
_EXACT, _ROUNDED = 1e-2, 3e-2
#: From here on tokens are rounded for int8 weights (the table ``int8_path``).
_MANY = 65
#: Share of the copy ceiling up to 16 tokens; where less than so many bytes are read, starting and
#: ending take as long as reading.
_GOAL, _SMALL_GOAL, _SMALL_BYTES = 0.7, 0.5, 16 << 20


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    for name, (out, into) in (_SMALL if small else _LAYERS).items():
        for tokens in (1, 70) if small else _TOKENS:
            x = _tokens(device, tokens, into, small)
            yield _bf16(name, x, out)
            yield _packed(name, x, _int4(device, out, into, 64 if small else 128), "int4")
            yield _packed(name, x, _int8(device, out, into), "int8")
            if small or (name == "gate_up" and tokens in (1, 16)):
                yield from _rarer(name, x, out)


def _rarer(name: str, x: Tensor, out: int) -> Iterator[Case]:
    """What quantisation on load, bitsandbytes and GGUF make."""
    into = x.shape[1]
    by_32 = _int4(x.device, out, into, 32)
    between = torch.rand_like(by_32.scale) * 15
    yield _packed(name, x, Int4(by_32.packed, by_32.scale, between, 32), "int4 by 32")
    codes = torch.linspace(-1.0, 1.0, 16, device=x.device)
    by_64 = _int4(x.device, out, into, 64)
    yield _packed(name, x, Int4(by_64.packed, by_64.scale, None, 64, codes), "codebook by 64")
    weight = _int8(x.device, out, into).weight
    yield _packed(name, x, GroupedInt8(weight, by_32.scale, None, 32), "int8 by 32")


def _packed(name: str, x: Tensor, matrix: Int4 | Int8 | GroupedInt8, what: str) -> Case:
    layer = pack(matrix, None, x.dtype)
    if layer is None:
        raise ValueError(f"{what}: no kernel takes it")
    tokens, (out, into) = len(x), matrix.shape
    in_integers = what == "int8" and tokens >= _MANY
    steps = matrix.scale.numel() * (1 if isinstance(matrix, Int8) or matrix.zero is None else 2)
    weights = out * into // (2 if isinstance(matrix, Int4) else 1) + 2 * steps
    goal = _GOAL if weights >= _SMALL_BYTES else _SMALL_GOAL
    rounded = in_integers or what == "int4 by 32"
    return Case(
        name=f"{what}: {name} [{out}, {into}], {tokens} tokens",
        run=lambda: layer(x),
        reference=lambda: x.float() @ matrix.dequantize().T,
        tolerance=_ROUNDED if rounded else _EXACT,
        bytes=weights + 2 * tokens * (into + out),
        flops=2 * tokens * out * into,
        unit="int8" if in_integers else "bf16",
        goal=goal if tokens <= 16 else None,
    )


def _bf16(name: str, x: Tensor, out: int) -> Case:
    """What it is to be faster than."""
    tokens, into = x.shape
    weight = torch.randn(out, into, device=x.device).to(x.dtype)
    return Case(
        name=f"bf16: {name} [{out}, {into}], {tokens} tokens",
        run=lambda: F.linear(x, weight),
        reference=lambda: x.float() @ weight.float().T,
        tolerance=_EXACT,
        bytes=weight.nbytes + 2 * tokens * (into + out),
        flops=2 * tokens * out * into,
    )


def _int4(device: torch.device, out: int, into: int, group: int) -> Int4:
    packed = torch.randint(256, (out, into // 2), dtype=torch.uint8, device=device)
    scale = (torch.rand(out, into // group, device=device) + 0.5) / 256
    return Int4(packed, scale, torch.randint_like(scale, 16), group)


def _int8(device: torch.device, out: int, into: int) -> Int8:
    weight = torch.randint(-128, 128, (out, into), dtype=torch.int8, device=device)
    return Int8(weight, (torch.rand(out, device=device) + 0.5) / 4096)


def _tokens(device: torch.device, tokens: int, width: int, small: bool) -> Tensor:
    # Triton's interpreter multiplies bfloat16 wrongly.
    dtype = torch.float16 if small else torch.bfloat16
    return torch.randn(tokens, width, device=device, dtype=dtype)
