"""Constraints on vLLM's output, whose fields were renamed, in the words that a server understands.

``response_format`` is OpenAI's and works everywhere. Beside it there were ``guided_json``,
``guided_regex`` … up to 0.10; since 0.11 there is ``structured_outputs: {json, regex, …}``. A
server that does not know a field ignores it: it answers 200 and unconstrained text. So neither is
sent to a server that was not seen to refuse a contradiction in it.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec
from msgspec import Raw

from forebay.api import BackendLacks, GenerateRequest
from forebay_plugins.openai_wire import OpenAIServer

__all__ = ["Generation", "asked", "constraints", "generation_of"]

Generation = Literal["guided", "structured", "unknown"]

#: Fields of old servers, and what they are called in ``structured_outputs``.
_NAMES = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
    "guided_whitespace_pattern": "whitespace_pattern",
}
#: The first version with ``structured_outputs``.
_SINCE = (0, 11)
#: Only one kind of constraint is allowed: a server that knows the field answers 400 to two.
_CONTRADICTIONS: dict[Generation, dict[str, object]] = {
    "structured": {"structured_outputs": {"choice": ["a"], "regex": "b"}},
    "guided": {"guided_choice": ["a"], "guided_regex": "b"},
}


async def generation_of(server: OpenAIServer, model: str, version: str) -> Generation:
    """Which of the fields the server obeys: by its version, then verified by asking it.

    :raises BackendError: it does not answer now.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    candidates: list[Generation] = ["structured", "guided"]
    if found and (int(found[1]), int(found[2])) < _SINCE:
        candidates.reverse()
    question = {"model": model, "prompt": "a", "max_tokens": 1}
    for generation in candidates:
        contradiction = {**question, **_CONTRADICTIONS[generation]}
        if await server.status("POST", "/v1/completions", contradiction) in (400, 422):
            return generation
    return "unknown"


def asked(request: GenerateRequest) -> list[str]:
    """The fields by which the request constrains its answer, other than OpenAI's."""
    return [
        name
        for name, value in request.fields.items()
        if (name == "structured_outputs" or name.startswith("guided_")) and bytes(value) != b"null"
    ]


def constraints(
    request: GenerateRequest, names: list[str], generation: Generation
) -> dict[str, object]:
    """Changes to the body, so that the constraints are obeyed.

    :raises BackendLacks: the server knows no such constraint.
    """
    if generation == "unknown":
        raise _refused(names[0], "the server was seen to ignore it")
    if generation == "guided":
        return _old(request, names)
    if names == ["structured_outputs"]:
        return {}
    return _new(request, names)


def _new(request: GenerateRequest, names: list[str]) -> dict[str, object]:
    if "structured_outputs" in names:
        raise _refused(names[-1], "it can't be combined with `structured_outputs`")
    outputs: dict[str, object] = {}
    for name in names:
        if name not in _NAMES:
            raise _refused(name, "it has no counterpart in `structured_outputs`")
        outputs[_NAMES[name]] = request.fields[name]
    return {**dict.fromkeys(names), "structured_outputs": outputs}


def _old(request: GenerateRequest, names: list[str]) -> dict[str, object]:
    if "structured_outputs" not in names:
        return {}
    try:
        outputs = msgspec.json.decode(request.fields["structured_outputs"], type=dict[str, Raw])
    except msgspec.ValidationError:
        raise _refused("structured_outputs", "it must be an object") from None
    changes: dict[str, object] = {"structured_outputs": None}
    old_names = {new: old for old, new in _NAMES.items()}
    for name, value in outputs.items():
        if bytes(value) in (b"null", b"false"):
            continue
        if name not in old_names:
            raise _refused(f"structured_outputs.{name}", "this server's version has no such thing")
        changes[old_names[name]] = value
    return changes


def _refused(field: str, why: str) -> BackendLacks:
    return BackendLacks(f"the vLLM backend cannot take this field: {why}", param=field)
