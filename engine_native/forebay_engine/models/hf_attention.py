"""Paged attention as transformers' models call it: one function, registered under a name of ours.

A model calls the function that its config names with ``[1, heads, tokens, head_dim]`` queries, keys
and values of the step's tokens (https://huggingface.co/docs/transformers/attention_interface). Ours
finds the step's cache at the calling module, writes the keys and values, and attends to the pages.
While a model is examined a mask function is registered too, and tells which window a layer has;
afterwards none is, and transformers makes no masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import forebay_kernels as kernels
from forebay_engine.layers import LayerCache

#: The name in ``config._attn_implementation``.
NAME = "forebay"

#: What a call may say besides queries, keys and values. All else could change the result.
_KNOWN = {"scaling", "softcap", "s_aux"}
#: Said for other attentions, or known from the masks.
_NEEDLESS = {"dropout", "sliding_window", "position_ids", "use_cache", "position_embeddings"}

#: Positions at which a mask is looked at: beyond the window of every model there is.
_FAR = (1 << 18, (1 << 18) + 12_345)


class UnfitAttention(ValueError):
    """A model whose attention is not one over the pages of its sequence; the message says why."""


@dataclass(slots=True)
class Layer:
    """What an attention layer was seen to ask for."""

    kv_heads: int
    key_dim: int
    value_dim: int
    #: Attends to this many last positions; None: to all.
    window: int | None
    #: Its pages are those of layers with this window.
    pages: int | None = None


@dataclass(slots=True)
class Step:
    """What the layers of one model share: the pages of the step that runs, or the examination."""

    layers: dict[int, Layer] = field(default_factory=dict)
    caches: list[LayerCache] = field(default_factory=list)
    batch: kernels.PagedBatch | None = None

    def attend(
        self,
        module: nn.Module,
        query: Tensor,  # [1, heads, tokens, head_dim]
        key: Tensor,  # [1, kv_heads, tokens, head_dim]
        value: Tensor,  # [1, kv_heads, tokens, head_dim]
        mask: Tensor | None,
        said: dict[str, Any],
    ) -> Tensor:
        """``[1, tokens, heads, head_dim]``."""
        index = int(module.layer_idx)  # type: ignore[arg-type] # torch types attributes as modules
        if self.batch is None:
            self._examine(module, index, key, value, mask, said)
            shape = (1, query.shape[2], query.shape[1], value.shape[3])
            return torch.zeros(shape, dtype=query.dtype, device=query.device)
        cache, layer = self.caches[index], self.layers[index]
        batch = self.batch.within(layer.pages)
        k, v, q = (x[0].transpose(0, 1).contiguous() for x in (key, value, query))
        scales = cache.key_scale, cache.value_scale
        kernels.kv_store(k, v, cache.keys, cache.values, batch.slots, *scales)
        scale = said.get("scaling")
        found = kernels.paged_attention(
            q,
            cache.keys,
            cache.values,
            batch,
            scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
            window=layer.window,
            softcap=said.get("softcap"),
            sinks=said.get("s_aux"),
            key_scale=cache.key_scale,
            value_scale=cache.value_scale,
        )
        return found.unsqueeze(0)

    def _examine(
        self,
        module: nn.Module,
        index: int,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        said: dict[str, Any],
    ) -> None:
        if index in self.layers:
            raise UnfitAttention(f"its layer {index} attends twice")
        if not getattr(module, "is_causal", True):
            raise UnfitAttention(f"its layer {index} also sees later tokens")
        given = {name for name, value in said.items() if value is not None}
        if strange := given - _KNOWN - _NEEDLESS:
            raise UnfitAttention(f"its attention wants {', '.join(sorted(strange))}")
        window = said.get("sliding_window") if mask is None else int(mask) or None
        self.layers[index] = Layer(key.shape[1], key.shape[3], value.shape[3], window)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **said: Any,
) -> tuple[Tensor, None]:
    """What transformers calls; the second of the pair would be the weights."""
    step: Step = module.forebay_step  # type: ignore[assignment] # torch types it as a module
    return step.attend(module, query, key, value, attention_mask, said), None


AttentionInterface.register(NAME, attend)


@contextmanager
def masks_seen() -> Iterator[None]:
    """Meanwhile a mask is its window's length, 0 for a causal one, instead of a tensor of bits."""
    masks: dict[str, Any] = AttentionMaskInterface._global_mapping
    masks[NAME] = _window
    try:
        yield
    finally:
        del masks[NAME]


def _window(*, mask_function: Callable[..., Any], **rest: Any) -> Tensor:
    """Look at what two far positions see.

    :raises UnfitAttention: it is neither all that came before nor the last so many positions.
    """
    found = set()
    for position in _FAR:
        other = torch.arange(position + 2)
        query = torch.tensor(position)
        none = torch.tensor(0)
        seen = torch.as_tensor(mask_function(none, none, query, other)).expand(len(other))
        length = int(seen.sum())
        if not bool(seen[position + 1 - length : position + 1].all()):
            raise UnfitAttention("its attention has a mask of another kind than causal or sliding")
        found.add(0 if length == position + 1 else length)
    if len(found) != 1:
        raise UnfitAttention("its attention has a mask of another kind than causal or sliding")
    return torch.tensor(found.pop())
