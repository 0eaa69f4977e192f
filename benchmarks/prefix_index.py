"""What the prefix index costs: hashing a prompt, matching it against a fleet, remembering it.

    python benchmarks/prefix_index.py

One thread, best of several rounds. The aim is that choosing a backend stays below 0.3 ms even for
a prompt of 100 kB: 0.14 ms to hash it and 0.05 ms to match 390 blocks against 8 backends.
"""

from __future__ import annotations

import timeit
import tracemalloc
from collections.abc import Callable

from msgspec import structs

from forebay.api import Message
from forebay.prefix_index import PrefixIndex, PrefixKey
from forebay.testing.policy import make_request

PROMPT_BYTES = 100_000


def main() -> None:
    text = "".join(f"{number:07d}," for number in range(PROMPT_BYTES // 8))
    request = make_request(text)
    pieces = (text[start : start + 2000] for start in range(0, len(text), 2000))
    turns = tuple(Message(role="user", content=piece) for piece in pieces)
    conversation = structs.replace(request, messages=turns)
    index = PrefixIndex()
    key = index.key(request)
    blocks = len(key.hashes)
    print(f"{'operation':<48}{'ms':>8}")
    show("hash 100 kB, one message", lambda: index.key(request))
    show("hash 100 kB, 50 messages", lambda: index.key(conversation))
    for count in (8, 64):
        show_matching(index, key, [f"b{number}" for number in range(count)])
    show(f"insert {blocks} blocks, known", lambda: index.insert(key, "b0"))
    print_memory()


def show_matching(index: PrefixIndex, key: PrefixKey, fleet: list[str]) -> None:
    blocks, count = len(key.hashes), len(fleet)
    for name in fleet:
        index.insert(key, name)
    show(f"match {blocks} blocks, all of {count} hold them", lambda: index.match(key, fleet))
    for position, name in enumerate(fleet):
        index.forget(name)
        part = structs.replace(key, hashes=key.hashes[: blocks * (position + 1) // count])
        index.insert(part, name)
    show(f"match {blocks} blocks, {count} hold different parts", lambda: index.match(key, fleet))


def show(what: str, work: Callable[[], object]) -> None:
    runs = 50
    best = min(timeit.repeat(work, number=runs, repeat=7)) / runs
    print(f"{what:<48}{best * 1e3:>8.3f}")


def print_memory() -> None:
    tracemalloc.start()
    index = PrefixIndex()
    size = 0
    for number in range(400):
        index.insert(index.key(make_request(f"{number:08d}" * 12_500)), "b0")
        size = max(size, index.blocks("b0"))
    print(
        f"memory of one backend at its limit of {size} blocks: "
        f"{tracemalloc.get_traced_memory()[0] / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
