"""Client and process together: a real process and a real socket, only the model is missing."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from forebay_engine.client import (
    Accepted,
    Detokenize,
    Done,
    EngineClient,
    EngineConfig,
    EngineDied,
    EngineUnavailable,
    Generate,
    Output,
    RequestRefused,
    SamplingParams,
    Status,
    Tokenize,
)
from forebay_engine.errors import EngineError
from forebay_engine.wire import FrameReader, frame

FAKES = Path(__file__).parents[1] / "fakes"
MODEL = FAKES / "engine_model"
COMMAND = (sys.executable, str(FAKES / "engine_process.py"))


@asynccontextmanager
async def engine(mode: str = "", model: Path = MODEL) -> AsyncIterator[EngineClient]:
    config = EngineConfig(model=str(model), block_size=4)
    client = EngineClient(config, environment={"FAKE_ENGINE": mode}, command=COMMAND)
    await client.start()
    try:
        yield client
    finally:
        await client.aclose()


async def until(true: Callable[[Status], bool], client: EngineClient) -> Status:
    """Ask until it is true, through times without an engine."""
    while True:
        try:
            status = await client.status()
        except (EngineUnavailable, EngineDied):
            pass
        else:
            if true(status):
                return status
        await asyncio.sleep(0.01)


async def ready(client: EngineClient) -> Status:
    return await until(lambda status: status.state == "ready", client)


def request(prompt: str = "Hello", max_tokens: int = 5, n: int = 1) -> Generate:
    return Generate(prompts=[prompt], n=n, sampling=SamplingParams(max_tokens=max_tokens))


async def text_of(client: EngineClient, command: Generate) -> str:
    events = [event async for event in client.generate(command)]
    assert isinstance(events[0], Accepted)
    assert isinstance(events[-1], Done)
    return "".join(event.text for event in events if isinstance(event, Output))


async def anext_forever(events: AsyncIterator[object]) -> None:
    async for _ in events:
        pass


async def verdict(client: EngineClient) -> str:
    """Why there will be no engine, once the client has given up."""
    while True:
        try:
            await client.status()
        except EngineDied:
            pass
        except EngineUnavailable as error:
            if "can't start" in error.message:
                return error.message
        await asyncio.sleep(0.01)


async def test_it_serves_refuses_and_counts() -> None:
    async with engine() as client:
        status = await ready(client)
        assert (status.max_model_len, status.max_sequences) == (256, 64)
        # <bos> is echoed too, and shows no text.
        assert await text_of(client, request("Grüße", 8)) == "Grüße"
        texts = await asyncio.gather(
            *(text_of(client, request(f"number {i}", 9)) for i in range(20))
        )
        assert texts == [f"number {i}"[:8] for i in range(20)]
        with pytest.raises(RequestRefused, match="context holds 256 tokens") as refusal:
            await text_of(client, request("Hello", 1000))
        assert refusal.value.param == "max_tokens"
        status = await client.status()
        assert (status.running, status.waiting, status.kv_usage) == (0, 0, 0.0)
        assert status.counters["finished"] == 21


async def test_it_tokenizes_and_turns_tokens_back() -> None:
    async with engine() as client:
        await ready(client)
        found = await client.tokenize(Tokenize(text="Grüße", texts=True))
        bare = await client.tokenize(Tokenize(text="Grüße", special=False))
        assert found.max_model_len == 256
        assert found.texts is not None
        assert [len(found.texts), found.texts[:3]] == [len(found.token_ids), ["<bos>", "G", "r"]]
        assert (bare.token_ids, bare.texts) == (found.token_ids[1:], None)
        assert (await client.detokenize(Detokenize(token_ids=found.token_ids))).text == "<bos>Grüße"
        hello = [{"role": "user", "content": "Hi"}]
        chat = await client.tokenize(Tokenize(messages=hello, special=False))
        text = (await client.detokenize(Detokenize(token_ids=chat.token_ids))).text
        assert text == ("<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>assistant\n")
        with pytest.raises(RequestRefused, match="vocabulary of 261") as refusal:
            await client.detokenize(Detokenize(token_ids=[5, 261]))
        assert refusal.value.param == "tokens"
        with pytest.raises(RequestRefused, match="no messages"):
            await client.tokenize(Tokenize(messages=[]))
        # Nothing of it is left open.
        assert await text_of(client, request()) == "Hell"


async def test_a_question_whose_asker_left_disturbs_nobody() -> None:
    async with engine() as client:
        await ready(client)
        long = asyncio.create_task(client.tokenize(Tokenize(text="Hello " * 50_000)))
        await asyncio.sleep(0)
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        assert (await client.detokenize(Detokenize(token_ids=[72, 73]))).text
        assert await text_of(client, request()) == "Hell"


@pytest.mark.parametrize("how", ["close", "cancel"])
async def test_leaving_frees_the_sequences_at_once(how: str) -> None:
    async with engine("slow") as client:
        await ready(client)
        events = client.generate(request(max_tokens=200, n=3))
        for _ in range(5):
            await anext(events)
        assert (await client.status()).running == 3
        if how == "close":
            await events.aclose()
        else:
            task = asyncio.create_task(anext_forever(events))
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        # At the latest with the step that was running, of 20 ms.
        status = await until(lambda status: status.kv_usage == 0.0, client)
        assert status.running == 0
        assert status.counters["aborted"] == 3


async def test_a_lost_connection_aborts_what_it_had_started() -> None:
    async with engine("slow") as client:
        await ready(client)
        (socket,) = Path(f"/proc/{client.pid}/cmdline").read_bytes().split(b"\0")[3:4]
        reader, writer = await asyncio.open_unix_connection(socket.decode())
        writer.write(frame(request(max_tokens=200)))
        await reader.readexactly(4)
        await until(lambda status: status.running == 1, client)
        writer.close()
        await until(lambda status: status.running == 0 and status.kv_usage == 0.0, client)


async def test_a_connection_that_breaks_the_protocol_is_closed_alone() -> None:
    async with engine() as client:
        await ready(client)
        (socket,) = Path(f"/proc/{client.pid}/cmdline").read_bytes().split(b"\0")[3:4]
        for garbage in (b"\0\0\0\1\xc1", b"\xff\xff\xff\xff"):
            reader, writer = await asyncio.open_unix_connection(socket.decode())
            writer.write(garbage)
            assert await reader.read() == b""
            writer.close()
        assert await text_of(client, request()) == "Hell"


async def test_death_ends_what_is_open_and_the_engine_comes_back() -> None:
    async with engine("slow") as client:
        await ready(client)
        first = client.pid
        assert first is not None
        events = client.generate(request(max_tokens=200))
        for _ in range(3):
            await anext(events)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(EngineDied):
            async for _ in events:
                pass
        with pytest.raises(EngineUnavailable) as gone:
            await client.detokenize(Detokenize(token_ids=[1]))
        assert not gone.value.loading
        await ready(client)
        assert client.pid != first
        assert await text_of(client, request()) == "Hell"


async def test_an_engine_in_which_nothing_works_starts_anew() -> None:
    async with engine("fails") as client:
        await ready(client)
        first = client.pid
        for _ in range(2):
            with pytest.raises(EngineError, match="could not compute this: nothing works") as told:
                await text_of(client, request())
            assert not isinstance(told.value, EngineDied)
            assert client.pid == first
        # The third time it is none of the request's fault any more.
        with pytest.raises(EngineError):
            await text_of(client, request())
        await until(lambda status: status.state == "ready" and client.pid != first, client)


async def test_while_it_loads_it_says_so() -> None:
    async with engine("loading") as client:
        with pytest.raises(EngineUnavailable) as starting:
            await client.status()
        assert starting.value.loading
        await until(lambda status: status.state == "loading", client)
        with pytest.raises(EngineUnavailable, match="loaded") as loading:
            await text_of(client, request())
        assert loading.value.loading
        with pytest.raises(EngineUnavailable, match="loaded"):
            await client.tokenize(Tokenize(text="Hello"))


async def test_a_start_that_cannot_succeed_is_not_tried_again(tmp_path: Path) -> None:
    async with engine(model=tmp_path) as client:
        assert "there is no config.json in it" in await verdict(client)


async def test_the_log_of_the_process_goes_on_with_its_levels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="forebay_engine"):
        async with engine(model=tmp_path) as client:
            await verdict(client)
    found = {(record.levelname, record.getMessage()) for record in caplog.records}
    assert ("INFO", f"loading {tmp_path}") in found
    reason = f"{tmp_path} is no model folder: there is no config.json in it, nor a GGUF"
    assert ("ERROR", reason) in found


async def test_a_command_that_is_none_is_not_tried_again() -> None:
    client = EngineClient(EngineConfig(model=str(MODEL)), command=["/no/such/program"])
    await client.start()
    assert "/no/such/program" in await verdict(client)
    await client.aclose()


async def test_before_the_start_and_after_the_end_there_is_no_engine() -> None:
    client = EngineClient(EngineConfig(model=str(MODEL)), command=COMMAND)
    with pytest.raises(EngineUnavailable, match="not been started"):
        await client.status()
    await client.aclose()
    async with engine() as client:
        await ready(client)
        pid = client.pid
        assert pid is not None
    with pytest.raises(EngineUnavailable, match="stopped"):
        await text_of(client, request())
    assert not alive(pid)


async def test_a_slow_reader_holds_nobody_up() -> None:
    async with engine() as client:
        await ready(client)
        async with aclosing(client.generate(request(max_tokens=200))) as slow:
            await anext(slow)
            assert await text_of(client, request()) == "Hell"
            rest = [event async for event in slow]
        assert isinstance(rest[-1], Done)
        assert rest[-1].completion_tokens == 200


def alive(pid: int) -> bool:
    """A zombie waits for its parent and is not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not alive(pid)


