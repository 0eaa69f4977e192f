"""The parts that decoders are made of, over the operators of ``forebay_kernels``."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

import forebay_kernels as kernels
from forebay_engine.hf_config import ModelConfig, ModelError
from forebay_engine.linear import Linear, Rounded, Tokens
from forebay_engine.rotary import Angles
from forebay_engine.weights import Weights
from forebay_kernels.matrix import concatenate

#: Of every token by itself: ``[tokens, n] -> [tokens, m]``.
Part = Callable[[Tensor], Tensor]


class RmsNorm:
    """Norm with its weight kept in float32; Gemma's ``1 + w`` is added up once, here."""

    def __init__(self, weight: Tensor, eps: float, *, unit_offset: bool = False) -> None:
        self._weight = weight.float() + 1.0 if unit_offset else weight.float()
        self._eps = eps

    def __call__(
        self, x: Tensor, added: Tensor | None = None, inner: RmsNorm | None = None
    ) -> Tensor:
        """The norm of ``x``, to which ``added`` or its ``inner`` norm is added first, in place."""
        if added is None:
            return kernels.rms_norm(x, self._weight, self._eps)
        weight = None if inner is None else inner._weight
        return kernels.add_rms_norm(x, added, weight, self._weight, self._eps)

    def read_by(
        self, reader: Linear, x: Tensor, added: Tensor | None, inner: RmsNorm | None
    ) -> Tokens:
        """The same for one reader alone: rounded in the same pass if it wants its tokens so."""
        group = reader.group(x)
        if group is None:
            return self(x, added, inner)
        if added is None:
            return Rounded(*kernels.rms_norm_fp8(x, self._weight, self._eps, group), x.dtype)
        weight = None if inner is None else inner._weight
        found = kernels.add_rms_norm_fp8(x, added, weight, self._weight, self._eps, group)
        return Rounded(*found, x.dtype)

    @property
    def weight(self) -> Tensor:
        return self._weight

    @property
    def eps(self) -> float:
        return self._eps


class LayerNorm:
    """Norm by mean and variance; weight and bias ``[n]`` or neither."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        self._weight, self._bias, self._eps = weight, bias, eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self._weight, self._bias, self._eps)


def layer_norm(config: ModelConfig, weights: Weights, name: str) -> LayerNorm:
    """The norm of hidden states that is stored as ``name``."""
    weight, bias = (
        weights.take(f"{name}.{part}", config.hidden_size) for part in ("weight", "bias")
    )
    return LayerNorm(weight, bias, config.norm_eps)


#: Of keys and of values: what a stored number is multiplied with, one for each KV head.
Scales = tuple[Tensor, Tensor]  # [kv_heads] float32 each


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's keys and values, paged."""

    keys: Tensor  # [kv_heads, pages, block_size, head_dim]
    values: Tensor  # [kv_heads, pages, block_size, head_dim]
    #: Of FP8: what a stored number is multiplied with.
    key_scale: Tensor | None = None  # [kv_heads] float32
    value_scale: Tensor | None = None  # [kv_heads] float32

    @classmethod
    def empty(
        cls,
        size: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        scales: Scales | None = None,
    ) -> LayerCache:
        """Pages without tokens; ``scales`` are for FP8, and None there is 1."""
        # Not filled: no operator reads a slot that holds no token, and a start is 0.3 s shorter.
        keys, values = (torch.empty(size, dtype=dtype, device=device) for _ in range(2))
        if dtype != torch.float8_e4m3fn:
            return cls(keys, values)
        return cls(keys, values, *(scales or torch.ones(2, size[0], device=device)))


