"""The native engine's guide, from whatever dialect asks for it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from forebay.api import BackendLacks, GenerateRequest
from forebay_engine.client import GuideSpec
from forebay_plugins.native_guide import GUIDE_FIELDS, guide_of

SCHEMA = {"type": "integer"}
JSON = GuideSpec("json", '{"type":"integer"}')
ANY_OBJECT = GuideSpec("json", '{"type":"object"}')


def request(**fields: Any) -> GenerateRequest:
    raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields.items()}
    return GenerateRequest(id="a", endpoint="chat", model="m", created=0, fields=raw)


def openai(type: str, **more: Any) -> dict[str, Any]:
    return {"type": type, **more}


@pytest.mark.parametrize(
    ("field", "value", "guide"),
    [
        ("response_format", openai("json_object"), ANY_OBJECT),
        ("response_format", openai("json_schema", json_schema={"schema": SCHEMA}), JSON),
        (
            "response_format",
            openai("json_schema", json_schema={"name": "n", "strict": True, "schema": SCHEMA}),
            JSON,
        ),
        ("structured_outputs", {"json": SCHEMA}, JSON),
        ("structured_outputs", {"json": '{"type":"integer"}', "regex": None}, JSON),
        ("structured_outputs", {"regex": "a+"}, GuideSpec("regex", "a+")),
        ("structured_outputs", {"choice": ["a", "é"]}, GuideSpec("choice", '["a","é"]')),
        ("structured_outputs", {"grammar": "start: /a/"}, GuideSpec("grammar", "start: /a/")),
        ("structured_outputs", {"json_object": True}, ANY_OBJECT),
        ("guided_json", SCHEMA, JSON),
        ("guided_json", '{"type":"integer"}', JSON),
        ("guided_regex", "a+", GuideSpec("regex", "a+")),
        ("guided_choice", ["a", "b"], GuideSpec("choice", '["a","b"]')),
        ("guided_grammar", 'root ::= "a"', GuideSpec("grammar", 'root ::= "a"')),
        ("guided_json_object", True, ANY_OBJECT),
        ("grammar", {"type": "json", "value": SCHEMA}, JSON),
        ("grammar", {"type": "json_object"}, ANY_OBJECT),
        ("grammar", {"type": "json_schema", "value": {"name": "n", "schema": SCHEMA}}, JSON),
        ("grammar", {"type": "regex", "value": "a+"}, GuideSpec("regex", "a+")),
        ("grammar", 'root ::= "a"', GuideSpec("grammar", 'root ::= "a"')),
    ],
)
def test_each_dialect_is_understood(field: str, value: Any, guide: GuideSpec) -> None:
    assert guide_of(request(**{field: value})) == (field, guide)
    assert field == "response_format" or field in GUIDE_FIELDS


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": {"type": "text"}},
        {"response_format": None, "guided_json": None, "structured_outputs": None},
        {"guided_json_object": False, "temperature": 1},
    ],
)
def test_what_constrains_nothing_is_no_guide(fields: dict[str, Any]) -> None:
    assert guide_of(request(**fields)) is None


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"response_format": {"type": "structural_tag"}}, "response_format", "not one of text"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format",
            "schema",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "one of"),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "structured_outputs",
            "whitespace_pattern",
        ),
        ({"guided_choice": "a"}, "guided_choice", "array"),
        ({"guided_regex": ["a"]}, "guided_regex", "str"),
        ({"grammar": {"type": "ebnf", "value": "a"}}, "grammar", "not one of json"),
        ({"grammar": {"type": "json"}}, "grammar", "value"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "one"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    fields: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(BackendLacks, match=said) as refusal:
        guide_of(request(**fields))
    assert refusal.value.param == param
