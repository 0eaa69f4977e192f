"""Thousands of requests of every kind, half of them left in the middle, and nothing is left behind.

The engine is the real one in its own process, over its socket, with a tiny model whose cache is far
too small for those who come at once. `make soak` runs 10,000 requests and prints the figures.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import msgspec
import pytest

from forebay_engine.client import (
    ENGINE_COMMAND,
    DeadlinePassed,
    Done,
    EngineClient,
    EngineConfig,
    EngineUnavailable,
    Generate,
    Output,
    RequestRefused,
    SamplingParams,
    Status,
    Watermark,
)
from forebay_engine.wire import GuideKind, GuideSpec, frame

#: The engine's process, one step ahead of its model.
LATE = (sys.executable, str(Path(__file__).parents[1] / "fakes" / "late_process.py"))
#: Tokens of prompts that many share.
SHARED = [[5 + (7 * i + k) % 370 for i in range(60)] for k in range(4)]
#: Requests under way at a time.
CROWD = 24
#: Bytes by which the engine may have grown since a tenth of the requests were through: allocators
#: keep a little more now and then; 10,000 requests that leak 1 KiB each would be 10 MiB.
GROWTH = 8 << 20


def tokens(random: Random, least: int, most: int) -> list[int]:
    return [random.randrange(5, 380) for _ in range(random.randint(least, most))]


def sampling(random: Random, **asked: object) -> SamplingParams:
    plain: dict[str, object] = {"max_tokens": random.randint(1, 24), "temperature": 0.0}
    return SamplingParams(**{**plain, **asked})  # type: ignore[arg-type] # by keyword


def ask(prompt: list[int], params: SamplingParams, **asked: object) -> Generate:
    return Generate(prompts=[prompt], sampling=params, **asked)  # type: ignore[arg-type] # by keyword


def guided(random: Random) -> Generate:
    kind, source = random.choice(GUIDES)
    params = sampling(random, temperature=1.0, max_tokens=random.randint(3, 40))
    return ask(tokens(random, 1, 9), params, guide=GuideSpec(kind, source), seed=5)


def marked(random: Random) -> Generate:
    params = sampling(random, temperature=1.0)
    return ask(
        random.choice(SHARED), params, watermark=random.choice(MARKS), seed=random.choice((1, 2))
    )


#: Of each scheme and manner of seeding; True: the usual one.
MARKS: list[Watermark | bool] = [
    True,
    Watermark(seeding="lefthash", context=1),
    Watermark(scheme="gumbel"),
]

GUIDES: list[tuple[GuideKind, str]] = [
    ("regex", "[a-z]{2,8}( [0-9]+)*"),
    ("choice", '["water", "wheel", "shaft"]'),
    ("json", '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'),
]

#: Share of the requests, and how one of the kind is made.
MIX: dict[str, tuple[int, Callable[[Random], Generate]]] = {
    "short": (6, lambda r: ask(tokens(r, 1, 12), sampling(r))),
    "long": (2, lambda r: ask(tokens(r, 100, 180), sampling(r))),
    "long answer": (
        2,
        lambda r: ask(tokens(r, 1, 30), sampling(r, max_tokens=r.randint(40, 80), ignore_eos=True)),
    ),
    "shared prefix": (6, lambda r: ask([*r.choice(SHARED), *tokens(r, 1, 9)], sampling(r))),
    "asked before": (
        6,
        lambda r: ask(
            r.choice(SHARED)[: r.choice((9, 60))], sampling(r, max_tokens=r.choice((4, 16)))
        ),
    ),
    "choices": (
        3,
        lambda r: ask(tokens(r, 5, 60), sampling(r, temperature=1.0), n=r.randint(2, 4), seed=7),
    ),
    "seeded": (2, lambda r: ask(SHARED[0], sampling(r, temperature=0.8, top_p=0.9), seed=3)),
    "random": (2, lambda r: ask(tokens(r, 1, 9), sampling(r, temperature=1.3, top_k=40))),
    "likely enough": (1, lambda r: ask(tokens(r, 1, 9), sampling(r, temperature=1.0, min_p=0.05))),
    "typical": (1, lambda r: ask(SHARED[1], sampling(r, temperature=1.0, typical_p=0.7), seed=4)),
    "biased": (
        1,
        lambda r: ask(
            tokens(r, 1, 9), sampling(r, logit_bias={r.randrange(5, 380): 4.0, 9: -100.0})
        ),
    ),
    "allowed": (
        1,
        lambda r: ask(tokens(r, 1, 9), sampling(r, allowed_token_ids=tuple(range(20, 40)))),
    ),
    "watermark": (2, marked),
    "penalties": (1, lambda r: ask(tokens(r, 1, 9), sampling(r, repetition_penalty=1.2))),
    "prompt logprobs": (1, lambda r: ask(r.choice(SHARED), sampling(r, prompt_logprobs=2))),
    "scored": (1, lambda r: ask(tokens(r, 1, 60), sampling(r, max_tokens=0, prompt_logprobs=0))),
    "logprobs": (1, lambda r: ask(tokens(r, 1, 9), sampling(r, logprobs=5))),
    "stop string": (2, lambda r: ask(tokens(r, 1, 9), sampling(r, stop=("e", "th", "zz")))),
    "stop token": (
        1,
        lambda r: ask(tokens(r, 1, 9), sampling(r, stop_token_ids=tuple(range(5, 60)))),
    ),
    "urgent": (2, lambda r: ask(tokens(r, 1, 30), sampling(r), priority=-r.randint(1, 9))),
    "patient": (2, lambda r: ask(tokens(r, 1, 30), sampling(r), priority=r.randint(1, 9))),
    "in a hurry": (2, lambda r: ask(tokens(r, 1, 60), sampling(r), timeout=r.random() / 20)),
    "too long": (1, lambda r: ask(tokens(r, 240, 260), sampling(r))),
    "two prompts": (
        1,
        lambda r: Generate(prompts=[r.choice(SHARED), tokens(r, 1, 9)], sampling=sampling(r)),
    ),
    "guided": (2, guided),
    "bad words": (1, lambda r: ask(tokens(r, 1, 9), sampling(r), bad_words=["the", [7, 8]])),
}
#: How many events a client takes before it goes; None: all.
PATIENCE = [None] * 5 + [0, 1, 2, 3, 8]


@dataclass
class Soak:
    """The clients of one engine, and what became of them."""

    client: EngineClient
    random: Random
    ends: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    #: By what was asked, where the answer follows from that.
    answers: dict[bytes, list[list[int]]] = field(default_factory=dict)
    repeated: int = 0

    async def run(self, count: int) -> None:
        left = iter(range(count))

        async def crowd() -> None:
            for _ in left:
                await self.visit()

        await asyncio.gather(*(crowd() for _ in range(CROWD)))

    async def visit(self) -> None:
        # Each kind once: of 120 requests chance alone would now and then leave one out.
        missing = [kind for kind in MIX if kind not in self.kinds]
        shares = [share for share, _ in MIX.values()]
        kind = missing[0] if missing else self.random.choices(list(MIX), shares)[0]
        self.kinds[kind] += 1
        request = MIX[kind][1](self.random)
        manner = self.random.random()
        if manner < 0.03:
            self.ends["lost connection"] += 1
            await self.vanish(request)
        elif manner < 0.10:
            self.ends["cancelled"] += 1
            await self.cancel(request)
        else:
            self.ends[await self.read(request)] += 1

    async def read(self, request: Generate) -> str:
        """Take the answer, or its beginning."""
        takes = self.random.choice(PATIENCE)
        found: list[list[int]] = [[] for _ in range(request.n * len(request.prompts))]
        events = self.client.generate(request)
        try:
            async for event in events:
                if isinstance(event, Output):
                    found[event.index] += event.token_ids
                if isinstance(event, Done):
                    self.compare(request, found)
                    return "answered"
                if takes is not None:
                    takes -= 1
                    if takes < 0:
                        return "left"
        except RequestRefused as refusal:
            if refusal.param not in ("prompt", "max_tokens"):
                raise  # only what is too long may be
            return "refused"
        except DeadlinePassed:
            return "out of time"
        finally:
            await events.aclose()
        raise AssertionError("an answer ended without an end")

    def compare(self, request: Generate, found: list[list[int]]) -> None:
        """The same request has the same answer, whatever ran beside it, however it was cut."""
        if request.sampling.temperature and request.seed is None:
            return
        asked = msgspec.structs.replace(request, priority=0, timeout=None)
        before = self.answers.setdefault(msgspec.msgpack.encode(asked), found)
        self.repeated += before is not found
        assert before == found, request

    async def cancel(self, request: Generate) -> None:
        """Drop the task that reads, at any time from before the request was sent."""
        reading = asyncio.create_task(self.read(request))
        await asyncio.wait([reading], timeout=self.random.random() / 20)
        reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading

    async def vanish(self, request: Generate) -> None:
        """Ask for several over a connection of their own, and go without a word."""
        reader, writer = await asyncio.open_unix_connection(socket_of(self.client))
        for id in range(1, self.random.randint(2, 5)):
            writer.write(frame(msgspec.structs.replace(request, id=id)))
        if self.random.random() < 0.7:
            await reader.read(1)
            await asyncio.sleep(self.random.random() / 50)
        writer.transport.abort()


def socket_of(client: EngineClient) -> str:
    """From the command line of the engine's process."""
    arguments = Path(f"/proc/{client.pid}/cmdline").read_text().split("\0")
    return arguments[arguments.index("--socket") + 1]


