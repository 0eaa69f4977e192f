"""The engine's own process: ``python -m forebay_engine.process --model PATH --socket PATH``.

It listens on a Unix socket from the start, loads the model meanwhile, and serves any number of
connections. It ends on SIGTERM, and with ``--watch-stdin`` when its standard input does: the pipe
is held open by whoever started it, and closes however that one dies.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, NoReturn

import click

from forebay_engine.cache import CacheGroup
from forebay_engine.chat import ChatTemplate
from forebay_engine.config import EngineConfig
from forebay_engine.engine import Engine
from forebay_engine.errors import StartRefused
from forebay_engine.memory import available_bytes, laid_out_bytes, refuse_what_does_not_fit
from forebay_engine.ready_memory import ReadyMemory
from forebay_engine.server import Server
from forebay_engine.step_runner import StepRunner
from forebay_engine.tokenizer import Tokenizer, tokenizer_file
from forebay_engine.tracing import Tracing
from forebay_engine.wire import EXIT_REFUSED

#: How far the engine stands back behind the gateway where they share cores.
NICENESS = 5
#: Bytes that are taken from the system while torch is imported, at most.
_MOST_READY = 1 << 30
#: Seconds for an orderly end after standard input has closed.
_GRACE = 3.0

log = logging.getLogger("forebay_engine")


#: Builds the runner of a configuration, telling the share of the weights that has been read.
MakeRunner = Callable[[EngineConfig, Callable[[float], None]], StepRunner]


def load_runner(
    config: EngineConfig, progress: Callable[[float], None] = lambda share: None
) -> StepRunner:
    """The real one; imports torch.

    :raises StartRefused: the model does not fit, or is none that we can serve.
    """
    available = available_bytes()
    memory = None if config.device == "cuda" else _ready_memory(config, available)
    device = choose_device(config.device)
    if device == "cpu":
        refuse_what_does_not_fit(config, available)
    from forebay_engine.hf_config import ModelError
    from forebay_engine.runner import Runner

    try:
        if device == "cuda":
            from forebay_engine.gpu.runner import DeviceRunner

            if memory is not None:
                memory.settle()
            return DeviceRunner.on_gpu(config, progress)
        return Runner(config, progress, memory)
    except ModelError as error:
        raise StartRefused(str(error)) from error


def _ready_memory(config: EngineConfig, available: int | None) -> ReadyMemory | None:
    """For the weights' layout; not much more than there is time for before it is needed."""
    size = min(laid_out_bytes(config), _MOST_READY, (available or 0) // 2)
    return ReadyMemory(size) if size > 0 else None


def choose_device(asked: str) -> str:
    """``cpu`` or ``cuda``.

    :raises StartRefused: there is no such device.
    """
    if asked not in ("auto", "cpu", "cuda"):
        raise StartRefused(f"device {asked!r} is not one of auto, cpu, cuda")
    if asked == "cpu":
        return asked
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise StartRefused(
            f"device: cuda is asked for, but torch {torch.__version__} sees no GPU: look whether "
            "`nvidia-smi` does, and whether torch was built for CUDA"
        )
    return "cpu"


def set_up_threads(threads: int) -> None:
    """Set what OpenMP reads when torch is imported: idle threads sleep instead of spinning."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["OMP_NUM_THREADS"] = str(threads or cores or 1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def stand_back() -> None:
    """Let the gateway go first.

    Where Linux shares time among sessions before it looks at processes (``sched_autogroup``), this
    process's niceness counts within its own session only, and that of the session has to be set.
    """
    os.nice(NICENESS)
    group = Path("/proc/self/autogroup")
    if os.getsid(0) == os.getpid() and group.exists():
        with suppress(OSError):  # not allowed, or asked too often: it costs some latency
            group.write_text(str(NICENESS))


async def serve(
    config: EngineConfig,
    socket: Path,
    make_runner: MakeRunner,
    watch_stdin: bool,
) -> NoReturn:
    """Serve until told to end, and exit."""
    end = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end.set)
    if watch_stdin:
        threading.Thread(target=_watch_stdin, args=(loop, end), daemon=True).start()
    server = Server()
    tracing = Tracing.from_environment(os.environ, Path(config.model).name)
    listener = await asyncio.start_unix_server(server.serve, str(socket))
    work = asyncio.create_task(_work(server, config, make_runner, tracing))
    ending = asyncio.create_task(end.wait())
    await asyncio.wait([work, ending], return_when=asyncio.FIRST_COMPLETED)
    status = _status(work) if work.done() else 0
    listener.close()
    await asyncio.to_thread(_remove, socket, watch_stdin)
    if tracing is not None:
        await asyncio.to_thread(tracing.close)
    logging.shutdown()
    # Not a return: the loop's end would wait for a step or a model load that may still run.
    os._exit(status)


async def _work(
    server: Server,
    config: EngineConfig,
    make_runner: MakeRunner,
    tracing: Tracing | None,
) -> None:
    """Load, then step for ever."""
    begin = time.monotonic()
    # Hardly anything that loading makes is garbage: a sixth of torch's import went into looking.
    gc.disable()
    log.info("loading %s", config.model)
    folder = await asyncio.to_thread(_model_folder, config)
    config = replace(config, model=str(folder))
    if not (folder / "config.json").is_file():
        raise StartRefused(
            f"{folder} is no model folder: there is no config.json in it, nor a GGUF"
        )
    vocabulary = tokenizer_file(folder)
    template = ChatTemplate.from_folder(folder)
    runner = await asyncio.to_thread(make_runner, config, _Loading(server))
    # After the weights: its reader lets no other thread run Python for 0.7 s, while what is left of
    # laying out the weights needs none.
    tokenizer = await asyncio.to_thread(Tokenizer.from_file, vocabulary)
    log.info("weights and tokenizer loaded, warming up")
    await asyncio.to_thread(runner.warm_up)
    on_end = tracing.record if tracing is not None else lambda request: None
    engine = Engine(runner, tokenizer, template, config, on_end)
    log.info(
        "ready after %.1f s: context %d tokens, KV cache %s blocks of %d tokens",
        time.monotonic() - begin,
        engine.max_model_len,
        " and ".join(_named(group) for group in runner.cache_groups),
        runner.block_size,
    )
    # What is there by now stays, and a collection that went through all of it takes 0.1 s.
    gc.freeze()
    gc.enable()
    server.open(engine, config)
    await engine.run()


class _Loading:
    """Tells how far the weights are read: the server at once, the log at most once a second."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._logged = time.monotonic()

    def __call__(self, share: float) -> None:
        self._server.loaded = min(1.0, share)
        if time.monotonic() - self._logged >= 1.0:
            self._logged = time.monotonic()
            log.info("loading: %.0f %% of the weights are read", 100 * self._server.loaded)


def _named(group: CacheGroup) -> str:
    if group.window is None:
        return str(group.num_blocks)
    return f"{group.num_blocks} (window {group.window})"


def _model_folder(config: EngineConfig) -> Path:
    """What the engine reads; a GGUF file's is made on its first start."""
    path = Path(config.model).expanduser()
    if (path / "config.json").is_file():
        return path
    from forebay_engine.gguf import model_folder  # and numpy, gguf, tokenizers

    return model_folder(path)


def _status(work: asyncio.Task[None]) -> int:
    error = work.exception()
    if isinstance(error, StartRefused):
        log.error("%s", error)
        return EXIT_REFUSED
    log.critical("the engine failed", exc_info=error)
    return 1


def _remove(socket: Path, folder_too: bool) -> None:
    """Remove the socket, and the folder that a client made for it and may not live to remove."""
    socket.unlink(missing_ok=True)
    if folder_too:
        with suppress(OSError):
            socket.parent.rmdir()


def _watch_stdin(loop: asyncio.AbstractEventLoop, end: asyncio.Event) -> None:
    while os.read(0, 4096):
        pass
    loop.call_soon_threadsafe(end.set)
    time.sleep(_GRACE)
    os._exit(1)


def options(command: Callable[..., None]) -> Callable[..., None]:
    """An option for each field of :class:`EngineConfig`, so that neither can lack one."""
    for item in reversed(fields(EngineConfig)):
        name = item.name.replace("_", "-")
        declaration = f"--{name}/--no-{name}" if item.type == "bool" else f"--{name}"
        required: dict[str, Any] = {"required": True}
        given = required if item.default is MISSING else {"default": item.default}
        command = click.option(declaration, **given)(command)
    return command


def main(make_runner: MakeRunner = load_runner) -> None:
    """Run the command line; tests pass a runner of their own."""

    @click.command()
    @click.option("--socket", required=True, type=click.Path(path_type=Path))
    @click.option("--watch-stdin", is_flag=True, help="End when standard input does.")
    @options
    def command(socket: Path, watch_stdin: bool, **values: Any) -> None:
        """Serve a model on a Unix socket."""
        logging.basicConfig(
            level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s"
        )
        config = EngineConfig(**values)
        set_up_threads(config.threads)
        stand_back()
        asyncio.run(serve(config, socket, make_runner, watch_stdin))

    command()


if __name__ == "__main__":
    main()
