"""Memory that is taken from the system before it is needed, and what is left of it given back."""

from __future__ import annotations

import ctypes
import mmap
import re
import threading
from pathlib import Path

import pytest

from forebay_engine import ready_memory
from forebay_engine.ready_memory import ReadyMemory

MIB = 1 << 20


def resident() -> int:
    """Bytes of this process's anonymous memory."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def test_parts_do_not_overlap_and_begin_at_cache_lines() -> None:
    memory = ReadyMemory(1000)
    first, second = memory.take(100), memory.take(10)
    assert first is not None
    assert second is not None
    first[:] = b"\1" * 100
    assert bytes(second) == bytes(10)
    rest = memory.take(1000 - 192)
    assert rest is not None
    rest[:] = b"\2" * len(rest)
    assert bytes(first) == b"\1" * 100
    assert bytes(second) == bytes(10)


def test_what_was_taken_is_never_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    written, memset = threading.Event(), ctypes.memset

    def late(*arguments: int) -> None:
        written.wait(0.1)
        memset(*arguments)

    monkeypatch.setattr(ready_memory, "_CHUNK", 1 << 12)
    monkeypatch.setattr(ctypes, "memset", late)
    memory = ReadyMemory(1 << 16)
    taken = memory.take(3 << 13)
    assert taken is not None
    taken[:] = b"\1" * len(taken)
    written.set()
    memory._thread.join()
    assert bytes(taken) == b"\1" * len(taken)


def test_what_is_too_large_is_refused_and_what_is_smaller_still_found() -> None:
    memory = ReadyMemory(1000)
    assert memory.take(1001) is None
    assert memory.take(1000) is not None
    assert memory.take(1) is None


def test_pages_are_there_before_they_are_taken_and_go_back_unless_they_were() -> None:
    before = resident()
    memory = ReadyMemory(64 * MIB)
    memory._thread.join()
    assert resident() - before > 60 * MIB
    taken = memory.take(16 * MIB + 1)
    assert taken is not None
    taken[:] = b"\1" * len(taken)
    memory.settle()
    # A huge page may hold both what was taken and what was not.
    assert resident() - before < 16 * MIB + mmap.PAGESIZE + 4 * MIB
    assert taken[-1] == 1
    assert memory.take(1) is None
