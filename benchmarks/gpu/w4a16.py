"""Products with weights of 4 and 8 bits on the shapes of Llama-3.1-8B, and those that they replace.

What int4 is to reach as a whole is 2.3 times bfloat16 at one token and twice at 16: compare a line
with the one of ``bf16`` beside it. Clocks flush the L2 between runs, as a model's other layers do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from cases import Case, Make
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
#: A matrix, and what the table calls it.
_Named = tuple[str, Int4 | Int8 | GroupedInt8]


def cases(device: torch.device, small: bool) -> Iterator[Make]:
    for name, size in (_SMALL if small else _LAYERS).items():
        for tokens in (1, 70) if small else _TOKENS:
            x = partial(_tokens, device, tokens, size[1], small)
            yield partial(_bf16, name, x, size[0])
            yield partial(_packed, name, x, partial(_int4, device, *size, 64 if small else 128))
            yield partial(_packed, name, x, partial(_int8, device, *size))
            if small or (name == "gate_up" and tokens in (1, 16)):
                for rarer in (_between, _codebook, _grouped):
                    yield partial(_packed, name, x, partial(rarer, device, *size))


def _packed(name: str, tokens_of: Callable[[], Tensor], make: Callable[[], _Named]) -> Case:
    x, (what, matrix) = tokens_of(), make()
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


def _bf16(name: str, tokens_of: Callable[[], Tensor], out: int) -> Case:
    """What it is to be faster than."""
    x = tokens_of()
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


def _int4(device: torch.device, out: int, into: int, group: int) -> _Named:
    return "int4", _nibbles(device, out, into, group)


def _int8(device: torch.device, out: int, into: int) -> _Named:
    scale = (torch.rand(out, device=device) + 0.5) / 4096
    return "int8", Int8(_bytes(device, out, into), scale)


def _between(device: torch.device, out: int, into: int) -> _Named:
    """As quantisation on load makes it: zeros lie between the steps."""
    found = _nibbles(device, out, into, 32)
    zero = torch.rand_like(found.scale) * 15
    return "int4 by 32", Int4(found.packed, found.scale, zero, 32)


def _codebook(device: torch.device, out: int, into: int) -> _Named:
    """As bitsandbytes has it."""
    found = _nibbles(device, out, into, 64)
    codes = torch.linspace(-1.0, 1.0, 16, device=device)
    return "codebook by 64", Int4(found.packed, found.scale, None, 64, codes)


def _grouped(device: torch.device, out: int, into: int) -> _Named:
    """As GGUF has it."""
    scale = _nibbles(device, out, into, 32).scale
    return "int8 by 32", GroupedInt8(_bytes(device, out, into), scale, None, 32)


def _nibbles(device: torch.device, out: int, into: int, group: int) -> Int4:
    packed = torch.randint(256, (out, into // 2), dtype=torch.uint8, device=device)
    scale = (torch.rand(out, into // group, device=device) + 0.5) / 256
    return Int4(packed, scale, torch.randint_like(scale, 16), group)


def _bytes(device: torch.device, out: int, into: int) -> Tensor:
    return torch.randint(-128, 128, (out, into), dtype=torch.int8, device=device)


def _tokens(device: torch.device, tokens: int, width: int, small: bool) -> Tensor:
    # Triton's interpreter multiplies bfloat16 wrongly.
    dtype = torch.float16 if small else torch.bfloat16
    return torch.randn(tokens, width, device=device, dtype=dtype)
