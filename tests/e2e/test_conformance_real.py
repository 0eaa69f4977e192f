"""`forebay conformance` before real servers: nothing that is promised is broken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from forebay.conformance import Report

FOREBAY = Path(sys.executable).with_name("forebay")
MODEL = "gemma-3-270m"

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


def verdicts(folder: Path, *arguments: str) -> dict[str, str]:
    """Run it as its user does, and read what it wrote."""
    json, page = folder / "report.json", folder / "report.md"
    files = ["--json", str(json), "--markdown", str(page), "--timeout", "300"]
    command = [str(FOREBAY), "conformance", *arguments, *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    report = msgspec.json.decode(json.read_bytes(), type=Report)
    assert page.read_text().startswith("# Conformance of `")
    assert report.target == "live"
    return {result.id: result.verdict for result in report.results}


def test_llamacpp(real: dict[str, Any], tmp_path: Path) -> None:
    found = verdicts(tmp_path, real["llama"].url, "--adapter", "llamacpp")
    assert found["shapes.chat"] == "passed"
    assert found["length.completion-default"] == "repaired"
    assert found["guidance.json-schema"] == "passed"
    assert found["disconnect.stream-stops"] == "passed"


def test_vllm(real: dict[str, Any], tmp_path: Path) -> None:
    found = verdicts(tmp_path, real["vllm"].url, "--adapter", "vllm")
    assert found["shapes.chat"] == "passed"
    assert found["guidance.regex"] == "passed"
    assert found["disconnect.stream-stops"] == "passed"


def test_triton_llm(triton_server: Any, tmp_path: Path) -> None:
    arguments = ["--adapter", "triton", "--model", "ensemble", "--set", "chat_template=plain"]
    found = verdicts(tmp_path, triton_server.url, *arguments)
    assert found["shapes.chat"] == "repaired"
    assert found["disconnect.stream"] == "passed"


def test_triton_embedder(triton_server: Any, tmp_path: Path) -> None:
    found = verdicts(tmp_path, triton_server.url, "--adapter", "triton", "--model", "embedder")
    assert found["operations.embeddings-batch"] == "repaired"
    assert found["operations.infer"] == "passed"
    assert found["shapes.chat"] == "lacking"


def test_native(tmp_path: Path) -> None:
    found = verdicts(tmp_path, MODEL, "--adapter", "native")
    assert found["shapes.chat"] == "passed"
    assert found["sampling.seed"] == "passed"
    assert found["operations.detokenize"] == "passed"
    assert found["disconnect.whole-stops"] == "passed"
