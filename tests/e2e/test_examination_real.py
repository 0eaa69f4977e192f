"""What real servers claim, put to the test, and what follows from it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

# The first of them waits for vLLM to start, and for its first request, which compiles kernels.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

MODEL = "gemma-3-270m"
PROVEN = {
    "native": {"usage", "stop", "logprobs", "cancel"},
    "llama": {"usage", "stop", "schema", "completions_schema", "logprobs", "cancel"},
    "vllm": {"usage", "stop", "schema", "completions_schema", "tools", "logprobs", "cancel"},
}
SCHEMA = {
    "type": "object",
    "properties": {"word": {"type": "string", "enum": ["sea"]}},
    "required": ["word"],
    "additionalProperties": False,
}
WANTED = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}


def told(gateway: Any, name: str, verdict: str) -> set[str]:
    findings = findings_of(gateway, name).items()
    return {question for question, found in findings if found["verdict"] == verdict}


def findings_of(gateway: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = gateway.backend(name)["examination"]["findings"]
    return found


@pytest.mark.parametrize("name", list(PROVEN))
def test_what_was_found(gateway: Any, name: str) -> None:
    # What a busy machine could not tell at first is asked again after 30, 60, 120 and 240 s.
    for _ in range(480):
        if not any(found["again"] for found in findings_of(gateway, name).values()):
            break
        time.sleep(1)
    findings = gateway.backend(name)["examination"]
    assert told(gateway, name, "holds") == PROVEN[name], findings
    assert told(gateway, name, "fails") == set(), findings
    assert findings["version"] == gateway.backend(name)["capabilities"]["version"] != ""


@pytest.fixture(scope="module")
def boaster(real: dict[str, Any], start_gateway: Any) -> Any:
    """An adapter that claims of the real llama.cpp what its chat template cannot do: call tools."""
    llama = {"adapter": "openai", "url": real["llama"].url, "tools": True}
    config = {"backends": {"boaster": llama}, "models": {MODEL: {"backends": ["boaster"]}}}
    gateway = start_gateway("boaster", config)
    gateway.wait_until_examined("boaster")
    return gateway


def test_a_false_claim_is_found_and_shown(boaster: Any) -> None:
    assert "tools" in told(boaster, "boaster", "fails"), findings_of(boaster, "boaster")
    forebay = Path(sys.executable).with_name("forebay")
    command = [forebay, "backends", "--admin", boaster.admin]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"proven: .*\bschema\b.*refuted: .*\btools\b", " ".join(shown.split()))


def test_what_nobody_can_do_is_refused_with_what_was_found(boaster: Any) -> None:
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    messages: Any = [{"role": "user", "content": "hi"}]
    with (
        boaster.client() as client,
        pytest.raises(openai.BadRequestError, match="boaster was found not to call tools"),
    ):
        client.chat.completions.create(model=MODEL, messages=messages, tools=tools)


def test_a_schema_goes_only_where_it_binds(gateway: Any) -> None:
    """The native engine cannot; llama.cpp's completions only in its own words."""
    body = {"model": "gemma-3-270m", "prompt": '{"word": "yes"}', "response_format": WANTED}
    for _ in range(4):
        answer = httpx.post(
            f"{gateway.url}/v1/completions",
            json={**body, "max_tokens": 60, "temperature": 0},
            timeout=120,
        )
        assert answer.headers["x-forebay-backend"] in ("llama", "vllm")
        (choice,) = answer.json()["choices"]
        assert choice["finish_reason"] == "stop"
        assert json.loads(choice["text"]) == {"word": "sea"}