def resident(pid: int | None) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def handles(pid: int | str | None) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def quiet(client: EngineClient) -> Status:
    """The engine's state once nobody is there and what was left has been noticed."""
    while True:
        with suppress(EngineUnavailable):
            status = await client.status()
            if status.state == "ready" and not (
                status.running or status.waiting or status.gauges["open_requests"]
            ):
                return status
        await asyncio.sleep(0.02)


async def soak(folder: Path, count: int, mode: str) -> dict[str, object]:
    """Run, check that all is as it was, and tell the figures.

    :param mode: of speculation; or ``ahead``.
    """
    key = folder / "watermark.key"
    key.write_text("known to the soak alone")
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        watermark_key_file=str(key),
        block_size=8,
        num_blocks=40,
        max_model_len=256,
        max_step_tokens=96,
        max_sequences=16,
        threads=1,
        speculation="none" if mode == "ahead" else mode,
    )
    client = EngineClient(config, command=LATE if mode == "ahead" else ENGINE_COMMAND)
    await client.start()
    try:
        await quiet(client)
        run = Soak(client, Random(count))
        begin = time.monotonic()
        # What a first request of each kind sets up belongs to the start.
        await run.run(count // 10)
        start, pid = await quiet(client), client.pid
        memory, files, own_files = resident(pid), handles(pid), handles("self")
        await run.run(count * 45 // 100)
        await quiet(client)
        half = resident(pid)
        await run.run(count - count // 10 - count * 45 // 100)
        seconds = time.monotonic() - begin
        # Longer than the engine waits before it compares its books; if they disagree, it ends.
        await asyncio.sleep(1.2)
        end = await quiet(client)
        assert client.pid == pid
        assert end.kv_usage == 0
        assert (handles(pid), handles("self")) == (files, own_files)
        assert end.gauges["tasks"] <= start.gauges["tasks"]
        growth = resident(pid) - memory
        counters = end.counters
        over = [counters[name] for name in ("finished", "aborted", "expired", "failed")]
        assert counters["failed"] == 0
        # Some are dropped before they are let in, nobody is counted twice.
        assert counters["admitted"] <= sum(over)
        # Of a few only chance brings the same question twice, with patience for the whole answer.
        assert run.repeated > 0 or count < 1000
        assert sum(run.ends.values()) == count
        assert run.kinds.keys() == MIX.keys()
        return {
            "requests": dict(run.ends),
            "sequences": dict(zip(("finished", "aborted", "expired", "failed"), over, strict=True)),
            "requests/s": round(count / seconds, 1),
            "answers compared": run.repeated,
            "counters": counters,
            "resident MiB": [round(n / (1 << 20), 1) for n in (memory, half, memory + growth)],
            "growth": growth,
            "open files": files,
            "tasks": end.gauges["tasks"],
        }
    finally:
        await client.aclose()


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("mode", "count"), [("ngram", 200), ("ahead", 120)])
async def test_a_mixed_crowd_leaves_nothing_behind(
    tiny_checkpoint: Callable[[str], Path], mode: str, count: int
) -> None:
    figures = await soak(tiny_checkpoint("gemma3"), count, mode)
    assert figures["growth"] <= 4 * GROWTH  # type: ignore[operator] # a number


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", ["none", "ngram", "ahead"])
async def test_ten_thousand_leave_nothing_behind(
    tiny_checkpoint: Callable[[str], Path], mode: str
) -> None:
    figures = await soak(tiny_checkpoint("gemma3"), 10_000, mode)
    for name, figure in figures.items():
        print(f"{name}: {figure}")
    assert figures["growth"] <= GROWTH  # type: ignore[operator] # a number
