"""One layer's experts of Mixtral-8x7B and Qwen3-30B-A3B, routing included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch
from cases import Case, Make
from torch import Tensor

from forebay_kernels import reference
from forebay_kernels.gpu import moe
from forebay_kernels.matrix import Dense, Fp8, Matrix


@dataclass(frozen=True, slots=True)
class _Model:
    name: str
    experts: int
    top_k: int
    hidden: int
    inner: int


_MODELS = [
    _Model("Mixtral-8x7B", 8, 2, 4096, 14_336),
    _Model("Qwen3-30B-A3B", 128, 8, 2048, 768),
]
_SMALL = [_Model("small", 5, 2, 48, 40)]
_TOKENS = (1, 64, 256, 4096)
#: From here on a layer of Mixtral is bound by its products.
_MANY = 4096


def cases(device: torch.device, small: bool) -> Iterator[Make]:
    # Triton's interpreter multiplies bfloat16 wrongly.
    dtype = torch.float16 if small else torch.bfloat16
    for model in _SMALL if small else _MODELS:
        for fp8 in (False, True):
            experts = cache(partial(_experts, device, dtype, model, fp8))
            for tokens in (3,) if small else _TOKENS:
                yield partial(_case, device, dtype, model, tokens, experts)


_Experts = tuple[list[Matrix], list[Matrix], moe.PackedExperts]


def _experts(device: torch.device, dtype: torch.dtype, model: _Model, fp8: bool) -> _Experts:
    gate_up = _matrices(device, dtype, model, 2 * model.inner, model.hidden, fp8=fp8)
    down = _matrices(device, dtype, model, model.hidden, model.inner, fp8=fp8)
    return gate_up, down, moe.pack_experts(gate_up, down, dtype)


def _case(
    device: torch.device,
    dtype: torch.dtype,
    model: _Model,
    tokens: int,
    experts: Callable[[], _Experts],
) -> Case:
    gate_up, down, packed = experts()
    x = torch.randn(tokens, model.hidden, device=device, dtype=dtype)
    logits = torch.randn(tokens, model.experts, device=device, dtype=dtype)
    route = partial(moe.route, logits, model.top_k, normalised=True)
    weight, chosen = route()
    fp8 = isinstance(down[0], Fp8)
    asked = int((torch.bincount(chosen.flatten()) > 0).sum())
    read = asked * 3 * model.hidden * model.inner * (1 if fp8 else 2)

    def wanted() -> Tensor:
        # An expert at a time, as all of them in float32 are 5.6 GB.
        found = torch.zeros_like(x, dtype=torch.float32)
        for expert in range(model.experts):
            matrices = (ms[expert].dequantize()[None] for ms in (gate_up, down))
            # Of one expert, whose number is then 0.
            found += reference.experts(x.float(), weight, chosen - expert, *matrices)
        return found

    return Case(
        name=f"moe: {model.name}, {tokens} tokens, {'fp8' if fp8 else 'bf16'} weights",
        run=lambda: packed(x, *route()),
        reference=wanted,
        tolerance=2e-2,
        bytes=read + 2 * x.nbytes,
        flops=2 * tokens * model.top_k * 3 * model.hidden * model.inner,
        goal=0.6 if tokens < _MANY else 0.5,
    )


def _matrices(
    device: torch.device, dtype: torch.dtype, model: _Model, out: int, into: int, *, fp8: bool
) -> list[Matrix]:
    found: list[Matrix] = []
    for _ in range(model.experts):
        weight = torch.randn(out, into, device=device, dtype=dtype) * into**-0.5
        if fp8:
            scale = torch.full((out, 1), 2.0**-7, device=device)
            found.append(Fp8((weight.float() * 2.0**7).to(torch.float8_e4m3fn), scale, into))
        else:
            found.append(Dense(weight))
    return found
