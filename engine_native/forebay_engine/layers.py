"""The parts that decoders are made of, over the operators of ``forebay_kernels``."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import forebay_kernels as kernels
from forebay_engine.hf_config import ModelConfig, ModelError
from forebay_engine.linear import Linear
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

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self._weight, self._eps)

    def after(self, x: Tensor, added: Tensor, inner: RmsNorm | None = None) -> Tensor:
        """Add ``added``, or the ``inner`` norm of it, to ``x`` in place, and norm the sum."""
        weight = None if inner is None else inner._weight
        return kernels.add_rms_norm(x, added, weight, self._weight, self._eps)

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
        self._qkv, self._out, self._norm = qkv, out, norm
        self._scale = scale
        self._window = config.sliding_window if config.sliding[layer] else None
        self._softcap = config.attn_logit_softcapping

    def __call__(
        self, x: Tensor, angles: Angles | None, cache: LayerCache, batch: kernels.PagedBatch
    ) -> Tensor:
        heads, kv_heads = self._heads, self._kv_heads
        batch = batch.within(self._window)
        found = kernels.paged_attention(
            kernels.prepare_qkv(
                self._qkv(x).view(len(x), heads + 2 * kv_heads, self._head_dim),
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
        self.before_attention, self._before_mlp = before_attention, before_mlp
        self._attention, self._mlp = attention, mlp
        self._after_attention, self._after_mlp = after_attention, after_mlp

    def __call__(
        self,
        x: Tensor,
        normed: Tensor,
        following: RmsNorm,
        angles: Angles,
        cache: LayerCache,
        batch: kernels.PagedBatch,
    ) -> Tensor:
        """Add to the stream ``x``, in place, what its ``normed`` gives; ``following`` norms it."""
        attended = self._attention(normed, angles, cache, batch)
        normed = self._before_mlp.after(x, attended, self._after_attention)
        return following.after(x, self._mlp(normed), self._after_mlp)


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
    normed = layers[0].before_attention(x)
    following = [*(layer.before_attention for layer in layers[1:]), norm]
    for layer, next_norm, turn, cache in zip(layers, following, angles, caches, strict=True):
        normed = layer(x, normed, next_norm, turn, cache, batch)
    return normed


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
        self._gate_up, self._down = gate_up, down
        self._act = _choice(hidden_act, _GATED_ACTIVATIONS)

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(self._act(self._gate_up(x)))


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


_GATED_ACTIVATIONS: dict[str, Part] = {
    "silu": kernels.silu_mul,
    "gelu_pytorch_tanh": kernels.gelu_tanh_mul,
}


def _choice(name: str, known: dict[str, Part]) -> Part:
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
