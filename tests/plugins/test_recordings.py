"""Recorded streams, cut by the network in every way it can: the same events, or an error.

tests/recordings/record.py made the recordings, of the servers that they name: llama.cpp, vLLM and
Triton are real, the others are the fakes in tests/fakes/fake_servers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from forebay.api import (
    Attempt,
    BackendError,
    BackendGarbage,
    Delta,
    Event,
    Finished,
    Relayed,
    StreamTruncated,
)
from forebay.testing import replay

FOLDER = Path(__file__).parents[1] / "recordings"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
#: One of each server.
KINDS = sorted({name.split("-")[0]: name for name in reversed(NAMES)}.values())
#: Streams with no other end than that of the response, as far as these servers say.
ENDLESS = {"triton-ensemble", "triton-vllm_model"}
#: More than any event needs, and far less than a server that has gone mad can send.
MOST_READ = 8 << 20

#: Those that speak HTTP; what the others say has no wire of its own that could be cut here.
SERVERS = {
    "anthropic",
    "llamacpp",
    "ollama",
    "openai",
    "sglang",
    "tgi",
    "triton",
    "trtllm",
    "vllm",
}

Pieces = Callable[[bytes], Iterable[bytes]]


class Outcome(NamedTuple):
    """What a client gets to see, however it was cut."""

    relayed: bytes
    deltas: list[Delta]
    end: Finished | None
    error: BackendError | None

    @property
    def finish_reasons(self) -> tuple[str, ...]:
        if self.end is not None and self.end.finish_reasons:
            return self.end.finish_reasons
        reasons = {d.index: d.finish_reason for d in self.deltas if d.finish_reason is not None}
        return tuple(reasons[index] for index in sorted(reasons))


class Tape:
    """A recording that can be played to its adapter as often as need be."""

    def __init__(self, name: str, typed: bool, recordings: ModuleType) -> None:
        self.recording = recordings.load(FOLDER / f"{name}.json")
        self.request = replace(self.recording.request(), typed=typed)
        self.answer = self.recording.answers[-1]
        self.body: bytes = self.answer.body

    async def play(
        self, pieces: Pieces = lambda body: [body], body: bytes | None = None, cut: bool = False
    ) -> Outcome:
        """``body`` instead of the recorded one; with ``cut`` the connection breaks behind it."""
        answer = self.answer if body is None else replace(self.answer, body=body)
        answers = [*self.recording.answers[:-1], answer]
        adapter = self.recording.build(replay(answers, pieces, cut=cut))
        await adapter.start()
        events: list[Event] = []
        error = None
        try:
            async for event in adapter.stream(self.request, Attempt()):
                events.append(event)
        except BackendError as failure:
            error = failure
        await adapter.aclose()
        deltas = [event for event in events if isinstance(event, Delta)]
        relayed = b"".join(event.data for event in events if isinstance(event, Relayed))
        end = events[-1] if events and isinstance(events[-1], Finished) else None
        assert (end is None) == (error is not None)
        return Outcome(relayed, deltas, end, error)

    def frames(self) -> list[bytes]:
        """The events or lines of which the body is made."""
        end = b"\n\n" if b"\n\n" in self.body else b"\n"
        return [part + end for part in self.body.split(end) if part]


@pytest.fixture(scope="module")
def recordings(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    return load_module(FOLDER / "record.py")


@pytest.fixture(params=[False, True], ids=["relayed", "typed"])
def typed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def tape(name: str, typed: bool, recordings: ModuleType) -> Tape:
    return Tape(name, typed, recordings)


every_recording = pytest.mark.parametrize("name", NAMES)
every_server = pytest.mark.parametrize("name", KINDS)


@every_recording
async def test_a_cut_at_any_byte_changes_nothing(tape: Tape, name: str, typed: bool) -> None:
    whole = await tape.play()
    assert whole.error is None
    assert whole.relayed or whole.deltas
    # The typed lane reads what the relay lane has put together: one of each server will do.
    step = 1 if name in KINDS or not typed else 7
    for cut in range(1, len(tape.body), step):
        assert await tape.play(lambda body, cut=cut: (body[:cut], body[cut:])) == whole, cut


@every_recording
async def test_byte_by_byte(tape: Tape) -> None:
    by_bytes = await tape.play(lambda body: (body[i : i + 1] for i in range(len(body))))
    assert by_bytes == await tape.play()


@every_server
@pytest.mark.parametrize("broken", [False, True], ids=["ended", "broken"])
async def test_what_ends_early_is_no_success(tape: Tape, name: str, broken: bool) -> None:
    """What came is right as far as it goes, and only an answer whose every choice ended is one."""
    if name == "triton-ensemble" and not broken:  # its model never says why it ends
        assert isinstance((await tape.play(body=b"")).error, StreamTruncated)
        return
    whole = await tape.play()
    for length in range(len(tape.body)):
        early = await tape.play(body=tape.body[:length], cut=broken)
        assert whole.relayed.startswith(_without_usage(early.relayed)), length
        assert whole.deltas[: len(early.deltas)] == early.deltas, length
        if early.error is None:
            assert early.finish_reasons == whole.finish_reasons, length


def _without_usage(relayed: bytes) -> bytes:
    """Without the last chunk, which says only what of the usage had come."""
    events = relayed.split(b"\n\n")[:-1]
    return b"".join(event + b"\n\n" for event in events if b'"choices":[],' not in event)


@every_server
@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_damaged_bytes_end_in_one_of_our_errors_or_do_no_harm(
    tape: Tape, data: st.DataObject
) -> None:
    """No other exception than :class:`BackendError`: :meth:`Tape.play` lets nothing else pass."""
    at = data.draw(st.integers(0, len(tape.body)))
    lost = data.draw(st.integers(0, 8))
    put = data.draw(st.binary(max_size=8) | st.sampled_from([b"\n\n", b"null", b"data: {}\n\n"]))
    await tape.play(body=tape.body[:at] + put + tape.body[at + lost :])


@every_server
@pytest.mark.parametrize("kept", [0, 2])
@pytest.mark.parametrize("filler", [b"x", b'"', b"\\", b"data: ", b" "])
async def test_an_endless_line_is_left_before_it_fills_the_memory(
    tape: Tape, kept: int, filler: bytes
) -> None:
    read = 0

    def pieces(_: bytes) -> Iterator[bytes]:
        nonlocal read
        yield b"".join(tape.frames()[:kept]) + tape.frames()[kept][:40]
        block = filler * ((64 << 10) // len(filler))
        while read < 64 << 20:
            read += len(block)
            yield block

    outcome = await tape.play(pieces)
    assert isinstance(outcome.error, BackendGarbage)
    assert read <= MOST_READ


@every_server
async def test_an_event_of_half_an_object_is_garbage(tape: Tape) -> None:
    frames = tape.frames()
    half = frames[1][: len(frames[1]) // 2].rstrip(b"\n") + frames[1][-2:]
    outcome = await tape.play(body=frames[0] + half + b"".join(frames[2:]))
    assert isinstance(outcome.error, BackendGarbage)


@every_recording
async def test_nothing_after_the_end_counts(tape: Tape, name: str) -> None:
    if name in ENDLESS:
        return
    whole = await tape.play()
    for more in (b"garbage", tape.body, tape.frames()[1] * 3, b"data: {\n\n"):
        assert await tape.play(body=tape.body + more) == whole


@every_recording
async def test_usage_that_comes_twice_counts_once(tape: Tape, name: str) -> None:
    if name == "llamacpp-choices-usage":
        pytest.skip("this server says it once for each choice")
    whole = await tape.play()
    frames = tape.frames()
    twice = [frame * (1 + (b'"usage":{' in frame)) for frame in frames]
    again = await tape.play(body=b"".join(twice))
    assert again == whole


def test_there_is_a_recording_of_each_kind() -> None:
    assert {name.split("-")[0] for name in NAMES} == SERVERS


def test_load_is_the_inverse_of_save(recordings: Any, tmp_path: Path) -> None:
    recording = recordings.load(FOLDER / f"{NAMES[0]}.json")
    recordings.save(recording, tmp_path / "again.json")
    assert recordings.load(tmp_path / "again.json") == recording
