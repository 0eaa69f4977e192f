"""Every adapter before a server that does what it is asked, and the conformance kit before both.

What is repaired and what is lacking is expected to the letter, so that a promise which is no longer
kept shows, and one that is newly kept as well: then `make conformance` writes it down.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fake_servers.subjects import PLAYED, examined
from forebay.config import Logging
from forebay.telemetry import logs

EXPECTED = json.loads(Path(__file__).with_name("conformance_verdicts.json").read_text())


@pytest.fixture(autouse=True)
def _quiet(logging_as_before: None) -> None:
    logs.configure(Logging(level="error", format="console"))


@pytest.mark.parametrize("name", sorted(PLAYED))
async def test_promises_are_kept_before(name: str) -> None:
    report = await examined(name)
    assert {result.id: result.reason for result in report.broken} == {}
    found = {result.id: result.verdict for result in report.results}
    for verdict in ("lacking", "repaired"):
        ids = [check for check, given in found.items() if given == verdict]
        assert ids == EXPECTED[name][verdict]


def test_every_fake_is_expected_to_do_something() -> None:
    assert sorted(EXPECTED) == sorted(PLAYED)
