"""Which class serves which architecture; a model's module is imported when it is asked for.

A model is built with ``Model(config, weights)``, and ``Model.forward`` and ``Model.logits`` are all
that the runner calls. Decoders that have no class here are run by transformers' own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Items
from importlib import import_module
from pathlib import Path
from typing import Protocol

from torch import Tensor

import forebay_kernels as kernels
from forebay_engine.head import Shortlist
from forebay_engine.hf_config import (
    HEADLESS,
    ModelConfig,
    ModelError,
    TransformersShape,
    read_architecture,
    read_config,
)
from forebay_engine.layers import LayerCache
from forebay_engine.weights import Weights

log = logging.getLogger(__name__)

#: Whose class computes a model.
IMPLEMENTATIONS = ("auto", "native", "transformers")

#: Name in config.json's ``architectures`` -> "module:class".
ARCHITECTURES = {
    "GPT2LMHeadModel": "forebay_engine.models.gpt2:Gpt2",
    "Gemma2ForCausalLM": "forebay_engine.models.gemma:Gemma2",
    "Gemma3ForCausalLM": "forebay_engine.models.gemma:Gemma3",
    "LlamaForCausalLM": "forebay_engine.models.llama:Llama",
    "MistralForCausalLM": "forebay_engine.models.llama:Llama",
    "MixtralForCausalLM": "forebay_engine.models.moe:Mixtral",
    "OPTForCausalLM": "forebay_engine.models.opt:Opt",
    "Phi3ForCausalLM": "forebay_engine.models.llama:Phi3",
    "Qwen2ForCausalLM": "forebay_engine.models.llama:Qwen2",
    "Qwen3ForCausalLM": "forebay_engine.models.llama:Qwen3",
    "Qwen3MoeForCausalLM": "forebay_engine.models.moe:Qwen3Moe",
}


class Model(Protocol):
    """A decoder over a paged cache."""

    #: What a step runs depends on shapes alone, so that a recording of it can be replayed.
    replayable: bool

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        caches: list[LayerCache],
        batch: kernels.PagedBatch,
    ) -> Tensor:
        """Last hidden states of the step's tokens: ``[tokens] -> [tokens, hidden]``."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """``[rows, hidden] -> [rows, vocab]``."""
        ...

    def shortlist(
        self, hidden: Tensor, temperatures: Items[float], keys: Items[int]
    ) -> Shortlist | None:
        """Logits among which what each row draws must be; None: all are needed.

        It draws the largest of logit / temperature + noise under its key; of 0, without noise.
        """
        ...


def read_shape(folder: Path, model_impl: str) -> ModelConfig | TransformersShape:
    """What the runner must know of the model in ``folder``.

    ``model_impl``: ``native`` for a class of ours, ``transformers`` for theirs, ``auto`` for ours
    where there is one.

    :raises ModelError: config.json is missing, not understood, or of a model that can't be served.
    """
    if model_impl not in IMPLEMENTATIONS:
        raise ModelError(f"model_impl {model_impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    architecture = read_architecture(folder)
    ours = HEADLESS.get(architecture, architecture) in ARCHITECTURES
    if model_impl == "native" and not ours:
        raise ModelError(
            f"config.json: architecture {architecture!r} has no class of its own; these have: "
            f"{', '.join(sorted(ARCHITECTURES))}; others need model_impl auto or transformers"
        )
    if ours and model_impl != "transformers":
        return read_config(folder)
    # Imported here: transformers takes seconds.
    from forebay_engine.models import hf

    log.info("%s is run through transformers, which is slower than a class of ours", architecture)
    return hf.read_shape(folder, architecture)


def build_model(shape: ModelConfig | TransformersShape, weights: Weights) -> Model:
    """The model of this shape with its weights, all of them used."""
    if isinstance(shape, TransformersShape):
        from forebay_engine.models.hf import TransformersModel

        return TransformersModel(shape, weights)
    module, name = ARCHITECTURES[shape.architecture].split(":")
    model: Model = getattr(import_module(module), name)(shape, weights)
    weights.finish()
    return model
