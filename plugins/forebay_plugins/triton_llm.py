"""What LLMs behind Triton want to be asked, and what they answer, whatever their tensors.

Triton itself takes any further key of `generate_stream` as a parameter and ignores it, so here
every field is checked against the model's own tensors, as names differ between releases.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import msgspec
from msgspec import Struct

from forebay.api import BackendGarbage, BackendRefused, GenerateRequest, Timings, TokenLogprob
from forebay_plugins.kserve import Model

__all__ = ["Asked", "Layout", "Piece"]


class Asked(Struct, frozen=True):
    """One choice of an answer."""

    prompt: str
    max_tokens: int
    stop: tuple[str, ...] = ()
    seed: int | None = None


class Piece(Struct, frozen=True):
    """One response of a model."""

    text: str
    #: None: not said, or not over yet.
    finish_reason: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    #: Of tokens whose texts are not told, and of such as are.
    logprobs: tuple[float, ...] = ()
    tokens: tuple[TokenLogprob, ...] = ()
    #: Only in the last response, if at all.
    timings: Timings | None = None


class Layout(ABC):
    """How one model is to be asked."""

    #: Its name in messages.
    title: ClassVar[str]
    #: It leaves stop strings in the text.
    keeps_stop: ClassVar[bool]
    #: Each response has the whole text so far.
    accumulates: ClassVar[bool] = False
    #: Each response counts its own tokens alone.
    counts_anew: ClassVar[bool] = False
    #: The inputs by which it is known.
    known_by: ClassVar[frozenset[str]]
    #: Inputs that are set wherever the model has them.
    switches: ClassVar[Mapping[str, bool]] = {
        "exclude_input_in_output": True,
        "return_finish_reason": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
        "return_perf_metrics": True,
    }
    #: The switch by which a decoupled model streams.
    streams_by: ClassVar[str] = "stream"
    #: It can tell the likeliest tokens beside the chosen one.
    top_logprobs: ClassVar[bool] = False

    def __init__(self, model: Model, server: str = "", neutral: bool = True) -> None:
        """``server``: Triton's version. ``neutral``: randomness that nobody speaks of is sent too,
        with values by which every token keeps its probability."""
        self.model = model
        self.server = server
        self.neutral = neutral

    @property
    def logprobs(self) -> bool:
        return False

    @property
    def schema(self) -> bool:
        return False

    @property
    def says_finish(self) -> bool:
        """A stream without a finish reason has been broken off."""
        return "return_finish_reason" in self.model.inputs

    def inputs(self, request: GenerateRequest, asked: Asked) -> dict[str, object]:
        """The model's input tensors by name, one-dimensional or bare values.

        :raises BackendRefused: naming a field that this model does not know.
        """
        self._check(request)
        found = {"text_input": asked.prompt, **self.sampling(request, asked)}
        switches = {self.streams_by: self.model.decoupled, **self.switches}
        return found | {name: on for name, on in switches.items() if name in self.model.inputs}

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
            # Python's word for none, until it is over.
            finish_reason=reason
            if isinstance(reason, str) and reason not in ("None", "")
            else None,
            input_tokens=_count(response.get("num_input_tokens")),
            output_tokens=_count(response.get("num_output_tokens")),
            logprobs=_numbers(response.get("output_log_probs")),
            timings=_timings(response),
        )

    def _check(self, request: GenerateRequest) -> None:
        """Refuse what holds for every layout."""
        sampling = request.sampling
        if sampling.logprobs is not None and not self.logprobs:
            raise self.refusal("logprobs")
        if sampling.logprobs and not self.top_logprobs:
            field = "top_logprobs" if request.endpoint == "chat" else "logprobs"
            raise self.refusal(field, "gives log probabilities of the chosen tokens alone")
        if request.needs_schema and not self.schema:
            raise self.refusal("response_format")
        if request.echo and sampling.logprobs is not None:
            raise self.refusal("echo", "gives no log probabilities of the prompt")

    def wanted(self, request: GenerateRequest) -> Mapping[str, Any] | None:
        """The JSON schema of the answer; empty: any JSON object; None: any text.

        :raises BackendRefused: `response_format` is of another kind.
        """
        if not request.needs_schema:
            return None
        form = msgspec.json.decode(request.fields["response_format"])
        if form["type"] == "json_object":
            return {}
        schema = (form.get("json_schema") or {}).get("schema")
        if form["type"] != "json_schema" or not isinstance(schema, dict):
            raise self.refusal(
                "response_format", "takes `json_object`, or `json_schema` with its `schema`"
            )
        return schema

    def refusal(self, field: str, why: str = "does not know this field") -> BackendRefused:
        return BackendRefused(f"{self.title} behind Triton {why}", param=field)


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
