"""The parts that decoders are made of, over the operators of ``forebay_kernels``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import forebay_kernels as kernels
from forebay_engine.hf_config import ModelConfig, ModelError, Rope
from forebay_engine.linear import Linear
from forebay_engine.weights import Weights
from forebay_kernels.matrix import concatenate


class RmsNorm:
    """Norm with its weight kept in float32; Gemma's ``1 + w`` is added up once, here."""

    def __init__(self, weight: Tensor, eps: float, *, unit_offset: bool = False) -> None:
        self._weight = weight.float() + 1.0 if unit_offset else weight.float()
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self._weight, self._eps)


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's keys and values, paged."""

    keys: Tensor  # [kv_heads, pages, block_size, head_dim]
    values: Tensor  # [kv_heads, pages, block_size, head_dim]


@dataclass(frozen=True, slots=True)
class Angles:
    """Cosine and sine of every token's rotation."""

    cos: Tensor  # [tokens, head_dim / 2] float32
    sin: Tensor  # [tokens, head_dim / 2] float32


class Rotary:
    """Angles of positions: ``position * theta ** (-2 i / dim)``, then the scaling of the type."""

    def __init__(self, rope: Rope, head_dim: int, device: torch.device) -> None:
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self._frequency = _scaled(1.0 / rope.theta**exponent, rope).to(device)  # [head_dim / 2]

    def __call__(self, positions: Tensor) -> Angles:
        angle = positions.float().unsqueeze(1) * self._frequency  # [tokens, head_dim / 2]
        return Angles(angle.cos(), angle.sin())


def _scaled(frequency: Tensor, rope: Rope) -> Tensor:
    if rope.kind == "default":
        return frequency
    if rope.kind == "linear":
        return frequency / rope.factor
    # llama3: keep the short waves, stretch the long ones, blend between (Llama 3.1's release code).
    turns = rope.original_max_position * frequency / (2.0 * math.pi)  # in the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = blend.clamp(0.0, 1.0)
    return kept * frequency + (1.0 - kept) * frequency / rope.factor


class Attention:
    """Projections, optional norms of queries and keys, rotation, paged attention."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        prefix: str,
        *,
        layer: int,
        scale: float,
        qkv_bias: bool,
        out_bias: bool,
        qk_norm: bool,
        unit_offset: bool = False,
    ) -> None:
        self._config = config
        self._scale = scale
        self._window = config.sliding_window if config.sliding[layer] else None
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self._qkv = _merged(
            weights,
            {
                f"{prefix}.{n}_proj": h * dim
                for n, h in (("q", heads), ("k", kv_heads), ("v", kv_heads))
            },
            config.hidden_size,
            bias=qkv_bias,
        )
        self._out = linear(
            weights, f"{prefix}.o_proj", config.hidden_size, heads * dim, bias=out_bias
        )
        self._norm: RmsNorm | None = None
        if qk_norm:  # one norm over query and key heads: [heads + kv_heads, head_dim]
            each = [(f"{prefix}.q_norm.weight", heads), (f"{prefix}.k_norm.weight", kv_heads)]
            weight = torch.cat(
                [weights.take(n, dim, dtype=torch.float32).expand(count, dim) for n, count in each]
            )
            self._norm = RmsNorm(weight, config.rms_norm_eps, unit_offset=unit_offset)

    def __call__(
        self, x: Tensor, angles: Angles, cache: LayerCache, batch: kernels.PagedBatch
    ) -> Tensor:
        heads, kv_heads = self._config.num_heads, self._config.num_kv_heads
        qkv = self._qkv(x).view(len(x), heads + 2 * kv_heads, self._config.head_dim)
        rotated, value = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if self._norm is not None:
            rotated = self._norm(rotated)
        rotated = kernels.rope(rotated, angles.cos, angles.sin)
        query, key = rotated[:, :heads], rotated[:, heads:]
        kernels.kv_store(key, value, cache.keys, cache.values, batch.slots)
        found = kernels.paged_attention(
            query,
            cache.keys,
            cache.values,
            batch,
            scale=self._scale,
            window=self._window,
            softcap=self._config.attn_logit_softcapping,
        )
        return self._out(found.flatten(1))


class GatedMlp:
    """``down(act(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str) -> None:
        inner, outer = config.intermediate_size, config.hidden_size
        parts = {f"{prefix}.gate_proj": inner, f"{prefix}.up_proj": inner}
        self._gate_up = _merged(weights, parts, outer, bias=config.mlp_bias)
        self._down = linear(weights, f"{prefix}.down_proj", outer, inner, bias=config.mlp_bias)
        self._act = _activation(config.hidden_act)

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(self._act(self._gate_up(x)))


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    known = {"silu": kernels.silu_mul, "gelu_pytorch_tanh": kernels.gelu_tanh_mul}
    if name not in known:
        raise ModelError(f"config.json: hidden_act {name!r} is not one of {', '.join(known)}")
    return known[name]


def linear(weights: Weights, name: str, out: int, into: int, *, bias: bool) -> Linear:
    """The layer stored under ``name``, ``[out, into]``, with its bias if it has one."""
    return _merged(weights, {name: out}, into, bias=bias)


def head(config: ModelConfig, weights: Weights, embedding: Tensor) -> Linear:
    """The output layer; config.json may say that it is the embedding ``[vocab, hidden]``."""
    if not config.tie_word_embeddings:
        return linear(weights, "lm_head", config.vocab_size, config.hidden_size, bias=False)
    weights.skip(["lm_head.weight"])
    return Linear(weights.tied(embedding))


def _merged(weights: Weights, parts: dict[str, int], into: int, *, bias: bool) -> Linear:
    """Layers that read the same input as one: it is read once, and one call is made."""
    each = [weights.matrix(name, out, into) for name, out in parts.items()]
    matrix = concatenate(each, weights.dtype)
    if not bias:
        return Linear(matrix)
    return Linear(matrix, torch.cat([weights.take(f"{n}.bias", out) for n, out in parts.items()]))