def start(socket: Path, *options: str, session: bool = False) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [*COMMAND, "--socket", str(socket), "--model", str(MODEL), *options],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=session,
    )
    deadline = time.monotonic() + 20
    while not socket.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_the_process_ends_on_sigterm_and_cleans_up(tmp_path: Path) -> None:
    process = start(tmp_path / "s")
    with process:
        process.terminate()
        assert process.wait(10) == 0
    assert not (tmp_path / "s").exists()


def test_the_process_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import asyncio, sys\n"
        "from forebay_engine.client import EngineClient, EngineConfig\n"
        "async def main():\n"
        "    client = EngineClient(EngineConfig(model=sys.argv[1]), command=sys.argv[2:])\n"
        "    await client.start()\n"
        "    while client.pid is None: await asyncio.sleep(0.01)\n"
        "    print(client.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(MODEL), *COMMAND], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    socket = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[3].decode()
    assert Path(socket).exists()
    # Without a chance to say goodbye.
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone_within(pid, 10)
    assert not Path(socket).parent.exists()


def test_the_process_stands_back_behind_the_gateway(tmp_path: Path) -> None:
    process = start(tmp_path / "s", "--watch-stdin", session=True)
    with process:
        stat = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        assert int(stat[16]) >= 5
        group = Path(f"/proc/{process.pid}/autogroup")
        if group.exists():  # as the kernel is configured
            assert group.read_text().split()[-2:] == ["nice", "5"]
        # Leaving the block closes its standard input, which ends it.
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0


def test_frames_survive_any_cut() -> None:
    messages = [request("x" * size) for size in (0, 1, 300)]
    data = b"".join(frame(message) for message in messages)
    reader = FrameReader()
    bodies = [body for i in range(len(data)) for body in reader.feed(data[i : i + 1])]
    assert bodies == FrameReader().feed(data)
    assert len(bodies) == 3
    with pytest.raises(EngineError, match="exceeds"):
        FrameReader().feed(b"\xff\xff\xff\xff")
