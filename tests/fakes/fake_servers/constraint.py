"""Constraints on an answer: the shortest text that keeps to a schema, expression or grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from re import _parser  # type: ignore[attr-defined]
from typing import Any

__all__ = ["Impossible", "by_grammar", "by_regex", "by_schema"]

_TYPES: Mapping[str, Any] = {
    "string": "",
    "integer": 0,
    "number": 0.5,
    "boolean": True,
    "null": None,
    "array": [],
    "object": {},
}


class Impossible(Exception):
    """Nothing keeps to it, or it is none; the message says why."""


def by_schema(schema: object) -> str:
    """JSON, as compact as models write it.

    :raises Impossible: it is no schema.
    """
    return json.dumps(_instance(schema), ensure_ascii=False)


def _instance(schema: object) -> Any:
    if schema is True:
        return None
    if not isinstance(schema, dict):
        raise Impossible(f"a schema must be an object: {schema!r}")
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for several in ("anyOf", "oneOf", "allOf"):
        if schema.get(several):
            return _instance(schema[several][0])
    kind = schema.get("type", "object" if "properties" in schema else "null")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind not in _TYPES:
        raise Impossible(f"Invalid type: {kind}")
    if kind == "object":
        properties = schema.get("properties", {})
        return {name: _instance(properties.get(name, True)) for name in schema.get("required", ())}
    if kind == "array":
        return [_instance(schema.get("items", True))] * schema.get("minItems", 0)
    if kind == "string":
        return (
            by_regex(schema["pattern"]) if "pattern" in schema else "a" * schema.get("minLength", 0)
        )
    return max(_TYPES[kind], schema.get("minimum", 0)) if kind == "integer" else _TYPES[kind]


def by_regex(pattern: str) -> str:
    """
    :raises Impossible: it is no regular expression, or one of a kind that is not made here.
    """
    try:
        return _matching(_parser.parse(pattern))
    except re.error as wrong:
        raise Impossible(f"regex parse error: {wrong}") from None


def _matching(parsed: Any) -> str:
    return "".join(_match(str(op), value) for op, value in parsed)


def _match(op: str, value: Any) -> str:
    match op:
        case "LITERAL":
            return chr(value)
        case "ANY":
            return "a"
        case "IN":
            return _one_of(value)
        case "MAX_REPEAT" | "MIN_REPEAT":
            least, _, inner = value
            return _matching(inner) * least
        case "SUBPATTERN":
            return _matching(value[-1])
        case "BRANCH":
            return _matching(value[1][0])
        case "AT":
            return ""
    raise Impossible(f"regex feature {op} is not supported")


def _one_of(members: Any) -> str:
    op, value = members[0]
    classes = {"CATEGORY_DIGIT": "0", "CATEGORY_SPACE": " ", "CATEGORY_WORD": "a"}
    match str(op):
        case "LITERAL":
            return chr(value)
        case "RANGE":
            return chr(value[0])
        case "CATEGORY" if str(value) in classes:
            return classes[str(value)]
    raise Impossible(f"regex feature {op} is not supported")


def by_grammar(grammar: str) -> str:
    """The first alternative of ``root``, in GBNF or a form of EBNF.

    :raises Impossible: there is no such rule, or it is none of literals and names of rules.
    """
    rules = dict(re.findall(r"^\s*(\w+)\s*::=\s*(.+?)\s*$", grammar, re.MULTILINE))
    return _expanded(rules, "root", 0)


def _expanded(rules: Mapping[str, str], name: str, depth: int) -> str:
    if name not in rules or depth > 9:
        raise Impossible(f"grammar has no rule {name!r} with an end")
    text = ""
    for literal, rule, sign in re.findall(r'"((?:[^"\\]|\\.)*)"|(\w+)|(\S)', rules[name]):
        if sign == "|":
            return text
        if sign:
            raise Impossible(f"unexpected {sign!r} in the rule {name!r}")
        text += _expanded(rules, rule, depth + 1) if rule else json.loads(f'"{literal}"')
    return text
