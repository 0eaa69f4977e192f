"""docs/backends.md says what the reports say, which say nothing of where they were made."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from forebay.conformance import CHECKS, Report

ROOT = Path(__file__).parents[2]
REPORTS = sorted((ROOT / "docs" / "conformance").glob("*.json"))


@pytest.fixture
def generator() -> ModuleType:
    path = ROOT / "scripts" / "generate_backends_doc.py"
    spec = importlib.util.spec_from_file_location("generate_backends_doc", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_reports_say(generator: ModuleType) -> None:
    """If this fails: `make docs`."""
    assert (ROOT / "docs" / "backends.md").read_text() == generator.generate()


def test_what_was_never_driven_live_is_said_so(generator: ModuleType) -> None:
    page = generator.generate()
    (sentence,) = re.findall(r"\*\*Nobody has driven .*?\*\*", page, re.DOTALL)
    live = {report.adapter for _, report in generator.read_reports() if report.target == "live"}
    for adapter in ("tgi", "trtllm", "sglang", "ollama", "anthropic"):
        assert (f"`{adapter}`" in sentence) == (adapter not in live)
    assert "`native`" not in sentence


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_reports_are_whole_and_hold_no_address(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"127\.0\.0\.1|localhost|/root|/home|/work|/tmp|https?://", text) is None
    report = msgspec.json.decode(text, type=Report)
    assert {result.id for result in report.results} <= {check.id for check in CHECKS}
    assert report.broken == []
