"""The kernels between the matrix products, on the shapes of Qwen3-0.6B and Llama-3.1-8B.

What is computed in place is chosen to stay what it was, so that any run can be checked: an addition
too small to change a value, and of queries and keys the latter, which are not written where they
were read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from cases import Case, Make
from torch import Tensor

import forebay_kernels as kernels
from forebay_kernels import reference


@dataclass(frozen=True, slots=True)
class _Model:
    name: str
    width: int
    inner: int
    heads: int
    kv_heads: int
    dim: int
    #: Queries and keys are normed.
    normed: bool
    vocab: int


_MODELS = [
    _Model("0.6B", 1024, 3072, 16, 8, 128, True, 151_936),
    _Model("8B", 4096, 14_336, 32, 8, 128, False, 128_256),
]
_SMALL = [_Model("tiny", 48, 40, 3, 2, 16, True, 50)]
_TOKENS = (1, 64, 256, 8192)
_BLOCK_SIZE = 16
#: Of bfloat16 and E4M3 where Triton's interpreter cuts off; rounding makes half of it.
_TOLERANCE, _FP8_TOLERANCE = 6e-3, 0.1
#: Share of the copy ceiling where there is enough to copy; below, launches are the time.
_GOAL, _MANY = 0.8, 8192


def cases(device: torch.device, small: bool) -> Iterator[Make]:
    for model in _SMALL if small else _MODELS:
        for tokens in (1, 3) if small else _TOKENS:
            goal = _GOAL if tokens >= _MANY else None
            for rows in (_add_rms_norm, _select_rms_norm, _silu_mul, _embedding):
                yield partial(rows, device, model, tokens, goal)
            yield partial(_rotary_angles, device, model, tokens)
            for fp8 in (False, True):
                yield partial(_prepare, device, model, tokens, goal, fp8=fp8)


def _add_rms_norm(device: torch.device, model: _Model, tokens: int, goal: float | None) -> Case:
    x, weight = _values(device, tokens, model.width), _weights(device, model.width)
    added = x * 2.0**-10
    return Case(
        name=f"add_rms_norm: {model.name}, {tokens} tokens",
        run=lambda: kernels.add_rms_norm(x, added, None, weight, 1e-6),
        reference=lambda: reference.rms_norm(x.float(), weight, 1e-6),
        tolerance=_TOLERANCE,
        bytes=4 * x.nbytes + weight.nbytes,
        goal=goal,
    )


def _select_rms_norm(device: torch.device, model: _Model, tokens: int, goal: float | None) -> Case:
    x, weight = _values(device, tokens, model.width), _weights(device, model.width)
    at = torch.arange(tokens, device=device).flip(0)
    return Case(
        name=f"select_rms_norm: {model.name}, {tokens} tokens",
        run=lambda: kernels.select_rms_norm(x, at, weight, 1e-6),
        reference=lambda: reference.select_rms_norm(x.float(), at, weight, 1e-6),
        tolerance=_TOLERANCE,
        bytes=2 * x.nbytes + weight.nbytes + at.nbytes,
        goal=goal,
    )


def _silu_mul(device: torch.device, model: _Model, tokens: int, goal: float | None) -> Case:
    both = _values(device, tokens, 2 * model.inner)
    return Case(
        name=f"silu_mul: {model.name}, {tokens} tokens",
        run=lambda: kernels.silu_mul(both),
        reference=lambda: reference.silu_mul(both.float()),
        tolerance=_TOLERANCE,
        bytes=3 * both.nbytes // 2,
        goal=goal,
    )


def _embedding(device: torch.device, model: _Model, tokens: int, goal: float | None) -> Case:
    table = _values(device, model.vocab, model.width)
    random = torch.Generator().manual_seed(1)
    token_ids = torch.randint(model.vocab, (tokens,), generator=random).to(device)
    return Case(
        name=f"embedding: {model.name}, {tokens} tokens",
        run=lambda: kernels.embedding(token_ids, table, 25.25),
        reference=lambda: reference.embedding(token_ids, table, 25.25),
        tolerance=_TOLERANCE,
        bytes=4 * tokens * model.width + token_ids.nbytes,
        goal=goal,
    )


def _rotary_angles(device: torch.device, model: _Model, tokens: int) -> Case:
    positions = torch.arange(1, tokens + 1, device=device)
    frequency = _frequency(model.dim, device)
    return Case(
        name=f"rotary_angles: {model.name}, {tokens} tokens",
        run=lambda: kernels.rotary_angles(positions, frequency, 1.0),
        reference=lambda: reference.rotary_angles(positions, frequency, 1.0),
        tolerance=1e-5,
        bytes=4 * tokens * model.dim + positions.nbytes,
    )


def _prepare(
    device: torch.device, model: _Model, tokens: int, goal: float | None, *, fp8: bool
) -> Case:
    kept, all_heads = model.heads + model.kv_heads, model.heads + 2 * model.kv_heads
    qkv = _values(device, tokens, all_heads * model.dim).view(tokens, all_heads, model.dim)
    norm = _weights(device, kept * model.dim).view(kept, model.dim) if model.normed else None
    angles = reference.rotary_angles(
        torch.arange(1, tokens + 1, device=device), _frequency(model.dim, device), 1.0
    )
    pages = -(-tokens // _BLOCK_SIZE)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(2))
    slots = (order.unsqueeze(1) * _BLOCK_SIZE + torch.arange(_BLOCK_SIZE)).flatten()[:tokens]
    slots = slots.to(device)
    size = (model.kv_heads, pages, _BLOCK_SIZE, model.dim)
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    keys, values = (torch.zeros(size, device=device).to(dtype) for _ in range(2))
    scales = (torch.full((model.kv_heads,), 0.03, device=device),) * 2 if fp8 else (None, None)
    before = qkv.clone()

    def run() -> tuple[Tensor, Tensor]:
        kernels.prepare_qkv(qkv, model.kv_heads, norm, 1e-6, angles, keys, values, slots, *scales)
        return keys, values

    def expected() -> tuple[Tensor, Tensor]:
        wide = torch.zeros(size, device=device), torch.zeros(size, device=device)
        reference.prepare_qkv(before.float(), model.kv_heads, norm, 1e-6, angles, *wide, slots)
        return (wide[0] / 0.03, wide[1] / 0.03) if fp8 else wide

    each = 2 * tokens * model.dim  # bytes of a head
    stored = 2 * model.kv_heads * each
    return Case(
        name=f"prepare_qkv{' into fp8' if fp8 else ''}: {model.name}, {tokens} tokens",
        run=run,
        reference=expected,
        tolerance=_FP8_TOLERANCE if fp8 else _TOLERANCE,
        bytes=(all_heads + model.heads) * each
        + (stored // 2 if fp8 else stored)
        + 4 * tokens * model.dim
        + 8 * tokens,
        goal=goal,
    )


def _values(device: torch.device, *shape: int) -> Tensor:
    random = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=random, device=device, dtype=torch.bfloat16)


def _weights(device: torch.device, width: int) -> Tensor:
    return torch.linspace(0.5, 1.5, width, device=device)


def _frequency(dim: int, device: torch.device) -> Tensor:
    half = dim // 2
    return 5e5 ** -(torch.arange(half, device=device) / half)
