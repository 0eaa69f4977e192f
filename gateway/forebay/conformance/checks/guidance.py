"""Guided answers: a constraint binds, against the prompt and the model's will, or is refused.

A server that takes a constraint and ignores it is worse than one without: its client trusts it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from forebay.conformance.answer import Answer, Broken, Lacking
from forebay.conformance.check import check
from forebay.conformance.talk import Talk

_ASK = "Say hello."
_JSON = 'Answer with a JSON object such as {"a": 1}'
_TOKENS = 48
_WORDS = ["zebra", "quartz"]
_REGEX = "zeb[0-9]{3}"

#: How servers spell what OpenAI's API has no field for; ``{}`` stands for the value. Sources: vLLM,
#: SGLang, llama.cpp and TensorRT-LLM, each server's protocol.
Spelling = tuple[str, Callable[[Any], Any]]


def _plain(value: Any) -> Any:
    return value


SPELLINGS: Mapping[str, tuple[Spelling, ...]] = {
    "choice": (
        ("structured_outputs", lambda value: {"choice": value}),
        ("guided_choice", _plain),
    ),
    "regex": (
        ("structured_outputs", lambda value: {"regex": value}),
        ("guided_regex", _plain),
        ("regex", _plain),
    ),
    "grammar": (
        ("structured_outputs", lambda value: {"grammar": value}),
        ("guided_grammar", _plain),
        ("grammar", _plain),
        ("ebnf", _plain),
    ),
}
VALUES: Mapping[str, tuple[Any, str]] = {
    "choice": (_WORDS, "zebra|quartz"),
    "regex": (_REGEX, _REGEX),
    "grammar": ('root ::= "zebra" | "quartz"', "zebra|quartz"),
}


def _schema(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _format(schema: object, **more: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, **more}}


@check("guidance.json-object", "`json_object` makes the answer a JSON object")
async def json_object(talk: Talk) -> None:
    for prompt in (_JSON, _ASK, "{"):
        format_ = {"type": "json_object"}
        asked = talk.generate(prompt, response_format=format_, max_tokens=_TOKENS)
        answer = (await asked).expect("response_format")
        text = answer.text.strip()
        if answer.choice.finish == "stop":
            _object(text)
            return
        if text:
            if not text.startswith("{"):
                raise Broken(f"it begins {text[:40]!r}")
            return
    raise Broken("it never began")


@check("guidance.json-schema", "A JSON schema binds, whatever the prompt says", claim="schema")
async def json_schema(talk: Talk) -> None:
    await _bound(talk, _format(_schema(animal={"const": "zebra"})), {"animal": ["zebra"]})


@check("guidance.strict", "So does a strict one")
async def strict(talk: Talk) -> None:
    schema = _schema(word={"type": "string", "enum": _WORDS})
    await _bound(talk, _format(schema, strict=True), {"word": _WORDS})


@check("guidance.numbers", "So does one of numbers")
async def numbers(talk: Talk) -> None:
    schema = _schema(n={"type": "integer", "enum": [41, 42]})
    await _bound(talk, _format(schema), {"n": [41, 42]})


@check("guidance.stream", "A stream is bound as well")
async def stream(talk: Talk) -> None:
    format_ = _format(_schema(animal={"const": "zebra"}))
    await _bound(talk, format_, {"animal": ["zebra"]}, stream=True)


@check("guidance.invalid-schema", "A schema that is none is refused with a 400")
async def invalid_schema(talk: Talk) -> None:
    answer = await talk.generate(response_format=_format({"type": "no such type"}))
    _refuses_sense(answer)


@check("guidance.unknown-format", "An unknown type of `response_format` is refused with a 400")
async def unknown_format(talk: Talk) -> None:
    _refuses_sense(await talk.generate(response_format={"type": "no_such_format"}))


@check("guidance.choice", "A list of choices binds, in one of the spellings that servers have")
async def choice(talk: Talk) -> None:
    await _some_spelling(talk, "choice")


@check("guidance.regex", "A regular expression binds, in one of the spellings")
async def regex(talk: Talk) -> None:
    await _some_spelling(talk, "regex")


@check("guidance.grammar", "A grammar binds, in one of the spellings")
async def grammar(talk: Talk) -> None:
    await _some_spelling(talk, "grammar")


@check("guidance.never-ignored", "No spelling of a constraint is taken and then ignored")
async def never_ignored(talk: Talk) -> None:
    (await talk.generate(max_tokens=1)).expect()
    ignored = [
        f"{field} ({kind})"
        for kind, spellings in SPELLINGS.items()
        for field, form in spellings
        if await _spelled(talk, kind, field, form) is False
    ]
    if ignored:
        raise Broken(f"ignored: {', '.join(ignored)}")


async def _bound(
    talk: Talk, format_: object, wanted: Mapping[str, list[Any]], stream: bool = False
) -> None:
    """``wanted``: the one key of the object, and the values that it may have."""
    fields = {"response_format": format_, "stream": stream, "max_tokens": _TOKENS}
    answer = (await talk.generate(_ASK, **fields)).expect("response_format", "json_schema")
    ((key, values),) = wanted.items()
    if answer.choice.finish == "stop":
        found = _object(answer.text)
        if found.keys() != {key} or found[key] not in values:
            raise Broken(f"the answer is {answer.text!r}")
        return
    # Between the tokens of JSON a model may write white space as long as it likes.
    begun = "".join(answer.text.split())
    allowed = [msgspec.json.encode({key: value}).decode() for value in values]
    if not begun or not any(text.startswith(begun) for text in allowed):
        raise Broken(f"the answer begins {answer.text!r}")


def _object(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError:
        raise Broken(f"it is no JSON object: {text[:80]!r}") from None


def _refuses_sense(answer: Answer) -> None:
    if answer.error.get("code") == "unsupported":
        raise Lacking(answer.told())
    if answer.status not in (400, 422):
        raise Broken(f"expected HTTP 400, got {answer.told()}")


async def _some_spelling(talk: Talk, kind: str) -> None:
    found = {field: await _spelled(talk, kind, field, form) for field, form in SPELLINGS[kind]}
    if True in found.values():
        return
    ignored = [field for field, bound in found.items() if bound is False]
    if ignored:
        raise Broken(f"taken and ignored: {', '.join(ignored)}")
    raise Lacking(f"refuses {', '.join(found)}")


async def _spelled(talk: Talk, kind: str, field: str, form: Callable[[Any], Any]) -> bool | None:
    """Whether the constraint bound; None: it was refused."""
    value, pattern = VALUES[kind]
    answer = await talk.generate(_ASK, max_tokens=12, **{field: form(value)})
    if answer.status in (400, 422):
        return None
    text = answer.expect(field).text.strip()
    return re.fullmatch(pattern, text) is not None
