"""The composition root: the only module that knows every part."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from forebay.access import Access
from forebay.admission import Admission
from forebay.api import AdapterContext, Load
from forebay.backend import Backend
from forebay.config import Config
from forebay.dispatch import Dispatch
from forebay.fleet import Fleet
from forebay.health import Health
from forebay.loader import Registry
from forebay.prefix_index import PrefixIndex
from forebay.recorder import Recorder
from forebay.routing import Route, Router
from forebay.telemetry.decisions import DecisionStore
from forebay.telemetry.metrics import FleetRow, Metrics
from forebay.telemetry.observers import Observers
from forebay.telemetry.tracing import Tracing
from forebay.transport import connect

if TYPE_CHECKING:
    from litestar.types import ASGIApp


class App:
    """Everything, put together. ``start`` begins the work, ``aclose`` ends it."""

    #: There once it has been started.
    data_asgi: ASGIApp
    admin_asgi: ASGIApp

    def __init__(self, config: Config, registry: Registry, base_dir: Path = Path()) -> None:
        self.config = config
        self.draining = False
        self._tracing = Tracing.build(config.tracing)
        self.fleet = Fleet(config, build_backends(config, registry, self._tracing.environment))
        self.admission = Admission(config.models, self.fleet)
        index = PrefixIndex()
        self.fleet.on_lost = index.forget
        routes = {
            name: Route(_policy_name(model.policy), registry.policy(model.policy, base_dir))
            for name, model in config.models.items()
        }
        self.decisions = DecisionStore(config.decisions)
        self._observers = Observers(list(registry.observers))
        self.metrics = Metrics(config.models)
        self.metrics.watch_fleet(self._fleet_rows)
        self.metrics.watch_queues(self.admission.depths)
        self.metrics.watch_spans(self._tracing.spans)
        self.metrics.watch_observers(self._observers.failures, self._observers.dropped)
        recorder = Recorder(self.metrics, self.decisions, self._observers)
        router = Router(self.fleet, routes, index)
        self._registry = registry
        self._dispatch = Dispatch(config.models, self.admission, router, index, recorder)

    async def start(self) -> None:
        """Start the backends, and build what speaks HTTP while they do."""
        await self.fleet.start()
        await asyncio.to_thread(self._build_surfaces)

    def _build_surfaces(self) -> None:
        # Imported here: Litestar takes 0.3 s, in which an engine's process gets as far as we do.
        from forebay.http.admin import build_admin_app
        from forebay.http.data import build_data_app

        config, registry = self.config, self._registry
        self.data_asgi = build_data_app(
            self._dispatch, Access(config.keys), config.limits, self._tracing, registry.middleware
        )
        self.admin_asgi = build_admin_app(
            self.fleet, self.metrics, self.decisions, registry.report, lambda: self.draining
        )

    async def aclose(self) -> None:
        await self.fleet.aclose()
        await self._observers.aclose()
        await asyncio.to_thread(self._tracing.close)

    def _fleet_rows(self) -> Iterable[FleetRow]:
        for backend in self.fleet.backends.values():
            reading, cache = backend.reading, backend.cache()
            yield FleetRow(
                backend=backend.name,
                healthy=backend.state() == "healthy",
                in_flight=backend.in_flight,
                running=reading.running if reading else None,
                waiting=reading.waiting if reading else None,
                kv_usage=reading.kv_usage if reading else None,
                load_age=backend.load_age(),
                cached_blocks=cache.blocks if cache else None,
                cached_tokens=cache.tokens if cache else None,
                figures=reading or Load(),
            )


def create_app(config: Config, registry: Registry, base_dir: Path = Path()) -> App:
    """Build the gateway. ``base_dir``: where relative paths of policy files begin.

    :raises ConfigError: an adapter or policy is not there, or refuses its settings.
    """
    return App(config, registry, base_dir)


def build_backends(
    config: Config, registry: Registry, environment: Mapping[str, str]
) -> dict[str, Backend]:
    """One adapter per configured backend, none of them started."""
    data_dir = Path(config.data_dir).expanduser()
    backends = {}
    for name, settings in config.backends.items():
        kind = registry.adapter(settings.adapter)
        context = AdapterContext(
            name=name, connect=connect, data_dir=data_dir, environment=environment
        )
        adapter = kind.build(settings, context)
        backends[name] = Backend(name, settings, kind, adapter, Health(config.health))
    return backends


def _policy_name(spec: str | dict[str, object]) -> str:
    return spec if isinstance(spec, str) else str(spec.get("name", ""))
