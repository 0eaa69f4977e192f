"""docs/engine.md: its pictures are what the code does, its table names tests that there are."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "engine.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|\n").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| feature")
]
LINK = re.compile(r"\[(\w+)\]\(\.\./(tests/[\w/]+\.py)\)")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return import_module("draw_engine")


def test_the_pictures_are_what_the_code_does_today(script: ModuleType) -> None:
    drawn = dict(script.pictures())
    shown = re.findall(r"\]\(images/([\w-]+\.svg)\)", PAGE)
    assert sorted(shown) == sorted(drawn)
    for name, svg in drawn.items():
        ElementTree.fromstring(svg)
        kept = (ROOT / "docs" / "images" / name).read_text()
        assert svg == kept, f"{name} has changed: python scripts/draw_engine.py"


def test_the_table_has_seven_cells_a_row() -> None:
    assert len(ROWS) > 20
    assert {len(row) for row in ROWS} == {7}
    assert {cell for row in ROWS for cell in row[1:6]} <= {"yes", "partly", "–", "?"}


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_what_is_claimed_is_linked_to_a_test_that_exists(row: list[str]) -> None:
    feature, ours, *_, tests = row
    links = LINK.findall(tests)
    assert bool(links) == (ours in ("yes", "partly")), f"{feature}: a claim and its test"
    for name, path in links:
        source = (ROOT / path).read_text()
        there = re.search(rf"^(async )?def {name}\(|^{name} = ", source, re.MULTILINE)
        assert there, f"{feature}: there is no {name} in {path}"


def test_a_link_to_a_test_that_is_gone_is_seen() -> None:
    with pytest.raises(AssertionError, match="there is no test_gone in tests/engine/test_gguf"):
        test_what_is_claimed_is_linked_to_a_test_that_exists(
            ["x", "yes", "–", "–", "–", "–", "[test_gone](../tests/engine/test_gguf.py)"]
        )
    with pytest.raises(AssertionError, match="x: a claim and its test"):
        test_what_is_claimed_is_linked_to_a_test_that_exists(["x", "yes", "–", "–", "–", "–", ""])
