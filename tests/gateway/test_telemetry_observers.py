from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, MutableMapping

import pytest
import structlog

from forebay.api import Decision, Identity, Observer
from forebay.telemetry import observers as module
from forebay.telemetry.observers import Observers

DECISION = Decision(
    request_id="r",
    time=1.0,
    endpoint="chat",
    model="m",
    identity=Identity(),
    policy="p",
    policy_version="1",
    seed=0,
    candidates=(),
    order=(),
)


@pytest.fixture(autouse=True)
def log() -> Iterator[list[MutableMapping[str, object]]]:
    with structlog.testing.capture_logs() as entries:
        yield entries


class Diary(Observer):
    """Writes down what it is told."""

    __hash__ = None  # type: ignore[assignment]  # a plugin's observer may well be unhashable

    def __init__(self) -> None:
        self.entries: list[object] = []

    async def started(self, decision: Decision) -> None:
        self.entries.append("started")

    async def first_token(self, decision: Decision, seconds: float) -> None:
        await asyncio.sleep(0)
        self.entries.append(seconds)

    async def finished(self, decision: Decision) -> None:
        self.entries.append("finished")

    async def aclose(self) -> None:
        self.entries.append("closed")


class Broken(Diary):
    """Raises as long as it is told to."""

    def __init__(self, raises: Callable[[int], bool]) -> None:
        super().__init__()
        self.calls = 0
        self._raises = raises

    async def finished(self, decision: Decision) -> None:
        self.calls += 1
        if self._raises(self.calls):
            raise RuntimeError("boom")

    async def aclose(self) -> None:
        raise RuntimeError("boom")


async def test_all_are_told_in_order_and_then_closed() -> None:
    one, two = Diary(), Diary()
    observers = Observers([one, two])
    observers.started(DECISION)
    observers.first_token(DECISION, 0.25)
    observers.finished(DECISION)
    assert one.entries == []  # nothing runs on the caller's back
    await observers.aclose()
    assert one.entries == two.entries == ["started", 0.25, "finished", "closed"]
    observers.started(DECISION)
    await observers.aclose()
    await asyncio.sleep(0)
    assert one.entries[-1] == "closed"


async def test_closing_delivers_what_came_after_a_pause() -> None:
    diary = Diary()
    observers = Observers([diary])
    observers.started(DECISION)
    while not diary.entries:
        await asyncio.sleep(0)
    for _ in range(5):
        await asyncio.sleep(0)
    observers.finished(DECISION)
    await observers.aclose()
    assert diary.entries == ["started", "finished", "closed"]


async def test_one_that_always_raises_is_detached_after_ten_and_harms_nobody(
    log: list[MutableMapping[str, object]],
) -> None:
    broken, diary = Broken(lambda call: True), Diary()
    observers = Observers([broken, diary])
    for _ in range(25):
        observers.finished(DECISION)
    await observers.aclose()
    assert broken.calls == 10
    assert diary.entries == ["finished"] * 25 + ["closed"]
    assert observers.failures() == {"Broken": 10}
    detached = {"event": "observer detached", "observer": "Broken", "log_level": "error"}
    assert sum(entry.items() >= detached.items() for entry in log) == 1


async def test_one_that_raises_now_and_then_stays() -> None:
    broken = Broken(lambda call: call % 10 != 0)
    observers = Observers([broken])
    for _ in range(40):
        observers.finished(DECISION)
    await observers.aclose()
    assert broken.calls == 40
    assert observers.failures() == {"Broken": 36}


async def test_a_full_queue_drops_the_newest_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUEUE", 3)
    diary = Diary()
    observers = Observers([diary])
    observers.started(DECISION)
    observers.first_token(DECISION, 0.5)
    for _ in range(5):
        observers.finished(DECISION)
    await observers.aclose()
    assert diary.entries == ["started", 0.5, "finished", "closed"]
    assert observers.dropped() == {"finished": 4}


async def test_one_that_hangs_holds_up_neither_callers_nor_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CLOSE_TIMEOUT", 0.05)

    class Hanging(Observer):
        async def started(self, decision: Decision) -> None:
            await asyncio.Event().wait()

        async def aclose(self) -> None:
            await asyncio.Event().wait()

    observers = Observers([Hanging()])
    observers.started(DECISION)
    await asyncio.sleep(0)
    observers.started(DECISION)
    await observers.aclose()


async def test_one_that_never_awaits_does_not_keep_the_loop_to_itself() -> None:
    observers = Observers([Diary()])
    for _ in range(100):
        observers.started(DECISION)
    turns = 0
    while observers._queue:
        await asyncio.sleep(0)
        turns += 1
    assert turns > 50
    await observers.aclose()


async def test_without_observers_nothing_is_queued_and_no_task_runs() -> None:
    tasks = asyncio.all_tasks()
    observers = Observers([])
    observers.started(DECISION)
    assert asyncio.all_tasks() == tasks
    await observers.aclose()


async def test_an_observer_that_is_cancelled_inside_does_not_silence_the_others() -> None:
    class Cancelled(Diary):
        async def started(self, decision: Decision) -> None:
            raise asyncio.CancelledError

    diary = Diary()
    observers = Observers([Cancelled(), diary])
    observers.started(DECISION)
    for _ in range(5):
        await asyncio.sleep(0)
    observers.finished(DECISION)
    await observers.aclose()
    assert "finished" in diary.entries
