"""Any other decoder, computed by transformers' own module over the paged cache.

The module's attention goes through ``hf_attention``, its matrices through ``Linear``. Before it is
served it is examined: it must attend once in every layer and see other tokens in no other way,
because all that is kept of a sequence are the keys and values in its pages.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence as Items
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import forebay_kernels as kernels
from forebay_engine.head import Shortlist
from forebay_engine.hf_config import ModelError, TransformersShape, read_ends
from forebay_engine.layers import LayerCache
from forebay_engine.linear import Linear
from forebay_engine.models.hf_attention import NAME, Step, masks_seen
from forebay_engine.weights import Weights

hf: Any = import_module("transformers")  # its calls are untyped

#: What to do about a model that is refused.
_REMEDY = "serve it with a backend that knows it, or choose another model"

#: Kinds of layers whose keys and values are all that is kept of a sequence.
_ATTENTION = {"full_attention", "sliding_attention"}
#: Rope types whose angles depend on a sequence's length.
_BY_LENGTH = {"dynamic", "longrope"}


def read_shape(folder: Path, architecture: str) -> TransformersShape:
    """What transformers says of the model in ``folder``.

    :raises ModelError: it does not know the model, or the model is no decoder with attention alone.
    """
    hf.utils.logging.disable_progress_bar()
    hf.utils.logging.set_verbosity_error()
    try:
        config = hf.AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        _refuse_unsupported(architecture, config)
        return _shape(folder, architecture, config)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise _refusal(architecture, _first_line(error)) from error


def _shape(folder: Path, architecture: str, config: Any) -> TransformersShape:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    longest = _longest(config)
    window = getattr(config, "sliding_window", None)
    # Without this list layers may still slide, but keep all of their pages.
    kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    return TransformersShape(
        architecture=architecture,
        headless=False,
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        num_kv_heads=1 if getattr(config, "multi_query", False) else kv_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        max_position_embeddings=longest,
        served_length=longest,
        sliding=tuple(kind == "sliding_attention" for kind in kinds),
        sliding_window=window,
        dtype=str(config.dtype or torch.float32).removeprefix("torch."),
        eos_token_ids=read_ends(folder, config.eos_token_id),
        config=config,
    )


def _longest(config: Any) -> int:
    """The context, stretched as far as these rope types reach (see ``hf_config``)."""
    longest: int = config.max_position_embeddings
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("yarn", "dynamic"):
        return longest
    original = rope.get("original_max_position_embeddings") or longest
    return max(longest, int(original * (rope.get("factor") or 1.0)))


def _refuse_unsupported(architecture: str, config: Any) -> None:
    """ValueError that says why; what can only be seen when the model runs is seen later."""
    if config.is_encoder_decoder:
        raise ValueError("it is an encoder with a decoder")
    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ValueError("to transformers it is no causal language model")
    if getattr(hf, architecture)._is_stateful:
        raise ValueError("it keeps a state that is not attention's keys and values")
    if strange := set(getattr(config, "layer_types", None) or ()) - _ATTENTION:
        raise ValueError(f"it has layers of the kind {', '.join(sorted(strange))}")
    if getattr(config, "quantization_config", None):
        raise ValueError("quantised checkpoints are read for the architectures named in the README")


def _refusal(architecture: str, why: str) -> ModelError:
    return ModelError(
        f"config.json: architecture {architecture!r} can't be served through transformers "
        f"{hf.__version__}: {why}; {_REMEDY}"
    )


def _first_line(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it comes with code of its own, which is never run"
    return str(error).strip().partition("\n")[0] or type(error).__name__


class _Projection(nn.Module):
    """A linear layer's place in a module, taken by ours."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self._linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``."""
        return self._linear(x.flatten(0, -2)).view(*x.shape[:-1], -1)


@dataclass
class _Hidden(MoeModelOutputWithPast):
    """What a decoder gives, with whatever any of them gives besides."""

    cross_attentions: None = None