class Attention:
    """One projection to queries, keys and values, paged attention, one projection back.

    ``norm`` is one over query and key heads: ``[heads + kv_heads, head_dim]``.
    """

    def __init__(
        self,
        config: ModelConfig,
        qkv: Linear,
        out: Linear,
        *,
        layer: int,
        scale: float,
        norm: RmsNorm | None = None,
    ) -> None:
        self._heads, self._kv_heads = config.num_heads, config.num_kv_heads
        self._head_dim = config.head_dim
        #: All that reads the tokens it is given.
        self.reader = qkv
        self._out, self._norm = out, norm
        self._scale = scale
        self._window = config.sliding_window if config.sliding[layer] else None
        self._softcap = config.attn_logit_softcapping

    def __call__(
        self, x: Tokens, angles: Angles | None, cache: LayerCache, batch: kernels.PagedBatch
    ) -> Tensor:
        heads, kv_heads = self._heads, self._kv_heads
        batch = batch.within(self._window)
        qkv = self.reader(x)
        found = kernels.paged_attention(
            kernels.prepare_qkv(
                qkv.view(len(qkv), heads + 2 * kv_heads, self._head_dim),
                kv_heads,
                None if self._norm is None else self._norm.weight,
                0.0 if self._norm is None else self._norm.eps,
                None if angles is None else (angles.cos, angles.sin),
                cache.keys,
                cache.values,
                batch.slots,
                cache.key_scale,
                cache.value_scale,
            ),
            cache.keys,
            cache.values,
            batch,
            scale=self._scale,
            window=self._window,
            softcap=self._softcap,
            key_scale=cache.key_scale,
            value_scale=cache.value_scale,
        )
        return self._out(found.flatten(1))


def attention(
    config: ModelConfig,
    weights: Weights,
    prefix: str,
    *,
    layer: int,
    scale: float,
    qkv_bias: bool,
    out_bias: bool,
    qk_norm: bool = False,
    unit_offset: bool = False,
    fused: bool = False,
) -> Attention:
    """Attention in the names of Llama and those after it; ``fused``: stored as one, as Phi-3's."""
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    parts = {"q_proj": heads * dim, "k_proj": kv_heads * dim, "v_proj": kv_heads * dim}
    if fused:
        parts = {"qkv_proj": sum(parts.values())}
    named = {f"{prefix}.{name}": out for name, out in parts.items()}
    qkv = merged(weights, named, config.hidden_size, bias=qkv_bias)
    out = linear(weights, f"{prefix}.o_proj", config.hidden_size, heads * dim, bias=out_bias)
    norm: RmsNorm | None = None
    if qk_norm:
        each = [(f"{prefix}.q_norm.weight", heads), (f"{prefix}.k_norm.weight", kv_heads)]
        weight = torch.cat(
            [weights.take(n, dim, dtype=torch.float32).expand(count, dim) for n, count in each]
        )
        norm = RmsNorm(weight, config.norm_eps, unit_offset=unit_offset)
    return Attention(config, qkv, out, layer=layer, scale=scale, norm=norm)


class PreNormLayer:
    """Attention and MLP, each reading a norm of the residual stream and added to it."""

    def __init__(
        self, attention_norm: Part, attention: Attention, mlp_norm: Part, mlp: Part
    ) -> None:
        self._attention_norm, self._attention = attention_norm, attention
        self._mlp_norm, self._mlp = mlp_norm, mlp

    def __call__(
        self, x: Tensor, angles: Angles | None, cache: LayerCache, batch: kernels.PagedBatch
    ) -> Tensor:
        x = x + self._attention(self._attention_norm(x), angles, cache, batch)
        return x + self._mlp(self._mlp_norm(x))


class ResidualLayer:
    """Attention and MLP between norms: each addition to the stream is one pass with the next norm.

    ``after_attention`` and ``after_mlp`` norm what is added, as Gemma does.
    """

    def __init__(
        self,
        before_attention: RmsNorm,
        attention: Attention,
        before_mlp: RmsNorm,
        mlp: Part,
        *,
        after_attention: RmsNorm | None = None,
        after_mlp: RmsNorm | None = None,
    ) -> None:
        self._before_attention, self._before_mlp = before_attention, before_mlp
        self._attention, self._mlp = attention, mlp
        self._after_attention, self.after_mlp = after_attention, after_mlp

    def __call__(
        self,
        x: Tensor,
        added: Tensor | None,
        inner: RmsNorm | None,
        angles: Angles,
        cache: LayerCache,
        batch: kernels.PagedBatch,
    ) -> Tensor:
        """Add ``added``, or its ``inner`` norm, to the stream ``x`` in place, and its attention.

        What its MLP gives comes back, for the next norm to add: that is one pass.
        """
        attention, mlp = self._attention, self._mlp
        # Norms are not named, so that none is kept longer than it is read.
        added = attention(
            self._before_attention.read_by(attention.reader, x, added, inner), angles, cache, batch
        )
        inner = self._after_attention
        if isinstance(mlp, GatedMlp):
            return mlp(self._before_mlp.read_by(mlp.reader, x, added, inner))
        # A mixture, whose router reads tokens as they are.
        return mlp(self._before_mlp(x, added, inner))


