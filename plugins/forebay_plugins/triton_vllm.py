"""vLLM's backend behind Triton, which takes `SamplingParams` as one JSON text.

What it does not know of them ends the request with an error, so nothing is silently ignored.
Source: triton-inference-server/vllm_backend, `src/utils`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import msgspec
from msgspec import Raw, Struct

from forebay.api import BackendGarbage, GenerateRequest, TokenLogprob
from forebay_plugins.kserve import release_of
from forebay_plugins.triton_llm import Asked, Layout, Piece

__all__ = ["VllmBackend"]

#: Which parameter guides the answer, by the server's first version that has it (25.01, 25.11).
_GUIDES = (((2, 63), "structured_outputs"), ((2, 54), "guided_decoding"))


class VllmBackend(Layout):
    title = "vLLM's model"
    keeps_stop = False
    counts_anew = True
    known_by = frozenset({"text_input", "sampling_parameters"})
    top_logprobs = True

    #: Fields of a request that `SamplingParams` has by the same name, and what changes nothing.
    same: ClassVar[Mapping[str, float | None]] = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": None,
        "min_p": None,
        "frequency_penalty": None,
        "presence_penalty": None,
        "repetition_penalty": None,
        "logprobs": None,
    }
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
    def logprobs(self) -> bool:
        return "return_logprobs" in self.model.inputs

    @property
    def schema(self) -> bool:
        return self._guide is not None

    @property
    def _guide(self) -> str | None:
        release = release_of(self.server)
        return next((name for since, name in _GUIDES if release >= since), None)

    def sampling(self, request: GenerateRequest, asked: Asked) -> dict[str, object]:
        said = request.sampling
        parameters: dict[str, object] = {"max_tokens": asked.max_tokens}
        for field, neutral in self.same.items():
            value = getattr(said, field)
            if value is None and self.neutral:
                value = neutral
            if value is not None:
                parameters[field] = value
        if asked.seed is not None:
            parameters["seed"] = asked.seed
        if asked.stop:
            parameters["stop"] = asked.stop
        if said.min_tokens:
            parameters["min_tokens"] = said.min_tokens
        if said.ignore_eos:
            parameters["ignore_eos"] = True
        schema = self.wanted(request)
        if schema is not None and self._guide:
            guide = {"json": schema} if schema else {"json_object": True}
            parameters[self._guide] = msgspec.json.encode(guide).decode()  # a text, it wants
        for field in request.extra:
            if field not in self.passed:
                raise self.refusal(field)
            parameters[field] = Raw(request.fields[field])
        found: dict[str, object] = {"sampling_parameters": msgspec.json.encode(parameters).decode()}
        return found | ({"return_logprobs": True} if said.logprobs is not None else {})

    def read(self, response: Mapping[str, Any]) -> Piece:
        piece = super().read(response)
        told = response.get("logprobs")
        if not isinstance(told, str):
            return piece
        try:
            places = msgspec.json.decode(told, type=list[dict[str, Told]] | None)
        except msgspec.DecodeError as wrong:
            raise BackendGarbage(f"the backend's `logprobs` cannot be read: {wrong}") from None
        return msgspec.structs.replace(piece, tokens=tuple(_tokens(places or [])))


class Told(Struct):
    """What `logprobs` has of a token, by its id; at each place the chosen one comes first."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


def _tokens(places: list[dict[str, Told]]) -> Iterator[TokenLogprob]:
    for place in places:
        told = list(place.values())
        if not told:
            continue
        chosen = told[0]
        ranked = sorted((one for one in told if one.rank), key=lambda one: one.rank or 0)
        top = tuple((one.decoded_token or "", one.logprob) for one in ranked)
        yield TokenLogprob(chosen.decoded_token or "", chosen.logprob, top)
