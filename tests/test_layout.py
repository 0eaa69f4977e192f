"""The rooms: where packages may lie, how long modules may grow, what the gateway may load."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "gateway": "forebay",
    "plugins": "forebay_plugins",
    "engine_native": "forebay_engine",
    "kernels": "forebay_kernels",
    "router_policies": "forebay_policies",
}
LONGEST = 400
# The release from which on transformers does not mistake a folder named `kernels` for a package.
TRANSFORMERS = (5, 10, 1)

MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_no_room_is_a_package_itself() -> None:
    """A package named `kernels` on the path breaks the import of every transformers model."""
    assert [room for room in ROOMS if (ROOT / room / "__init__.py").exists()] == []


@pytest.mark.parametrize(("room", "package"), ROOMS.items())
def test_each_room_holds_its_one_package_typed_and_shipped(room: str, package: str) -> None:
    inits = {path.parent for path in (ROOT / room).rglob("__init__.py")}
    tops = [folder for folder in inits if folder.parent not in inits]
    assert tops == [ROOT / room / package]
    assert (ROOT / room / package / "py.typed").exists()
    build = project()["tool"]["hatch"]["build"]
    assert room in build["dev-mode-dirs"]
    assert f"{room}/{package}" in build["targets"]["wheel"]["packages"]


def test_tests_are_no_packages() -> None:
    """Under importlib mode a package among the tests would be imported by another name."""
    found = {path.parent for path in (ROOT / "tests").rglob("__init__.py")}
    assert found == {ROOT / "tests/fakes/example_plugin/src/forebay_example"}


def test_modules_stay_short() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in MODULES}
    assert len(lengths) > 80
    assert {str(path): lines for path, lines in lengths.items() if lines > LONGEST} == {}


def test_names_come_from_the_domain() -> None:
    vague = {"common", "helper", "helpers", "manager", "misc", "util", "utils"}
    assert [path for path in MODULES if vague & set(path.stem.split("_"))] == []


def test_transformers_is_new_enough_for_a_folder_named_kernels() -> None:
    (asked,) = (
        requirement
        for requirement in project()["project"]["optional-dependencies"]["native"]
        if requirement.startswith("transformers")
    )
    assert _release(asked.removeprefix("transformers>=")) >= TRANSFORMERS
    assert _release(version("transformers")) >= TRANSFORMERS


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3])


def test_every_plugin_module_that_offers_something_is_an_entry_point() -> None:
    named = set(project()["project"]["entry-points"]["forebay.v1"].values())
    offering = {
        f"{path.parent.name}.{path.stem}"
        for path in (ROOT / "plugins").rglob("*.py")
        if "@hookimpl" in path.read_text()
    }
    assert offering | {"forebay_policies"} == named


def test_the_gateway_and_its_plugins_load_without_torch() -> None:
    code = (
        "import sys, forebay.app, forebay.cli\n"
        "from forebay.loader import Loaded, load_plugins\n"
        "loaded = [e.name for e in load_plugins().report if isinstance(e, Loaded)]\n"
        "assert 'native' in loaded, loaded\n"
        "heavy = {'torch', 'triton', 'transformers', 'numpy', 'hypothesis', 'pytest'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
