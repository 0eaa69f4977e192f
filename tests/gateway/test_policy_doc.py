"""The code of docs/writing-a-policy.md does what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from forebay.api import BackendView, ConfigError, Policy, Snapshot
from forebay.loader import GROUP, load_plugins
from forebay.testing import make_request, make_snapshot

PAGE = (Path(__file__).parents[2] / "docs" / "writing-a-policy.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's Python files, each under the name in its first line."""
    folder = tmp_path_factory.mktemp("policies")
    for code in blocks("python"):
        name = code.splitlines()[0].removeprefix("# ")
        assert name.endswith(".py"), f"a block without a file name: {name}"
        (folder / name).write_text(code)
    return folder


def test_its_tests_pass(folder: Path) -> None:
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "13 passed" in done.stdout


def test_its_configurations_build_their_policies(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    specs = [yaml.safe_load(text)["models"]["gemma-3-270m"]["policy"] for text in blocks("yaml")]
    registry = load_plugins([], extra={"cautious": import_module("cautious")})
    built = [registry.policy(spec, folder) for spec in specs]
    assert [type(policy).__name__ for policy in built] == ["KvHeadroom", "Cautious"]
    scores = built[1].score(make_request(), make_snapshot(kv_usage=[0.85, 0.5, None]))
    assert scores == [None, 1.0, 1.0]
    with pytest.raises(ConfigError, match=r"no option 'ceilling'; did you mean 'ceiling'\?"):
        registry.policy({"name": "cautious", "ceilling": 1}, folder)
    with pytest.raises(ConfigError, match=r"option 'ceiling': Expected `float` <= 1\.0"):
        registry.policy({"name": "cautious", "ceiling": 2}, folder)


def test_the_entry_point_is_in_our_group() -> None:
    (text,) = blocks("toml")
    assert tomllib.loads(text)["project"]["entry-points"] == {GROUP: {"cautious": "cautious"}}


@pytest.mark.parametrize("spec", ["longest_prefix.py:LongestPrefix", "explorer.py:Explorer"])
def test_the_other_files_hold_policies(folder: Path, spec: str) -> None:
    policy = load_plugins([]).policy(spec, folder)
    assert isinstance(policy, Policy)
    snapshot = make_snapshot(prefix_tokens=[500, 1000], prompt_tokens=1000)
    assert max(score or 0 for score in policy.score(make_request(), snapshot)) == 1.0


def test_it_names_every_field_of_a_backend() -> None:
    for field in BackendView.__struct_fields__ + Snapshot.__struct_fields__:
        if field != "max_in_flight":  # those that are full are not shown
            assert f"`{field}`" in PAGE or f"`snapshot.{field}`" in PAGE, field
