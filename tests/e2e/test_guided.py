"""Guided generation by the real demo model, through the gateway, with the openai client."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PAGE = Path(__file__).parents[2] / "docs" / "guided.md"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def test_a_schema_binds_at_temperature_1(client: openai.OpenAI) -> None:
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "person", "strict": True, "schema": SCHEMA},
    }
    for seed in range(20):
        answer = client.chat.completions.create(
            model="native",
            messages=[{"role": "user", "content": "Describe a person as JSON."}],
            max_tokens=300,
            temperature=1,
            seed=seed,
            response_format=form,
        )
        (choice,) = answer.choices
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)


def test_the_blocks_of_the_page_run(
    client: openai.OpenAI, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    code = "\n".join(blocks).replace("http://127.0.0.1:8000/v1", str(client.base_url))
    exec(code.replace('"gemma-3-270m"', '"native"'), {})
    *first, choice, number, grammar = capsys.readouterr().out.splitlines()
    assert len(first) < 2
    assert choice in ("yes", "no")
    assert re.fullmatch("[0-9]{3}-[0-9]{4}", number)
    assert re.fullmatch(r"\(*[0-9]\)*", grammar)
