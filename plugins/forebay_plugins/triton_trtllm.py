"""TensorRT-LLM's models behind Triton, with a tensor for each parameter.

Source: `triton_backend/all_models` in NVIDIA/TensorRT-LLM: `inflight_batcher_llm` (models
`ensemble` and `tensorrt_llm_bls`) and `llmapi` (model `tensorrt_llm`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import msgspec
from msgspec import Raw

from forebay.api import GenerateRequest
from forebay_plugins.triton_llm import Asked, Layout

__all__ = ["Ensemble", "LlmApi"]

#: Fields of a request by the value at which they change nothing, there too.
_NEUTRAL: Mapping[str, float] = {
    "min_p": 0,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "min_tokens": 0,
}


class TensorRtLlm(Layout):
    #: Fields beyond OpenAI's that are tensors of the same name.
    passed: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def names(self, field: str) -> tuple[str, ...]:
        """What the tensor for a field may be called."""

    def sampling(self, request: GenerateRequest, asked: Asked) -> dict[str, object]:
        said = request.sampling
        found: dict[str, object] = {self._tensor("max_tokens"): asked.max_tokens}
        for field, neutral in _NEUTRAL.items():
            value = getattr(said, field)
            if value is not None and value != neutral:
                found[self._tensor(field)] = value
        found |= self._randomness(request)
        if asked.seed is not None:
            if asked.seed < 0:
                raise self.refusal("seed", "takes no seed below 0")
            found[self._tensor("seed")] = asked.seed
        if asked.stop:
            found[self._tensor("stop")] = asked.stop
        if said.ignore_eos:
            found[self._tensor("ignore_eos")] = -1
        if said.logprobs is not None:
            found["return_log_probs"] = True
        return found | self._guide(request) | self._extra(request)

    def _randomness(self, request: GenerateRequest) -> dict[str, object]:
        """With neither top_k nor top_p TensorRT-LLM takes the likeliest token at any temperature,
        and a temperature of 0 it does not take."""
        said = request.sampling
        if said.temperature == 0:
            return {self._tensor("top_k"): 1}
        asked = {"temperature": said.temperature, "top_p": said.top_p}
        if not self.neutral and (*asked.values(), said.top_k) == (None, None, None):
            return {}
        found: dict[str, object] = {
            self._tensor(field): 1.0 if value is None else value
            for field, value in asked.items()
            if value is not None or self._has(field)
        }
        if said.top_k is not None and said.top_k > 0:
            found[self._tensor("top_k")] = said.top_k
        return found

    def _guide(self, request: GenerateRequest) -> dict[str, object]:
        """`response_format` as a guide for the answer."""
        schema = self.wanted(request)
        if schema is None:
            return {}
        if not schema:
            return {"guided_decoding_guide_type": "json"}
        return {
            "guided_decoding_guide_type": "json_schema",
            "guided_decoding_guide": msgspec.json.encode(schema).decode(),
        }

    def _extra(self, request: GenerateRequest) -> dict[str, object]:
        found: dict[str, object] = {}
        for field in request.extra:
            if field == "beam_width" and bytes(request.fields[field]) == b"1":
                continue
            if field not in self.passed:
                raise self.refusal(field)
            found[self._tensor(field)] = Raw(request.fields[field])
        return found

    def _has(self, field: str) -> bool:
        return any(name in self.model.inputs for name in self.names(field))

    def _tensor(self, field: str) -> str:
        """The name of the field's tensor in this release."""
        for name in self.names(field):
            if name in self.model.inputs:
                return name
        raise self.refusal(field, f"has no tensor `{self.names(field)[0]}`")


class Ensemble(TensorRtLlm):
    """`ensemble` and `tensorrt_llm_bls`."""

    title = "TensorRT-LLM's model"
    keeps_stop = True
    known_by = frozenset({"text_input", "max_tokens"})
    passed = frozenset(
        {
            "bad_words",
            "embedding_bias_weights",
            "embedding_bias_words",
            "end_id",
            "guided_decoding_guide",
            "guided_decoding_guide_type",
            "length_penalty",
            "lora_task_id",
            "pad_id",
        }
    )
    #: Newer and older names of tensors that are not called as the field is.
    renamed: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "seed": ("seed", "random_seed"),
        "min_tokens": ("min_tokens", "min_length"),
        "stop": ("stop_words",),
        "ignore_eos": ("end_id",),
    }

    @property
    def logprobs(self) -> bool:
        return "return_log_probs" in self.model.inputs

    @property
    def schema(self) -> bool:
        return {"guided_decoding_guide", "guided_decoding_guide_type"} <= self.model.inputs.keys()

    def names(self, field: str) -> tuple[str, ...]:
        return self.renamed.get(field, (field,))


class LlmApi(TensorRtLlm):
    """`tensorrt_llm` over TensorRT-LLM's LLM API, which cuts stop strings off by itself."""

    title = "TensorRT-LLM's LLM API"
    keeps_stop = False
    accumulates = True
    known_by = frozenset({"text_input", "sampling_param_max_tokens"})
    switches: ClassVar[Mapping[str, bool]] = {
        "sampling_param_exclude_input_from_output": True,
        "return_finish_reason": True,
    }
    streams_by = "streaming"

    def names(self, field: str) -> tuple[str, ...]:
        return (f"sampling_param_{field}",)
