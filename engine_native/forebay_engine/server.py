"""The engine's socket: connections, and the requests that live on each."""

from __future__ import annotations

import asyncio
import logging
from importlib.metadata import PackageNotFoundError, version

import msgspec

from forebay_engine.config import EngineConfig
from forebay_engine.engine import Engine
from forebay_engine.errors import EngineError, RequestRefused
from forebay_engine.request import Request
from forebay_engine.wire import (
    Abort,
    Command,
    Detokenize,
    Detokenized,
    Done,
    Embed,
    Embedded,
    Event,
    Failed,
    FrameReader,
    Generate,
    GetStatus,
    Status,
    Tokenize,
    Tokenized,
    frame,
)

Work = Generate | Embed | Tokenize | Detokenize
#: Nothing comes after these.
_LAST = Done | Failed | Embedded | Tokenized | Detokenized
_READ_BYTES = 1 << 16

log = logging.getLogger("forebay_engine")


class Server:
    """Answers connections; until ``open`` is called, that the model is being loaded."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._config: EngineConfig | None = None
        self._version = _version()
        #: Share of the weights that has been read, 0 to 1.
        self.loaded = 0.0
        self._connections: set[_Connection] = set()

    def open(self, engine: Engine, config: EngineConfig) -> None:
        self._engine, self._config = engine, config

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, to its end; what it started and left open is aborted."""
        connection = _Connection(self, writer)
        self._connections.add(connection)
        frames = FrameReader()
        decoder = msgspec.msgpack.Decoder(Command)
        try:
            while data := await reader.read(_READ_BYTES):
                for body in frames.feed(data):
                    connection.take(decoder.decode(body))
        except (EngineError, msgspec.DecodeError) as error:
            log.warning("closing a connection that does not keep to the protocol: %s", error)
        except ConnectionError:
            log.info("a client has gone")
        finally:
            self._connections.discard(connection)
            connection.close()
            writer.close()

    @property
    def engine(self) -> Engine | None:
        return self._engine

    def status(self, id: int) -> Status:
        engine, config = self._engine, self._config
        if engine is None or config is None:
            return Status(id=id, state="loading", version=self._version, loaded=self.loaded)
        scheduler = engine.scheduler
        return Status(
            id=id,
            state="ready",
            version=self._version,
            max_model_len=engine.max_model_len,
            max_sequences=config.max_sequences,
            running=scheduler.running,
            waiting=scheduler.waiting,
            kv_usage=scheduler.cache.usage,
            embeds=engine.pooling is not None,
            generates=engine.generates,
            counters=scheduler.counters.as_dict() | {"evicted": scheduler.cache.evicted},
            gauges={
                "kv_fragmentation": scheduler.fragmentation,
                "kv_cached": scheduler.cache.cached,
                "open_requests": sum(len(other.requests) for other in self._connections),
                "tasks": len(asyncio.all_tasks()),
            },
            distributions=engine.metrics.read(),
        )


class _Connection:
    """The requests of one client. Writes are buffered without limit, but ``max_tokens`` is one."""

    def __init__(self, server: Server, writer: asyncio.StreamWriter) -> None:
        self._server = server
        self._writer = writer
        #: Frames that are sent together once the loop has come round: a step has one for each row,
        #: and each call takes 1.6 µs.
        self._frames: list[bytes] = []
        self.requests: dict[int, asyncio.Task[Request | None]] = {}

    def take(self, command: Command) -> None:
        match command:
            case GetStatus(id):
                self._send(self._server.status(id))
            case Abort(id):
                self._abort(id)
            case Generate() | Embed() | Tokenize() | Detokenize():
                if command.id in self.requests:
                    raise EngineError(f"id {command.id} is in use")
                self._start(command)

    def close(self) -> None:
        for id in list(self.requests):
            self._abort(id)

    def _start(self, command: Work) -> None:
        def report(task: asyncio.Task[Request | None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("a request could not be started", exc_info=error)
                self._send(Failed(command.id, "failed", f"the engine failed: {error}"))

        task = asyncio.create_task(self._begin(command))
        self.requests[command.id] = task
        task.add_done_callback(report)

    async def _begin(self, command: Work) -> Request | None:
        """The generation that has begun; None: nothing goes on."""
        engine = self._server.engine
        if engine is None:
            self._send(Failed(command.id, "loading", "the model is being loaded"))
            return None
        try:
            match command:
                case Generate():
                    return await engine.submit(command, self._send)
                case Embed():
                    self._send(await engine.embed(command))
                case Tokenize():
                    self._send(await engine.tokenize(command))
                case Detokenize():
                    self._send(await engine.detokenize(command))
        except RequestRefused as refusal:
            self._send(Failed(command.id, "refused", refusal.message, refusal.param))
        return None

    def _send(self, event: Event) -> None:
        if isinstance(event, _LAST):
            self.requests.pop(event.id, None)
        if not self._frames:
            asyncio.get_running_loop().call_soon(self._flush)
        self._frames.append(frame(event))

    def _flush(self) -> None:
        frames, self._frames = self._frames, []
        if not self._writer.is_closing():
            self._writer.writelines(frames)

    def _abort(self, id: int) -> None:
        """Drop a request, while its prompt is still being encoded or at any later time."""
        task = self.requests.pop(id, None)
        if task is None:
            return
        if not task.done():
            task.cancel()
            return
        engine = self._server.engine
        if engine is not None and not task.cancelled() and task.exception() is None:
            request = task.result()
            if request is not None:
                engine.abort(request)


def _version() -> str:
    try:
        return version("forebay")
    except PackageNotFoundError:
        return "unknown"
