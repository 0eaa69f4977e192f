"""What a request says of its answer's form, in any of the usual dialects, for the native engine.

OpenAI's ``response_format``; vLLM's ``structured_outputs`` and, up to its 0.10, ``guided_json`` and
the like; TGI's ``grammar`` of ``type`` and ``value``; llama.cpp's ``grammar`` in GBNF.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
from msgspec import Raw, Struct

from forebay.api import BackendLacks, GenerateRequest
from forebay_engine.client import GuideSpec

__all__ = ["GUIDE_FIELDS", "guide_of"]

_ANY_OBJECT = GuideSpec("json", '{"type":"object"}')


class _Schema(Struct):
    schema: Raw


class _Format(Struct):
    type: str
    json_schema: _Schema | None = None


class _Outputs(Struct, forbid_unknown_fields=True):
    """``structured_outputs``; its further options are refused, as they would not be obeyed."""

    json: Raw = Raw()
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class _Grammar(Struct, forbid_unknown_fields=True):
    type: str
    value: Raw = Raw()


def guide_of(request: GenerateRequest) -> tuple[str, GuideSpec] | None:
    """What the answer must keep to, and the field that says so; None: it is free.

    :raises BackendLacks: the field says nothing that we know, or there are two of them.
    """
    found: list[tuple[str, GuideSpec]] = []
    for field, read in _READERS.items():
        value = request.fields.get(field)
        if value is None or bytes(value) == b"null":
            continue
        try:
            guide = read(value)
        except ValueError as error:
            raise _refused(field, str(error)) from error
        if guide is not None:
            found.append((field, guide))
    if len(found) > 1:
        raise _refused(found[1][0], f"{found[0][0]!r} constrains the answer already; give one")
    return found[0] if found else None


def _response_format(value: Raw) -> GuideSpec | None:
    format_ = msgspec.json.decode(value, type=_Format)
    match format_.type:
        case "text":
            return None
        case "json_object":
            return _ANY_OBJECT
        case "json_schema":
            if format_.json_schema is None:
                raise ValueError("the field `json_schema` is missing")
            return _json(format_.json_schema.schema)
    raise ValueError(
        f"the type {format_.type!r} is not one of text, json_object and json_schema; for regular "
        "expressions, choices and grammars there is `structured_outputs`"
    )


def _structured_outputs(value: Raw) -> GuideSpec:
    outputs = msgspec.json.decode(value, type=_Outputs)
    guides = [
        *([_json(outputs.json)] if bytes(outputs.json) not in (b"", b"null") else []),
        *([GuideSpec("regex", outputs.regex)] if outputs.regex is not None else []),
        *([_choice(outputs.choice)] if outputs.choice is not None else []),
        *([GuideSpec("grammar", outputs.grammar)] if outputs.grammar is not None else []),
        *([_ANY_OBJECT] if outputs.json_object else []),
    ]
    if len(guides) != 1:
        raise ValueError("it must have exactly one of json, regex, choice, grammar, json_object")
    return guides[0]


def _json(value: Raw) -> GuideSpec:
    """A schema as an object, or as vLLM takes it too: in a string."""
    text = bytes(value)
    if text.startswith(b'"'):
        return GuideSpec("json", msgspec.json.decode(text, type=str))
    return GuideSpec("json", text.decode())


def _choice(choices: list[str]) -> GuideSpec:
    return GuideSpec("choice", msgspec.json.encode(choices).decode())


def _grammar(value: Raw) -> GuideSpec:
    if bytes(value).startswith(b'"'):
        return GuideSpec("grammar", msgspec.json.decode(value, type=str))
    grammar = msgspec.json.decode(value, type=_Grammar)
    if grammar.type == "json_object":
        return _ANY_OBJECT
    if not bytes(grammar.value):
        raise ValueError("the field `value` is missing")
    match grammar.type:
        case "json":
            return _json(grammar.value)
        case "json_schema":
            return _json(msgspec.json.decode(grammar.value, type=_Schema).schema)
        case "regex":
            return GuideSpec("regex", msgspec.json.decode(grammar.value, type=str))
    raise ValueError(
        f"the type {grammar.type!r} is not one of json, json_object, json_schema and regex"
    )


_READERS: Mapping[str, Callable[[Raw], GuideSpec | None]] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": _json,
    "guided_regex": lambda value: GuideSpec("regex", msgspec.json.decode(value, type=str)),
    "guided_choice": lambda value: _choice(msgspec.json.decode(value, type=list[str])),
    "guided_grammar": lambda value: GuideSpec("grammar", msgspec.json.decode(value, type=str)),
    "guided_json_object": lambda value: (
        _ANY_OBJECT if msgspec.json.decode(value, type=bool) else None
    ),
    "grammar": _grammar,
}
#: Those that OpenAI's API does not have.
GUIDE_FIELDS = frozenset(_READERS) - {"response_format"}


def _refused(field: str, why: str) -> BackendLacks:
    return BackendLacks(f"it can't be used: {why}", param=field)
