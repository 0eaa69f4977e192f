"""Compiles the C++ kernels for the machine that runs them, once; later starts find the result."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
from hashlib import blake2b
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
#: Signs of errno and of traps are given up for vectors; no value is: sums keep their order.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread", "-w"),
    *("-fno-math-errno", "-fno-trapping-math"),
)
_SECONDS = 300.0


class CannotCompile(Exception):
    """There is no compiler, or it failed; the message says which."""


def compiled(folder: Path | None = None) -> Path:
    """The shared library of ``SOURCES`` for this machine, from ``folder`` or compiled into it.

    :param folder: None: ``forebay/kernels`` in the user's cache folder.
    :raises CannotCompile: and why.
    """
    compiler = _compiler()
    folder = folder or _cache_folder()
    path = folder / f"kernels-{_fingerprint(compiler)}.so"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _compile(compiler, path)
        except OSError as error:
            raise CannotCompile(f"{folder}: {error}") from error
    return path


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise CannotCompile("there is no C++ compiler (c++, g++, clang++, or as $CXX says)")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "forebay" / "kernels"


def _fingerprint(compiler: str) -> str:
    """Of all that the result depends on: sources, flags, compiler, processor."""
    digest = blake2b(digest_size=12)
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    status = Path(compiler).stat()
    parts = [*FLAGS, compiler, str(status.st_mtime_ns), str(status.st_size), _processor()]
    digest.update("\0".join(parts).encode())
    return digest.hexdigest()


def _processor() -> str:
    """Model and instruction sets: ``-march=native`` on another processor may not run on this."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.machine() + platform.processor()
    names = r"^(?:vendor_id|cpu family|model|flags|Features|CPU part)\s*:.*$"
    return "\n".join(sorted(set(re.findall(names, cpuinfo.read_text(), re.MULTILINE))))


def _compile(compiler: str, path: Path) -> None:
    """Written under another name first: several processes may start at once."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *FLAGS, str(SOURCES / "kernels.cpp"), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)  # noqa: S603
        except subprocess.TimeoutExpired as error:
            raise CannotCompile(f"{compiler} took longer than {_SECONDS:.0f} s") from error
        if done.returncode:
            raise CannotCompile(f"{compiler} failed: {done.stderr.strip()[-500:]}")
        made.replace(path)
