"""Running the gateway: two listeners on one event loop, and an orderly end."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import uvicorn

from forebay.api import ConfigError
from forebay.app import App, create_app
from forebay.config import Admin, Config, Listen
from forebay.loader import Registry
from forebay.telemetry import logs

if TYPE_CHECKING:
    from litestar.types import ASGIApp

log = structlog.get_logger("forebay")

Ready = Callable[[int, int], None]


class Listener(uvicorn.Server):
    """A uvicorn server that leaves the signals to us: two of them run on one loop."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(
    config: Config,
    registry: Registry,
    base_dir: Path = Path(),
    on_ready: Ready = lambda data, admin: None,
) -> None:
    """Serve until SIGTERM or SIGINT. ``on_ready`` is told the two ports.

    :raises ConfigError: a port cannot be bound, or the configuration cannot be carried out.
    """
    logs.configure(config.logging)
    app = create_app(config, registry, base_dir)
    with (
        _bound("listen", config.listen) as data,
        _bound("admin", config.admin) as admin,
        asyncio.Runner(loop_factory=_loop) as runner,
    ):
        runner.run(_run(app, data, admin, on_ready))


def _loop() -> asyncio.AbstractEventLoop:
    import uvloop  # not on every platform

    return uvloop.new_event_loop()


def _bound(section: str, address: Listen | Admin) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {address.host}:{address.port}: {error.strerror}; "
            f"set another {section}.port",
            param=f"{section}.port",
        ) from error


async def _run(app: App, data: socket.socket, admin: socket.socket, on_ready: Ready) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        await app.start()
        await _listen(app, data, admin, on_ready, stop)
    finally:
        await app.aclose()


async def _listen(
    app: App, data: socket.socket, admin: socket.socket, on_ready: Ready, stop: asyncio.Event
) -> None:
    """Serve until ``stop`` is set, then drain."""
    servers = [
        listener(app.data_asgi, app.config.drain_timeout),
        listener(app.admin_asgi, 1.0),
    ]
    serving = [
        asyncio.create_task(server.serve(sockets=[bound]))
        for server, bound in zip(servers, (data, admin), strict=True)
    ]
    log.info("serving", data=data.getsockname()[1], admin=admin.getsockname()[1])
    on_ready(data.getsockname()[1], admin.getsockname()[1])
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([stopped, *serving], return_when=asyncio.FIRST_COMPLETED)
    app.draining = True
    log.info("draining", seconds=app.config.drain_timeout)
    # The admin port goes last: until then it tells that we drain.
    for server, task in zip(servers, serving, strict=True):
        server.should_exit = True
        await task
    stopped.cancel()


def listener(asgi: ASGIApp, grace: float) -> Listener:
    """A server for one application. ``grace``: seconds that open requests get at the end."""
    return Listener(
        uvicorn.Config(
            asgi,
            http="httptools",
            lifespan="off",
            ws="none",
            access_log=False,
            proxy_headers=False,  # nothing here trusts what a proxy says of the client
            log_config=None,
            server_header=False,
            date_header=False,
            timeout_keep_alive=75,  # longer than clients keep idle connections: they close first
            timeout_graceful_shutdown=max(1, round(grace)),
        )
    )
