"""Which class serves which architecture; a model's module is imported when it is asked for.

A model is built with ``Model(config, weights)``, and ``Model.forward`` and ``Model.logits`` are all
that the runner calls.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

from torch import Tensor

import forebay_kernels as kernels
from forebay_engine.hf_config import ModelConfig, ModelError
from forebay_engine.layers import LayerCache
from forebay_engine.weights import Weights

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


def build_model(config: ModelConfig, weights: Weights) -> Model:
    """The model of this configuration with its weights, all of them used."""
    if config.architecture not in ARCHITECTURES:
        raise ModelError(
            f"config.json: architecture {config.architecture!r} is not supported; "
            f"these are: {', '.join(sorted(ARCHITECTURES))}"
        )
    module, name = ARCHITECTURES[config.architecture].split(":")
    model: Model = getattr(import_module(module), name)(config, weights)
    weights.finish()
    return model
