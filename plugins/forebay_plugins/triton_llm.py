"""What LLMs behind Triton want to be asked, and what they answer: two layouts of tensors.

TensorRT-LLM's `ensemble` and `tensorrt_llm_bls` have a tensor for each parameter; vLLM's backend
takes its sampling parameters as one JSON text. Triton itself takes any further key of
`generate_stream` as a parameter and ignores it, so here every field is checked against the model's
own tensors, as names differ between releases.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import msgspec
from msgspec import Raw, Struct

from forebay.api import BackendGarbage, BackendRefused, GenerateRequest, Timings
from forebay_plugins.kserve import Model

__all__ = ["Asked", "Ensemble", "Layout", "Piece", "VllmBackend"]


class Asked(Struct, frozen=True):
    """One choice of an answer."""

    prompt: str
    max_tokens: int
    stop: tuple[str, ...] = ()
    seed: int | None = None


class Piece(Struct, frozen=True):
    """One response of `generate_stream`."""

    text: str
    #: None: not said, or not over yet.
    finish_reason: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    logprobs: tuple[float, ...] = ()
    #: Only in the last response, if at all.
    timings: Timings | None = None


class Layout(ABC):
    """How one model is to be asked."""

    #: Its name in messages.
    title: ClassVar[str]
    #: It leaves stop strings in the text.
    keeps_stop: ClassVar[bool]
    #: The inputs by which it is known.
    known_by: ClassVar[frozenset[str]]

    def __init__(self, model: Model) -> None:
        self.model = model

    @property
    def logprobs(self) -> bool:
        return False

    @property
    def schema(self) -> bool:
        return False

    @property
    def says_finish(self) -> bool:
        """A stream without a finish reason has been broken off."""
        return False

    def body(self, request: GenerateRequest, asked: Asked) -> bytes:
        """The body of `generate_stream`.

        :raises BackendRefused: naming a field that this model does not know.
        """
        self._check(request)
        body = {"text_input": asked.prompt, **self.sampling(request, asked)}
        switches = {
            "stream": self.model.decoupled,
            "exclude_input_in_output": True,
            "return_finish_reason": True,
            "return_num_input_tokens": True,
            "return_num_output_tokens": True,
            "return_perf_metrics": True,
        }
        body |= {name: on for name, on in switches.items() if name in self.model.inputs}
        return msgspec.json.encode(body)

    @abstractmethod
    def sampling(self, request: GenerateRequest, asked: Asked) -> dict[str, object]: ...

    def read(self, response: Mapping[str, Any]) -> Piece:
        """
        :raises BackendGarbage: it has no text.
        """
        text = response.get("text_output")
        if not isinstance(text, str):
            raise BackendGarbage("the backend's response has no text in `text_output`")
        reason = response.get("finish_reason")
        return Piece(
            text=text,
            # vLLM's backend says so before the end.
            finish_reason=reason
            if isinstance(reason, str) and reason not in ("None", "")
            else None,
            input_tokens=_count(response.get("num_input_tokens")),
            output_tokens=_count(response.get("num_output_tokens")),
            logprobs=_numbers(response.get("output_log_probs")),
            timings=_timings(response),
        )

    def _check(self, request: GenerateRequest) -> None:
        """Refuse what holds for either layout."""
        sampling = request.sampling
        if sampling.logprobs is not None and not self.logprobs:
            raise self.refusal("logprobs")
        if sampling.logprobs:
            field = "top_logprobs" if request.endpoint == "chat" else "logprobs"
            raise self.refusal(field, "gives log probabilities of the chosen tokens alone")
        if request.needs_schema and not self.schema:
            raise self.refusal("response_format")
        if request.echo and sampling.logprobs is not None:
            raise self.refusal("echo", "gives no log probabilities of the prompt")

    def refusal(self, field: str, why: str = "does not know this field") -> BackendRefused:
        return BackendRefused(f"{self.title} behind Triton {why}", param=field)


class Ensemble(Layout):
    """TensorRT-LLM's."""

    title = "TensorRT-LLM's model"
    keeps_stop = True
    known_by = frozenset({"text_input", "max_tokens"})

    #: Older names of tensors.
    older: ClassVar[Mapping[str, str]] = {"seed": "random_seed", "min_tokens": "min_length"}
    #: Fields of a request by the value at which they change nothing.
    neutral: ClassVar[Mapping[str, float]] = {
        "min_p": 0,
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "repetition_penalty": 1,
        "min_tokens": 0,
    }
    #: Fields beyond OpenAI's that are tensors of the same name.
    passed: ClassVar[frozenset[str]] = frozenset(
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

    @property
    def logprobs(self) -> bool:
        return "return_log_probs" in self.model.inputs

    @property
    def schema(self) -> bool:
        return {"guided_decoding_guide", "guided_decoding_guide_type"} <= self.model.inputs.keys()

    def sampling(self, request: GenerateRequest, asked: Asked) -> dict[str, object]:
        said = request.sampling
        body: dict[str, object] = {"max_tokens": asked.max_tokens}
        for field, neutral in self.neutral.items():
            value = getattr(said, field)
            if value is not None and value != neutral:
                body[self._tensor(field)] = value
        for field, value in self._randomness(request).items():
            body[self._tensor(field)] = value
        if asked.seed is not None:
            if asked.seed < 0:
                raise self.refusal("seed", "takes no seed below 0")
            body[self._tensor("seed")] = asked.seed
        if asked.stop:
            body[self._tensor("stop_words", "stop")] = asked.stop
        if said.ignore_eos:
            body[self._tensor("end_id", "ignore_eos")] = -1
        if said.logprobs is not None:
            body["return_log_probs"] = True
        return body | self._guide(request) | self._extra(request)

    def _randomness(self, request: GenerateRequest) -> dict[str, object]:
        """With neither top_k nor top_p TensorRT-LLM takes the likeliest token at any temperature,
        and a temperature of 0 it does not take."""
        said = request.sampling
        if said.temperature == 0:
            return {"top_k": 1}
        body: dict[str, object] = {}
        if said.temperature is not None:
            body["temperature"] = said.temperature
        if said.top_k is not None and said.top_k > 0:
            body["top_k"] = said.top_k
        elif said.temperature is not None or said.top_k is not None:
            body["top_p"] = 1.0
        if said.top_p is not None:
            body["top_p"] = said.top_p
        return body

    def _guide(self, request: GenerateRequest) -> dict[str, object]:
        """`response_format` as a guide for the answer."""
        if not request.needs_schema:
            return {}
        wanted = msgspec.json.decode(request.fields["response_format"])
        if wanted["type"] == "json_object":
            return {"guided_decoding_guide_type": "json"}
        schema = (wanted.get("json_schema") or {}).get("schema")
        if wanted["type"] != "json_schema" or not isinstance(schema, dict):
            raise self.refusal(
                "response_format", "takes `json_object`, or `json_schema` with its `schema`"
            )
        return {
            "guided_decoding_guide_type": "json_schema",
            "guided_decoding_guide": msgspec.json.encode(schema).decode(),
        }

    def _extra(self, request: GenerateRequest) -> dict[str, object]:
        body: dict[str, object] = {}
        for field in request.extra:
            if field == "beam_width" and bytes(request.fields[field]) == b"1":
                continue
            if field not in self.passed:
                raise self.refusal(field)
            body[self._tensor(field)] = Raw(request.fields[field])
        return body

    def _tensor(self, name: str, field: str = "") -> str:
        """The name of that tensor in this release."""
        for known in (name, self.older.get(name, name)):
            if known in self.model.inputs:
                return known
        raise self.refusal(field or name, f"has no tensor `{name}`")


class VllmBackend(Layout):
    """vLLM's: `SamplingParams` as JSON. It cuts stop strings off by itself."""

    title = "vLLM's model"
    keeps_stop = False
    known_by = frozenset({"text_input", "sampling_parameters"})

    #: Fields of a request that `SamplingParams` has by the same name.
    same: ClassVar[tuple[str, ...]] = (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
    )
    passed: ClassVar[frozenset[str]] = frozenset(
        {
            "bad_words",
            "include_stop_str_in_output",
            "logit_bias",
            "lora_name",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "stop_token_ids",
        }
    )

    @property
    def says_finish(self) -> bool:
        return "return_finish_reason" in self.model.inputs

    def sampling(self, request: GenerateRequest, asked: Asked) -> dict[str, object]:
        said = request.sampling
        parameters: dict[str, object] = {"max_tokens": asked.max_tokens}
        parameters |= {
            field: getattr(said, field) for field in self.same if getattr(said, field) is not None
        }
        if asked.seed is not None:
            parameters["seed"] = asked.seed
        if asked.stop:
            parameters["stop"] = asked.stop
        if said.min_tokens:
            parameters["min_tokens"] = said.min_tokens
        if said.ignore_eos:
            parameters["ignore_eos"] = True
        for field in request.extra:
            if field not in self.passed:
                raise self.refusal(field)
            parameters[field] = Raw(request.fields[field])
        return {"sampling_parameters": msgspec.json.encode(parameters).decode()}


def _count(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _timings(response: Mapping[str, Any]) -> Timings | None:
    """TensorRT-LLM's four moments, in nanoseconds by a clock of its own; 0: not there yet."""
    names = ("arrival", "first_scheduled", "first_token", "last_token")
    times = [_count(response.get(f"{name}_time_ns")) or 0 for name in names]
    if not times[0] or times != sorted(times):
        return None
    queue, prefill, decode = ((b - a) / 1e9 for a, b in pairwise(times))
    return Timings(queue, prefill, decode, "trtllm.perf_metrics")


def _numbers(value: object) -> tuple[float, ...]:
    """A tensor of one number comes bare."""
    found = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(float(one) for one in found if isinstance(one, int | float))