class _Given(nn.Module):
    """Stands where the decoder was, so that what transformers does after it can be run alone."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.empty(0)

    def forward(self, *args: Any, **rest: Any) -> Any:
        return _Hidden(last_hidden_state=self.hidden)


class TransformersModel:
    """A decoder of transformers, behind the same interface as ours."""

    #: Nobody knows what its modules do on the way.
    replayable: bool = False

    def __init__(self, shape: TransformersShape, weights: Weights) -> None:
        model = _load(shape, weights)
        self._step = Step()
        self._given = _Given()
        self._decoder = model.get_decoder()
        self._model = model
        self._device = weights.device
        try:
            self._prepare(shape, weights)
            self._examine(shape)
        except _FAILURES as error:
            raise _refusal(shape.architecture, _first_line(error)) from error

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        caches: list[LayerCache],
        batch: kernels.PagedBatch,
    ) -> Tensor:
        self._step.caches, self._step.batch = caches, batch
        return self._hidden(token_ids, positions)

    def logits(self, hidden: Tensor) -> Tensor:
        self._given.hidden = hidden.unsqueeze(0)
        logits: Tensor = self._model(use_cache=False).logits[0]
        return logits

    def shortlist(
        self, hidden: Tensor, temperatures: Items[float], keys: Items[int]
    ) -> Shortlist | None:
        return None  # what its own head does with the logits is not known

    def _hidden(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        found = self._decoder(
            input_ids=token_ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False
        )
        hidden: Tensor = found.last_hidden_state[0]
        return hidden

    def _prepare(self, shape: TransformersShape, weights: Weights) -> None:
        """Put our attention, our linear layers, and what stands for the decoder in their places."""
        names = {id(module): name for name, module in self._model.named_modules()}
        for module in list(self._model.modules()):
            if hasattr(module, "layer_idx"):
                module.forebay_step = self._step
            _fix_angles(module, shape.served_length)
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    bias = None if child.bias is None else child.bias.data
                    is_head = child is self._model.get_output_embeddings()
                    matrix = weights.settled(child.weight.data, is_head=is_head)
                    setattr(module, name, _Projection(Linear(matrix, bias)))
        parent, _, name = names[id(self._decoder)].rpartition(".")
        setattr(self._model.get_submodule(parent), name, self._given)

    def _examine(self, shape: TransformersShape) -> None:
        """Run two tokens with an attention that gives nothing, and see what it is asked.

        The first token is not a number to begin with. That must not reach the second: then there
        is a convolution, a recurrence or the like, whose state the pages don't hold.
        """
        if "position_ids" not in inspect.signature(self._decoder.forward).parameters:
            raise ValueError("it takes no positions")

        def spoil(module: nn.Module, given: Any, out: Tensor) -> Tensor:
            out[:, 0] = torch.nan
            return out

        hook = self._decoder.get_input_embeddings().register_forward_hook(spoil)
        with masks_seen():
            tokens = torch.tensor([0, 1], device=self._device)
            hidden = self._hidden(tokens, tokens)
        hook.remove()
        if not bool(hidden[1].isfinite().all()):
            raise ValueError("its tokens see each other otherwise than through attention")
        layers = self._step.layers
        if sorted(layers) != list(range(shape.num_layers)):
            raise ValueError(f"of its {shape.num_layers} layers {len(layers)} use the interface")
        for index, layer in layers.items():
            if shape.sliding[index]:
                layer.pages = shape.sliding_window
                if layer.window != shape.sliding_window:
                    raise ValueError(f"its layer {index} does not slide as its configuration says")
            asked = (layer.kv_heads, layer.key_dim, layer.value_dim)
            given = (shape.num_kv_heads, shape.head_dim, shape.head_dim)
            if asked != given:
                raise ValueError(
                    f"its layer {index} has heads, keys and values {asked}, where its "
                    f"configuration says {given}"
                )
        if self.logits(hidden[1:]).shape != (1, shape.vocab_size):
            raise ValueError("its logits are not one for each token of the vocabulary")


#: What a module that is used in a way its author did not think of may raise.
_FAILURES = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def _load(shape: TransformersShape, weights: Weights) -> Any:
    """transformers' module with the checkpoint's weights.

    :raises ModelError: a tensor is missing, left over or of another shape.
    """
    try:
        model, report = getattr(hf, shape.architecture).from_pretrained(
            weights.folder,
            config=shape.config,
            dtype=weights.dtype,
            attn_implementation=NAME,
            experts_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # told of with their names, below
            output_loading_info=True,
        )
    except KeyError as error:
        why = "its attention can't be replaced"
        raise _refusal(shape.architecture, why) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{weights.folder}: {error}") from error
    wrong = {"missing_keys": "are missing", "unexpected_keys": "have no place"}
    wrong["mismatched_keys"] = "are not of the shape that config.json asks for"
    for key, what in wrong.items():
        if names := sorted(str(name) for name in report[key]):
            some = ", ".join(names[:5])
            raise ModelError(f"{weights.folder}: {len(names)} tensors {what}: {some}")
    return model.to(weights.device).eval()


def _fix_angles(module: Any, served_length: int) -> None:
    """Rotate by what the longest sequence needs, whichever tokens a step has (see ``rotary``)."""
    kind = getattr(module, "rope_type", None)
    kinds: set[Any] = set(kind.values()) if isinstance(kind, dict) else {kind}
    if not kinds & _BY_LENGTH:
        return
    if not isinstance(kind, str):
        raise ValueError(f"its layers rotate by several rope types, {', '.join(sorted(kinds))}")
    frequency, factor = ROPE_INIT_FUNCTIONS[kind](
        module.config, module.inv_freq.device, seq_len=served_length
    )
    module.inv_freq, module.attention_scaling, module.rope_type = frequency, factor, "default"
