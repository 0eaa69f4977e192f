"""Who is examined, and the gateway that is put in front of it: the real one, on free ports."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec
from msgspec import Struct

from forebay.api import (
    AdapterContext,
    AdapterKind,
    BackendBusy,
    BackendError,
    Capabilities,
    ConfigError,
    ForebayError,
    NoBackend,
)
from forebay.app import App, create_app
from forebay.config import Config
from forebay.config_file import build
from forebay.conformance.talk import Talk
from forebay.registry import Registry
from forebay.server import Listener, listener
from forebay.transport import connect

__all__ = ["BACKEND", "SERVED", "Stage", "Subject", "staged"]

#: Names of the backend and of its model at the gateway: unlike the model's own, so that a name
#: that is not translated shows.
BACKEND = "examined"
SERVED = "conformance"
#: Seconds. Load is read often, for the checks that watch it; a busy machine's probe may take long.
_PACE = {"load_interval": 0.2, "probe_interval": 1, "probe_timeout": 30}
#: Seconds that a backend may seem dead: one that starts may.
_GRACE = 2.0


class Subject(Struct, frozen=True, kw_only=True):
    """A backend to be examined."""

    adapter: str
    #: Its URL, or its model's folder or name for adapters that have a `path`.
    target: str = ""
    #: The model's name at the backend; empty: the first that the backend tells of.
    model: str = ""
    #: Further settings of the adapter.
    settings: Mapping[str, Any] = {}
    #: It only plays the server that the adapter is for.
    fake: bool = False
    #: Seconds that a check may take on each way, and the backend to become ready.
    timeout: float = 120.0


class Stage(Struct, frozen=True):
    """What the checks are run on."""

    gateway: Talk
    #: None: the backend cannot be asked by HTTP.
    direct: Talk | None
    claims: Capabilities
    #: The model's name at the backend.
    model: str


@asynccontextmanager
async def staged(subject: Subject, registry: Registry) -> AsyncIterator[Stage]:
    """The gateway, running, with this one backend and one model on it.

    :raises ConfigError: the subject's adapter, target or settings are wrong.
    :raises NoBackend: the backend did not become ready, and why.
    """
    kind = registry.adapter(subject.adapter)
    names = {field.encode_name for field in msgspec.structs.fields(kind.settings)}
    settings = {"adapter": subject.adapter, **_target(subject, names), **subject.settings}
    model = subject.model or str(settings.get("model", ""))
    if "model" in names:
        model = model or await _first_model(_config(settings, SERVED, registry), kind, subject)
        settings["model"] = model
    served = SERVED if "model" in names else model or _last_part(subject.target) or SERVED
    config = _config(settings, served, registry)
    async with AsyncExitStack() as stack:
        app = create_app(config, registry)
        data, admin = await stack.enter_async_context(_listening(app))
        gateway, operator = [await stack.enter_async_context(_client(url)) for url in (data, admin)]
        claims = await _ready(operator, subject.timeout)
        direct = None
        url = str(settings.get("url", ""))
        if url.startswith(("http://", "https://")):
            backend = await stack.enter_async_context(_client(url, _keys(settings)))
            direct = Talk(backend, model or served, claims)
        yield Stage(
            Talk(gateway, served, claims, operator, direct), direct, claims, model or served
        )


def _target(subject: Subject, names: set[str]) -> dict[str, str]:
    """The setting that the target is."""
    setting = next((name for name in ("url", "path") if name in names), None)
    if setting is None:
        if subject.target:
            raise ConfigError(
                f"the adapter {subject.adapter!r} is not reached by URL or path; leave the "
                f"target {subject.target!r} out"
            )
        return {}
    if not subject.target and setting not in subject.settings:
        raise ConfigError(f"the adapter {subject.adapter!r} needs a target: its {setting}")
    return {setting: subject.target} if subject.target else {}


def _config(settings: Mapping[str, Any], model: str, registry: Registry) -> Config:
    """:raises ConfigError: with all that is wrong with the settings."""
    tree = {
        # What one check does to the backend must not take it from the next.
        "health": {"failures": 0},
        "backends": {BACKEND: {**_PACE, **settings}},
        "models": {model: {"backends": [BACKEND], "policy": "round_robin"}},
    }
    return build(tree, registry, environ={}, base=Path.cwd(), source="the backend to be examined")


async def _first_model(config: Config, kind: AdapterKind, subject: Subject) -> str:
    """The first model that the backend's probe names.

    :raises NoBackend: it does not answer, or names none.
    """
    context = AdapterContext(name=BACKEND, connect=connect, data_dir=Path(config.data_dir))
    adapter = kind.build(config.backends[BACKEND], context)
    end = time.monotonic() + subject.timeout
    try:
        await adapter.start()
        while True:
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + 10):
                    found = await adapter.probe()
            except BackendBusy as error:
                if time.monotonic() > end:
                    raise _not_ready(error.message) from error
                await asyncio.sleep(0.5)
            except (TimeoutError, BackendError) as error:
                reason = error.message if isinstance(error, ForebayError) else "no answer"
                raise _not_ready(f"{reason}; if it needs a model's name, give --model") from error
            else:
                break
    finally:
        await adapter.aclose()
    if not found.models:
        raise _not_ready("it does not tell its models; give the name of one with --model")
    return found.models[0]


def _not_ready(reason: str) -> NoBackend:
    return NoBackend(f"the backend is not ready: {reason}")


def _last_part(target: str) -> str:
    return Path(target).name


def _keys(settings: Mapping[str, Any]) -> dict[str, str]:
    key = settings.get("api_key")
    return {**settings.get("headers", {}), **({"authorization": f"Bearer {key}"} if key else {})}


@asynccontextmanager
async def _listening(app: App) -> AsyncIterator[tuple[str, str]]:
    """The URLs of data and admin port."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    servers: list[Listener] = []
    serving: list[asyncio.Task[None]] = []
    try:
        await app.start()
        servers += [listener(asgi, 1.0) for asgi in (app.data_asgi, app.admin_asgi)]
        serving += [
            asyncio.create_task(server.serve(sockets=[bound]))
            for server, bound in zip(servers, sockets, strict=True)
        ]
        data, admin = (f"http://127.0.0.1:{bound.getsockname()[1]}" for bound in sockets)
        yield data, admin
    finally:
        for server in servers:
            server.should_exit = server.force_exit = True
        await asyncio.gather(*serving)
        await app.aclose()
        for bound in sockets:
            bound.close()


