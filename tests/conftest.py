"""Fixtures for every room: a gateway on real sockets, and a backend that a test can script."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from hypothesis import settings
from msgspec import structs

from forebay.api import (
    Adapter,
    AdapterContext,
    AdapterKind,
    Attempt,
    BackendSettings,
    Capabilities,
    Delta,
    Event,
    Finished,
    GenerateRequest,
    Load,
    Started,
    Usage,
    hookimpl,
)
from forebay.app import App, create_app
from forebay.config import Config
from forebay.loader import Registry, load_plugins
from forebay.server import listener

# Without a GPU Triton's kernels run under its interpreter. This is read when triton is first
# imported, which modules of any room may do while tests are collected.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# How long an example takes is the machine's affair.
settings.register_profile("forebay", deadline=None)
settings.load_profile("forebay")


class ScriptedAdapter(Adapter):
    """Does what its test says; by default answers three words."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.capabilities = Capabilities(logprobs=True)
        self.reading: Load | None = None
        self.probe_error: Exception | None = None
        self.script: Callable[[GenerateRequest, Attempt], AsyncIterator[Event]] = three_words
        #: Streams that have begun and not ended.
        self.open = 0
        self.requests: list[GenerateRequest] = []
        self.attempts: list[Attempt] = []
        self.closed = False

    async def stream(self, request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        self.requests.append(request)
        self.attempts.append(attempt)
        self.open += 1
        try:
            async for event in self.script(request, attempt):
                yield event
        finally:
            self.open -= 1

    async def probe(self) -> Capabilities:
        if self.probe_error is not None:
            raise self.probe_error
        return self.capabilities

    async def load(self) -> Load | None:
        return self.reading

    async def aclose(self) -> None:
        self.closed = True


async def three_words(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
    yield Started()
    for index in range(request.choices):
        for word in ("one ", "two ", "three"):
            yield Delta(index, word)
        yield Delta(index, finish_reason="stop")
    yield Finished(Usage(5, 3 * request.choices))


class ScriptedPlugin:
    """Offers adapter ``scripted`` and remembers each one that was built, by backend name."""

    def __init__(self) -> None:
        self.adapters_built: dict[str, ScriptedAdapter] = {}

    def _build(self, settings: BackendSettings, context: AdapterContext) -> Adapter:
        adapter = ScriptedAdapter(context.name)
        self.adapters_built[context.name] = adapter
        return adapter

    @hookimpl
    def adapters(self) -> list[AdapterKind]:
        return [AdapterKind(name="scripted", settings=BackendSettings, build=self._build)]


@dataclass
class Gateway:
    """A gateway that runs on two real ports of this machine."""

    app: App
    url: str
    admin_url: str
    scripted: dict[str, ScriptedAdapter] = field(default_factory=dict)

    def client(self, **options: object) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=30, trust_env=False, **options)

    def admin(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.admin_url, timeout=30, trust_env=False)

    async def healthy(self, *names: str) -> None:
        """Wait until these backends (default: all) are healthy."""
        wanted = names or tuple(self.app.fleet.backends)
        while any(self.app.fleet.backends[name].state() != "healthy" for name in wanted):
            await asyncio.sleep(0.01)


Serve = Callable[..., Awaitable[Gateway]]


@pytest.fixture
async def serve_gateway() -> AsyncIterator[Serve]:
    """``await serve_gateway(config, extra={name: plugin})``; stopped after the test.

    Backends are not examined unless ``examine``, so that all they hear is what a test sends.
    """
    async with AsyncExitStack() as stack:

        async def start(
            config: Config,
            extra: dict[str, object] | None = None,
            base_dir: Path = Path(),
            wait: bool = True,
            examine: bool = False,
        ) -> Gateway:
            backends = {
                name: structs.replace(settings, examine=examine)
                for name, settings in config.backends.items()
            }
            config = structs.replace(config, backends=backends)
            scripted = ScriptedPlugin()
            registry = load_plugins(extra={"scripted": scripted, **(extra or {})})
            running = running_gateway(config, registry, scripted, base_dir)
            gateway = await stack.enter_async_context(running)
            if wait:
                await gateway.healthy()
            return gateway

        yield start


@asynccontextmanager
async def running_gateway(
    config: Config, registry: Registry, scripted: ScriptedPlugin, base_dir: Path
) -> AsyncIterator[Gateway]:
    app = create_app(config, registry, base_dir)
    await app.start()
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    servers = [listener(asgi, 1.0) for asgi in (app.data_asgi, app.admin_asgi)]
    tasks = [
        asyncio.create_task(server.serve(sockets=[bound]))
        for server, bound in zip(servers, sockets, strict=True)
    ]
    while not all(server.started for server in servers):
        await asyncio.sleep(0.001)
    urls = [f"http://127.0.0.1:{bound.getsockname()[1]}" for bound in sockets]
    try:
        yield Gateway(app, *urls, scripted.adapters_built)
    finally:
        for server in servers:
            server.should_exit = server.force_exit = True
        await asyncio.gather(*tasks)
        await app.aclose()
        for bound in sockets:
            bound.close()


@pytest.fixture(scope="session")
def otlp() -> Iterator[Any]:
    """A receiver of traces by OTLP/HTTP and OTLP/gRPC."""
    path = Path(__file__).with_name("fakes") / "otlp_receiver.py"
    spec = spec_from_file_location("otlp_receiver", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    root, handlers, level = logging.root, logging.root.handlers[:], logging.root.level
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
