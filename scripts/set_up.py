"""Create `.venv` and install Forebay into it, unless that is done already.

    python3 scripts/set_up.py          # to run it, with the native engine and the demo model
    python3 scripts/set_up.py --dev    # and to test it

Runs on the standard library alone. What was installed is remembered by a hash of the files that
say what to install, so it is done again when they change; a lock makes a second call wait.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
SOURCES = ("pyproject.toml", "constraints.txt", "requirements-dev.txt")
OLDEST = (3, 11)


def fingerprint() -> str:
    digest = hashlib.sha256(f"{sys.version_info[:2]} {ROOT}".encode())
    for name in SOURCES:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def install(*requirements: str) -> None:
    """Into `.venv`; pip's warnings are left out, as some machines print hundreds of them."""
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "-qq", "--no-input"]
    constraints = ["-c", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, *constraints, *requirements], check=True, cwd=ROOT)


def ensure(kind: str, what: str, *requirements: str) -> None:
    stamp = VENV / f".{kind}"
    wanted = fingerprint()
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    print(f"Installing {what} into .venv; the first time takes a few minutes.", file=sys.stderr)
    install(*requirements)
    stamp.write_text(wanted)


def set_up(dev: bool) -> None:
    VENV.mkdir(exist_ok=True)
    with (VENV / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (VENV / "bin" / "pip").exists():  # comes last: without it the venv is half-made
            subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        ensure("installed", "Forebay", "-e", ".[demo]")
        if dev:
            ensure("installed-dev", "what its tests need", "-r", "requirements-dev.txt")


def main() -> None:
    parser = argparse.ArgumentParser(description="Create .venv and install Forebay into it.")
    parser.add_argument("--dev", action="store_true", help="and what its tests and checks need")
    options = parser.parse_args()
    if sys.version_info < OLDEST:
        sys.exit(
            f"Forebay needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}."
            " Name another one: make PYTHON=python3.11 ..."
        )
    try:
        set_up(options.dev)
    except subprocess.CalledProcessError as error:
        sys.exit(f"set-up failed: {' '.join(map(str, error.cmd))}")


if __name__ == "__main__":
    main()
