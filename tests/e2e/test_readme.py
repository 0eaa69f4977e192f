"""What the README shows is what one sees: its snippets run against `forebay serve`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

README = Path(__file__).resolve().parents[2] / "README.md"
# A snippet and what it prints.
PYTHON = re.compile(r"```python\n(.*?)```\n```text\n(.*?)```", re.S)
SHELL = re.compile(r"```console\n\$ (.*?)\n(\{.*?)```", re.S)


@pytest.fixture(scope="module")
def url(serve_demo: Any) -> Iterator[str]:
    server = serve_demo()
    yield server.url
    server.close()


def test_curl(url: str) -> None:
    command, shown = SHELL.findall(README.read_text())[0]
    run = command.replace("http://127.0.0.1:8000", url)
    seen = subprocess.run(["bash", "-c", run], capture_output=True, text=True, check=True).stdout
    assert _constant(json.loads(seen)) == _constant(json.loads(shown))


@pytest.mark.parametrize("number", [0, 1])
def test_python(url: str, number: int) -> None:
    code, shown = PYTHON.findall(README.read_text())[number]
    run = code.replace("http://127.0.0.1:8000", url)
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True)
    assert done.stdout.strip("\n") == shown.strip("\n")


def _constant(answer: dict[str, Any]) -> dict[str, Any]:
    """Without what differs each time; the prompt may also be cached by now."""
    for name in ("id", "created"):
        del answer[name]
    del answer["usage"]["prompt_tokens_details"]
    return answer