def _client(url: str, headers: Mapping[str, str] = {}) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=url.rstrip("/").removesuffix("/v1"),
        headers={"accept-encoding": "identity", **headers},
        timeout=None,  # noqa: S113 - each check has one of its own
        trust_env=False,
        verify=url.startswith("https:"),  # else 0.2 s go into reading certificates
        limits=httpx.Limits(max_connections=None),
    )


async def _ready(operator: httpx.AsyncClient, seconds: float) -> Capabilities:
    """What the backend can do, once it is healthy and the gateway has examined it.

    :raises NoBackend: it is not, and why.
    """
    began = time.monotonic()
    reason = "the gateway does not answer"
    while (waited := time.monotonic() - began) < seconds:
        with suppress(httpx.ConnectError):
            (backend,) = (await operator.get("/backends")).json()["backends"]
            examination = backend["examination"] or {}
            if backend["state"] == "healthy" and not examination.get("pending"):
                return _upheld(backend["capabilities"], examination.get("findings", {}))
            reason = backend["reason"] or "it is still being examined"
            if backend["state"] == "unhealthy" and waited > _GRACE:
                break
        await asyncio.sleep(0.05)
    raise _not_ready(reason)


def _upheld(claimed: dict[str, Any], findings: Mapping[str, Mapping[str, str]]) -> Capabilities:
    """What the gateway still claims after its own examination."""
    failed = [name for name, finding in findings.items() if finding["verdict"] == "fails"]
    denied = dict.fromkeys(claimed.keys() & failed, False)
    return msgspec.convert({**claimed, **denied}, Capabilities)
