"""The engine as its users see it: starts the process, restarts it when it dies, and talks to it.

Imports no torch; everything here runs on the caller's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import TypeVar

import msgspec

from forebay_engine.config import EngineConfig
from forebay_engine.errors import (
    DeadlinePassed,
    EngineDied,
    EngineError,
    EngineUnavailable,
    RequestRefused,
)
from forebay_engine.sequence import FinishReason, SamplingParams
from forebay_engine.watermark import Watermark
from forebay_engine.wire import (
    EXIT_REFUSED,
    Abort,
    Accepted,
    Command,
    Detokenize,
    Detokenized,
    Distribution,
    Done,
    Embed,
    Embedded,
    Event,
    Failed,
    FrameReader,
    Generate,
    GetStatus,
    GuideSpec,
    Output,
    Prompt,
    Status,
    Tokenize,
    Tokenized,
    frame,
)

__all__ = [
    "ENGINE_COMMAND",
    "Accepted",
    "DeadlinePassed",
    "Detokenize",
    "Detokenized",
    "Distribution",
    "Done",
    "Embed",
    "Embedded",
    "EngineClient",
    "EngineConfig",
    "EngineDied",
    "EngineError",
    "EngineUnavailable",
    "FinishReason",
    "Generate",
    "GuideSpec",
    "Output",
    "Prompt",
    "RequestRefused",
    "SamplingParams",
    "Status",
    "Tokenize",
    "Tokenized",
    "Watermark",
]

Question = GetStatus | Embed | Tokenize | Detokenize
Answer = TypeVar("Answer", Status, Embedded, Tokenized, Detokenized)

#: Starts the engine's process; its options are added.
ENGINE_COMMAND = (sys.executable, "-m", "forebay_engine.process")
#: Seconds before a restart: doubled each time, from the first again after a minute of service.
_BACKOFF = (0.5, 30.0)
_SETTLED = 60.0
#: Seconds between attempts to reach the socket of a process that has just been started.
_CONNECT_INTERVAL = 0.02
#: Seconds a process may take to end before it is killed.
_GRACE = 5.0
_READ_BYTES = 1 << 16
#: Bytes of the longest line the process may log.
_LONGEST_LINE = 1 << 20

log = logging.getLogger("forebay_engine")


class EngineClient:
    """One engine process and the connection to it."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        environment: Mapping[str, str] = {},
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self._config = config
        self._environment = dict(environment)
        self._command = list(command)
        self._supervisor: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._connection: _Connection | None = None
        self._last_words = ""
        self._state = EngineUnavailable("the engine has not been started")

    async def start(self) -> None:
        """Start the process; returns at once. ``status`` tells when the model is loaded."""
        if self._supervisor is None:
            self._state = EngineUnavailable("the engine is starting", loading=True)
            self._supervisor = asyncio.create_task(self._supervise())

    async def generate(self, request: Generate) -> AsyncGenerator[Accepted | Output | Done]:
        """Serve a request: ``Accepted Output* Done``.

        Closing the generator early, or cancelling its task, aborts the request in the engine. What
        a slow reader has not taken yet is kept here, at most ``max_tokens`` pieces a choice.

        :raises RequestRefused: the request is at fault.
        :raises DeadlinePassed: its ``timeout`` is over.
        :raises EngineUnavailable: the engine is not there, or still loading.
        :raises EngineDied: it went while the request was open.
        """
        connection = self._connected()
        request = msgspec.structs.replace(request, id=connection.new_id())
        ended = False
        try:
            events = connection.ask(request)
            while not ended:
                event = await _next(events)
                ended = isinstance(event, Done | Failed)
                if isinstance(event, Failed):
                    raise _error(event)
                if isinstance(event, Accepted | Output | Done):
                    yield event
        finally:
            connection.forget(request.id, abort=not ended)

    async def status(self) -> Status:
        """Ask for the engine's state and load.

        :raises EngineUnavailable: there is no engine to ask.
        :raises EngineDied: it went before it answered.
        """
        return await self._ask(GetStatus(0), Status)

    async def embed(self, command: Embed) -> Embedded:
        """Vectors of texts. Cancelling it drops the work.

        :raises RequestRefused: the model gives no embeddings, or an input is at fault.
        :raises EngineUnavailable: the engine is not there, or still loading.
        :raises EngineDied: it went before it answered.
        """
        return await self._ask(command, Embedded)

    async def tokenize(self, command: Tokenize) -> Tokenized:
        """Token ids of a text or of messages. Cancelling it drops the work where it waits.

        :raises RequestRefused: the chat template does not take the messages.
        :raises EngineUnavailable: the engine is not there, or still loading.
        :raises EngineDied: it went before it answered.
        """
        return await self._ask(command, Tokenized)

    async def detokenize(self, command: Detokenize) -> Detokenized:
        """The text of token ids.

        :raises RequestRefused: there are no such tokens.
        :raises EngineUnavailable: the engine is not there, or still loading.
        :raises EngineDied: it went before it answered.
        """
        return await self._ask(command, Detokenized)

    async def _ask(self, command: Question, kind: type[Answer]) -> Answer:
        """A question that one event answers."""
        connection = self._connected()
        command = msgspec.structs.replace(command, id=connection.new_id())
        answered = False
        try:
            event = await _next(connection.ask(command))
            answered = True
            if isinstance(event, Failed):
                raise _error(event)
            if not isinstance(event, kind):
                asked = type(command).__name__
                raise EngineError(f"the engine answered {type(event).__name__} to {asked}")
            return event
        finally:
            connection.forget(command.id, abort=not answered)

    @property
    def pid(self) -> int | None:
        """Of the process that is connected now."""
        return self._connection.pid if self._connection is not None else None

    async def aclose(self) -> None:
        """End the process. Calling it twice is fine."""
        # Not by cancelling: the process must be ended in every case.
        self._stop.set()
        if self._connection is not None:
            self._connection.close()
        if self._supervisor is not None:
            await self._supervisor
            self._state = EngineUnavailable("the engine has been stopped")

    def _connected(self) -> _Connection:
        if self._connection is None:
            raise EngineUnavailable(self._state.message, loading=self._state.loading)
        return self._connection

    async def _supervise(self) -> None:
        """Keep a process running until told to stop, or until it says that it can't start."""
        first, longest = _BACKOFF
        delay = first
        while not self._stop.is_set():
            begin = time.monotonic()
            # A directory of its own, for this user only; socket paths may have 107 bytes at most.
            try:
                with tempfile.TemporaryDirectory(prefix="forebay-") as folder:
                    status = await self._run(Path(folder) / "engine")
            except OSError as error:
                status, self._last_words = EXIT_REFUSED, str(error)
            if status == EXIT_REFUSED:
                self._state = EngineUnavailable(f"the engine can't start: {self._last_words}")
                return
            if time.monotonic() - begin > _SETTLED:
                delay = first
            if not self._stop.is_set():
                log.error("the engine ended with status %s, next start in %g s", status, delay)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), delay)
            delay = min(2 * delay, longest)

    async def _run(self, socket: Path) -> int:
        """One life of the process; its exit status."""
        process = await asyncio.create_subprocess_exec(
            *self._command,
            "--socket",
            str(socket),
            "--watch-stdin",
            *_arguments(self._config),
            stdin=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LONGEST_LINE,
            env={**os.environ, **self._environment},
            # Ctrl-C in a terminal is for the gateway, which ends its engine in order.
            start_new_session=True,
        )
        if process.stderr is None:
            raise EngineError("the process has no standard error")
        words = asyncio.create_task(self._listen(process.stderr))
        try:
            reader, writer = await self._connect(process, socket)
            self._connection = _Connection(writer, process.pid)
            await self._connection.read(reader)
        except ConnectionError as error:
            log.info("no connection to the engine: %s", error)
        except (EngineError, msgspec.DecodeError) as error:
            log.error("the engine does not keep to the protocol: %s", error)
        finally:
            self._state = EngineUnavailable("the engine died and is being restarted")
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            await _end(process)
            await words
        return process.returncode if process.returncode is not None else -1

    async def _connect(
        self, process: asyncio.subprocess.Process, socket: Path
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """:raises ConnectionError: the process ended before it listened, or is not wanted."""
        while process.returncode is None and not self._stop.is_set():
            try:
                return await asyncio.open_unix_connection(str(socket))
            except (FileNotFoundError, ConnectionRefusedError):
                await asyncio.sleep(_CONNECT_INTERVAL)
        raise ConnectionError("the process ended before it listened")

    async def _listen(self, stderr: asyncio.StreamReader) -> None:
        """Pass the process's log on: lines of ``LEVEL message``, and whatever else it writes."""
        levels = logging.getLevelNamesMapping()
        async for line in stderr:
            text = line.decode(errors="replace").rstrip()
            level, _, message = text.partition(" ")
            self._last_words = message if level in levels else text
            log.log(levels.get(level, logging.WARNING), "%s", self._last_words)


class _Connection:
    """A connected socket, and who waits for what on it."""

    def __init__(self, writer: asyncio.StreamWriter, pid: int) -> None:
        self.pid = pid
        self._writer = writer
        self._waiting: dict[int, asyncio.Queue[Event | None]] = {}
        self._ids = count(1)

    def new_id(self) -> int:
        return next(self._ids)

    def ask(self, command: Command) -> asyncio.Queue[Event | None]:
        """Send a command; where its events will come, None for a connection that closed."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._waiting[command.id] = queue
        self._writer.write(frame(command))
        return queue

    def forget(self, id: int, *, abort: bool) -> None:
        if self._waiting.pop(id, None) is not None and abort and not self._writer.is_closing():
            self._writer.write(frame(Abort(id)))

    async def read(self, reader: asyncio.StreamReader) -> None:
        """Hand out events until the connection closes."""
        frames = FrameReader()
        decoder = msgspec.msgpack.Decoder(Event)
        with suppress(ConnectionError):
            while data := await reader.read(_READ_BYTES):
                for body in frames.feed(data):
                    event = decoder.decode(body)
                    queue = self._waiting.get(event.id)
                    if queue is not None:
                        queue.put_nowait(event)

    def close(self) -> None:
        """Tell all who wait that nothing more will come."""
        self._writer.close()
        for queue in self._waiting.values():
            queue.put_nowait(None)


def _arguments(config: EngineConfig) -> list[str]:
    """The command line of :mod:`forebay_engine.process` for this configuration."""
    arguments: list[str] = []
    for item in fields(config):
        name, value = item.name.replace("_", "-"), getattr(config, item.name)
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        else:
            arguments.append(f"--{name}={value}")
    return arguments


async def _end(process: asyncio.subprocess.Process) -> None:
    """Let it end, by and by with more force."""
    if process.stdin is not None:
        process.stdin.close()
    for signal in (process.terminate, process.kill):
        if process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            signal()
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _GRACE)


async def _next(events: asyncio.Queue[Event | None]) -> Event:
    """:raises EngineDied: the connection closed."""
    event = await events.get()
    if event is None:
        raise EngineDied("the engine died")
    return event


def _error(event: Failed) -> EngineError:
    if event.kind == "refused":
        return RequestRefused(event.message, event.param)
    if event.kind == "loading":
        return EngineUnavailable(event.message, loading=True)
    if event.kind == "deadline":
        return DeadlinePassed(event.message)
    return EngineError(event.message)
