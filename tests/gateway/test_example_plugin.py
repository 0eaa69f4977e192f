"""A third party's distribution: built, installed from its wheel, found, held to the contracts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parents[1] / "fakes" / "example_plugin"

REPORT = """
import json
from pathlib import Path
from msgspec import to_builtins
from forebay.loader import load_plugins

registry = load_plugins()
print(json.dumps({
    "report": to_builtins(registry.report),
    "adapter": registry.adapter("echo").settings(adapter="echo").pace,
    "policy": type(registry.policy("sticky_tenant", Path())).__name__,
    "file": __import__("forebay_example").__file__,
}))
"""


def run(*command: str, cwd: Path, site: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site or ""), "PIP_NO_INPUT": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example installed from its wheel, and a broken distribution beside it."""
    work = tmp_path_factory.mktemp("example")
    target = work / "site"
    build = ("-m", "build", "--no-isolation", "--wheel", "--outdir", str(work), str(SOURCE))
    run(*build, cwd=work)
    (wheel,) = work.glob("*.whl")
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*install, "--target", str(target), str(wheel), cwd=work)
    broken = target / "broken_sibling-0.0.1.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Name: broken-sibling\nVersion: 0.0.1\n")
    (broken / "entry_points.txt").write_text("[forebay.v1]\nbroken = broken_sibling\n")
    (target / "broken_sibling.py").write_text("raise ImportError('libacme.so.3 is missing')\n")
    return target


def test_it_is_found_from_its_wheel_beside_a_broken_one(site: Path, tmp_path: Path) -> None:
    seen: dict[str, Any] = json.loads(run("-c", REPORT, cwd=tmp_path, site=site))
    assert Path(seen["file"]).is_relative_to(site)
    entries = {entry["name"]: entry for entry in seen["report"]}
    for name, provides in (("echo", "adapter echo"), ("sticky_tenant", "policy sticky_tenant")):
        assert entries[name] == {
            "name": name,
            "distribution": "forebay-example",
            "version": "1.2.3",
            "provides": [provides],
        }
    broken = entries["broken"]
    assert (broken["distribution"], broken["version"]) == ("broken-sibling", "0.0.1")
    assert "libacme.so.3 is missing" in broken["reason"]
    assert "broken_sibling.py:1" in broken["reason"]
    assert "policy prefix_affinity" in entries["policies"]["provides"]
    assert seen["policy"] == "StickyTenant"
    assert seen["adapter"] == 0.0


def test_it_passes_the_contracts_as_installed(site: Path, tmp_path: Path) -> None:
    tests = SOURCE / "tests"
    plugins = ("-p", "no:cacheprovider", "-p", "no:asyncio")  # authors need neither
    options = ("-q", *plugins, "-c", str(SOURCE / "pyproject.toml"))
    output = run("-m", "pytest", *options, str(tests), cwd=tmp_path, site=site)
    assert "failed" not in output
    assert int(output.split(" passed")[0].split()[-1]) >= 25
