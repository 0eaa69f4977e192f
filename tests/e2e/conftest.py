"""Forebay as a process in front of our own engine, a real llama.cpp server and a real vLLM server.

Nothing here is a stand-in. Servers are started once for all tests (vLLM takes a minute), each in
a process group of its own, so that a test can kill one as an operator's worst day would.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from openai import OpenAI

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ROOT / "scripts" / "backends" / "backends.sh"
FOREBAY = Path(sys.executable).with_name("forebay")
MODEL = "gemma-3-270m"
ALL = ["native", "llama", "vllm"]
POLICIES = ["round_robin", "least_connections", "power_of_two", "prefix_affinity"]


def free_port(following: int = 0) -> int:
    """A port that nobody has, nor those that follow it."""
    while True:
        with ExitStack() as held, suppress(OSError):
            port = 0
            for i in range(following + 1):
                found = held.enter_context(socket.socket())
                found.bind(("127.0.0.1", port + i if i else 0))
                port = port or found.getsockname()[1]
            return port


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        with suppress(httpx.HTTPError):
            if condition():
                return
        time.sleep(0.2)
    pytest.fail(f"{what}: not within {seconds:g} s")


class Server:
    """A process that serves HTTP; its output goes to a file that a failing test points to."""

    def __init__(self, name: str, command: list[str], port: int, ready: str, logs: Path) -> None:
        self.name = name
        self.command = command
        self.url = f"http://127.0.0.1:{port}"
        self.log = logs / f"{name}.log"
        self._ready = ready if ready.startswith("http") else f"{self.url}{ready}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self, seconds: float = 240) -> None:
        wait_for(self._is_ready, seconds, f"{self.name} (see {self.log})")

    def _is_ready(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            pytest.fail(f"{self.name} ended by itself; its end:\n{self.log.read_text()[-2000:]}")
        return httpx.get(self._ready, timeout=5).status_code == 200

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """As the kernel would for lack of memory: at once, with its children."""
        os.killpg(self.pid, signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def terminate(self, seconds: float = 60) -> int:
        """End it in good manners; its exit status."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(seconds)

    def close(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        try:
            self.terminate(20)
        except subprocess.TimeoutExpired:
            self.kill()


def examined(backend: dict[str, Any]) -> bool:
    """Of a backend as the admin port shows it."""
    return bool(backend["examination"]["pending"] == [])


class Gateway(Server):
    """`forebay serve` on a configuration."""

    def __init__(self, name: str, config: dict[str, Any], logs: Path) -> None:
        port, admin = free_port(), free_port()
        file = logs / f"{name}.yaml"
        listen = {"listen": {"port": port}, "admin": {"port": admin}}
        file.write_text(yaml.safe_dump({**listen, **config}))
        self.admin = f"http://127.0.0.1:{admin}"
        command = [str(FOREBAY), "serve", "--config", str(file)]
        super().__init__(name, command, port, f"{self.admin}/readyz", logs)

    def backend(self, name: str) -> dict[str, Any]:
        """A backend as the admin port shows it."""
        answer = httpx.get(f"{self.admin}/backends", timeout=10).json()
        found: dict[str, Any] = next(b for b in answer["backends"] if b["name"] == name)
        return found

    def wait_until(self, name: str, seconds: float = 240, **expected: Any) -> None:
        """A backend shows these values; its load figures only count if they are fresh."""
        since = time.monotonic()

        def shown() -> bool:
            found = self.backend(name)
            read = {"running", "waiting", "kv_usage"} & expected.keys()
            if read and (found["load_age"] or 1e9) > time.monotonic() - since:
                return False
            return all(found[key] == value for key, value in expected.items())

        wait_for(shown, seconds, f"{name} with {expected}")

    def wait_until_examined(self, name: str, seconds: float = 120) -> None:
        """What it can do is known, not only claimed."""
        wait_for(lambda: examined(self.backend(name)), seconds, f"{name}, examined")

    def engine(self) -> psutil.Process:
        """The native engine's process, a child of the gateway's."""
        children = psutil.Process(self.pid).children(recursive=True)
        return next(child for child in children if "forebay_engine" in " ".join(child.cmdline()))

    def client(self) -> OpenAI:
        """One that retries nothing: what fails is to be seen."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def kv_events(logs: Path) -> dict[str, str]:
    """Where vLLM publishes what happens in its cache, as settings of its adapter."""
    addresses = {"kv_events": f"ipc://{logs}/kv", "kv_events_replay": f"ipc://{logs}/kv-replay"}
    return {**addresses, "kv_events_topic": "kv"}


@pytest.fixture(scope="session")
def real(logs: Path, otlp: Any, kv_events: dict[str, str]) -> Iterator[dict[str, Server]]:
    """llama.cpp and vLLM, running; vLLM exports its spans and can reset its prefix cache."""
    names = ["model", "llamacpp", "vllm"]
    missing = subprocess.run(
        [BACKENDS, "missing", *names], capture_output=True, text=True, check=True
    ).stdout.split()
    if missing:
        pytest.fail(f"not installed: run scripts/backends/backends.sh install {' '.join(missing)}")
    publishing = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": kv_events["kv_events"],
        "replay_endpoint": kv_events["kv_events_replay"],
        "topic": kv_events["kv_events_topic"],
    }
    events = ["--kv-events-config", json.dumps(publishing)]
    options = {"vllm": ["--otlp-traces-endpoint", otlp.grpc_url, *events]}
    servers = {}
    for name, kind in (("llama", "llamacpp"), ("vllm", "vllm")):
        port = free_port()
        serve = ["env", "VLLM_SERVER_DEV_MODE=1", str(BACKENDS), "serve"]
        command = [*serve, kind, str(port), *options.get(name, [])]
        servers[name] = Server(name, command, port, "/health", logs)
        servers[name].start()
    for server in servers.values():
        server.wait()
    yield servers
    for server in servers.values():
        server.close()


@pytest.fixture(scope="session")
def triton_server(otlp: Any, logs: Path) -> Iterator[Server]:
    """A Triton that exports spans."""
    if subprocess.check_output([BACKENDS, "missing", "triton"]):
        pytest.fail("not installed: run scripts/backends/backends.sh install triton")
    port = free_port(following=2)  # gRPC and metrics
    trace = {"mode": "opentelemetry", "opentelemetry,url": f"{otlp.url}/v1/traces"}
    trace |= {"rate": "0", "level": "TIMESTAMPS"}
    options = [f"--trace-config={name}={value}" for name, value in trace.items()]
    trace_often = "--trace-config=opentelemetry,bsp_schedule_delay=500"  # ms; 5000 by itself
    command = [str(BACKENDS), "serve", "triton", str(port), *options, trace_often]
    server = Server("traced-triton", command, port, "/v2/health/ready", logs)
    server.start()
    server.wait()
    yield server
    server.close()


@pytest.fixture(scope="session")
def triton_gateway(triton_server: Server, otlp: Any, logs: Path) -> Iterator[Gateway]:
    """In front of that Triton: of one model it is told that it exports spans, of the other not."""
    triton = {"adapter": "triton", "url": triton_server.url, "chat_template": "plain"}
    config = {
        "backends": {
            "triton": {**triton, "model": "ensemble"},
            "triton-own": {**triton, "model": "vllm_model", "exports_traces": True},
        },
        "models": {name: {"backends": [name]} for name in ("triton", "triton-own")},
        "tracing": {"otlp_endpoint": otlp.url},
    }
    gateway = Gateway("triton-gateway", config, logs)
    gateway.start()
    gateway.wait()
    for name in config["models"]:
        gateway.wait_until(name, state="healthy")
    yield gateway
    gateway.close()


def backends_config(real: dict[str, Server], **events: str) -> dict[str, Any]:
    vllm = {"adapter": "vllm", "url": real["vllm"].url, "model": MODEL, **events}
    return {
        # One compute thread: three engines share the machine, and none may starve the others.
        "native": {"adapter": "native", "path": MODEL, "threads": 1, "max_model_len": 4096},
        "llama": {"adapter": "llamacpp", "url": real["llama"].url, "model": MODEL},
        "vllm": vllm,
        "vllm-own": {**vllm, "exports_traces": True},
    }


@pytest.fixture(scope="session")
def backends(real: dict[str, Server]) -> dict[str, Any]:
    """The settings of our own engine and of the real servers."""
    return backends_config(real)


@pytest.fixture(scope="session")
def gateway(
    real: dict[str, Server], kv_events: dict[str, str], otlp: Any, logs: Path
) -> Iterator[Gateway]:
    """All three behind one model name, each behind its own, and each policy under its name."""
    alone = {name: {"backends": [name]} for name in (*ALL, "vllm-own")}
    by_policy = {name: {"backends": ALL, "policy": name} for name in POLICIES}
    config = {
        "backends": backends_config(real, **kv_events),
        "models": {MODEL: {"backends": ALL, "policy": "round_robin"}, **alone, **by_policy},
        "tracing": {"otlp_endpoint": otlp.url},
    }
    server = Gateway("gateway", config, logs)
    server.start()
    server.wait()
    for name in (*ALL, "vllm-own"):
        server.wait_until(name, state="healthy")
        server.wait_until_examined(name)
    yield server
    server.close()


@pytest.fixture(scope="session")
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with gateway.client() as made:
        yield made


@pytest.fixture(scope="session")
def start_gateway(
    real: dict[str, Server], logs: Path
) -> Iterator[Callable[[str, dict[str, Any]], Gateway]]:
    """Starts a further gateway over llama.cpp alone."""
    started: list[Gateway] = []

    def start(name: str, settings: dict[str, Any]) -> Gateway:
        backends = {"llama": backends_config(real)["llama"]}
        config = {"backends": backends, "models": {MODEL: {"backends": ["llama"]}}, **settings}
        started.append(Gateway(name, config, logs))
        started[-1].start()
        started[-1].wait()
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture(scope="session")
def serve_demo(logs: Path) -> Callable[[], Server]:
    """`forebay serve` as the README has it, but on free ports; the caller closes it."""

    def start() -> Server:
        port, admin = free_port(), free_port()
        options = ["--port", str(port), "--admin-port", str(admin)]
        backends = f"http://127.0.0.1:{admin}/backends"
        ready = f"http://127.0.0.1:{admin}/readyz"
        server = Server("demo", [str(FOREBAY), "serve", *options], port, ready, logs)
        server.start()
        server.wait()
        # In bf16 what else is in the batch can tip the balance between two words.
        wait_for(
            lambda: examined(httpx.get(backends).json()["backends"][0]), 120, "the demo, examined"
        )
        return server

    return start