def through(
    layers: Items[ResidualLayer],
    norm: RmsNorm,
    x: Tensor,
    angles: Items[Angles],
    caches: Items[LayerCache],
    batch: kernels.PagedBatch,
) -> Tensor:
    """The stream ``x``, which is overwritten, behind all layers and the last ``norm``.

    :param angles: of each layer.
    """
    added: Tensor | None = None
    inner: RmsNorm | None = None
    for layer, turn, cache in zip(layers, angles, caches, strict=True):
        added = layer(x, added, inner, turn, cache, batch)
        inner = layer.after_mlp
    return norm(x, added, inner)


class Mlp:
    """``down(act(up(x)))``."""

    def __init__(self, up: Linear, down: Linear, hidden_act: str) -> None:
        self._up, self._down = up, down
        self._act = _choice(hidden_act, _ACTIVATIONS)

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(self._act(self._up(x)))


_GELU_TANH = partial(F.gelu, approximate="tanh")
_ACTIVATIONS: dict[str, Part] = {
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
}


class GatedMlp:
    """``down(act(gate(x)) * up(x))``."""

    def __init__(self, gate_up: Linear, down: Linear, hidden_act: str) -> None:
        #: All that reads the tokens it is given.
        self.reader = gate_up
        self._down = down
        self._act, self._act_fp8 = _choice(hidden_act, _GATES)

    def __call__(self, x: Tokens) -> Tensor:
        both = self.reader(x)
        group = self._down.group(both)
        if group is None:
            return self._down(self._act(both))
        return self._down(Rounded(*self._act_fp8(both, group), both.dtype))


def gated_mlp(
    config: ModelConfig, weights: Weights, prefix: str, *, fused: bool = False
) -> GatedMlp:
    """An MLP in the names of Llama; ``fused``: gate and up stored as one, as Phi-3's."""
    inner, outer = config.intermediate_size, config.hidden_size
    parts = {"gate_up_proj": 2 * inner} if fused else {"gate_proj": inner, "up_proj": inner}
    named = {f"{prefix}.{name}": out for name, out in parts.items()}
    gate_up = merged(weights, named, outer, bias=config.mlp_bias)
    down = linear(weights, f"{prefix}.down_proj", outer, inner, bias=config.mlp_bias)
    return GatedMlp(gate_up, down, config.hidden_act)


#: Of each gate the plain form, and that which rounds to e4m3 in groups of so many columns.
_GATES: dict[str, tuple[Part, Callable[[Tensor, int], tuple[Tensor, Tensor]]]] = {
    "silu": (kernels.silu_mul, kernels.silu_mul_fp8),
    "gelu_pytorch_tanh": (kernels.gelu_tanh_mul, kernels.gelu_tanh_mul_fp8),
}

_Known = TypeVar("_Known")


def _choice(name: str, known: dict[str, _Known]) -> _Known:
    if name not in known:
        raise ModelError(f"config.json: hidden_act {name!r} is not one of {', '.join(known)}")
    return known[name]


def linear(
    weights: Weights, name: str, out: int, into: int, *, bias: bool, transposed: bool = False
) -> Linear:
    """The layer stored under ``name``, ``[out, into]``, with its bias if it has one.

    ``transposed``: stored as ``[into, out]``, as GPT-2's are.
    """
    return merged(weights, {name: out}, into, bias=bias, transposed=transposed)


def merged(
    weights: Weights, parts: dict[str, int], into: int, *, bias: bool, transposed: bool = False
) -> Linear:
    """Layers that read the same input as one: it is read once, and one call is made."""
    each = [weights.matrix(n, out, into, transposed=transposed) for n, out in parts.items()]
    matrix = concatenate(each, weights.dtype)
    if not bias:
        return Linear(matrix)
    return Linear(matrix, torch.cat([weights.take(f"{n}.bias", out) for n, out in parts.items()]))
