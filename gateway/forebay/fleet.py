"""The live backends: their load as this gateway sees it, their health, their probes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping

import structlog
from msgspec import structs

from forebay.api import (
    Adapter,
    AdapterKind,
    BackendBusy,
    BackendError,
    BackendSettings,
    BackendView,
    Capabilities,
    Load,
    Request,
)
from forebay.cached_blocks import CachedBlocks, CacheStatus, follow
from forebay.config import Config
from forebay.health import Health, State

log = structlog.get_logger("forebay.fleet")

# Weight of the newest figure in the mean time to first token: half-life of about 7 requests.
TTFT_WEIGHT = 0.1


class Backend:
    """One configured backend and all that is known of it."""

    def __init__(
        self,
        name: str,
        settings: BackendSettings,
        kind: AdapterKind,
        adapter: Adapter,
        health: Health,
    ) -> None:
        self.name = name
        self.settings = settings
        self.kind = kind
        self.adapter = adapter
        self.health = health
        self.capabilities: Capabilities | None = None
        self.reading: Load | None = None
        self.read_at = 0.0
        #: None: it does not tell of its cache.
        self.cached_blocks: CachedBlocks | None = None
        self.in_flight = 0
        self.queued_tokens = 0
        self.ttft: float | None = None
        self.requests = 0
        self.failures = 0
        #: Set to have it probed at once.
        self.doubt = asyncio.Event()

    @property
    def provider(self) -> str:
        """``gen_ai.provider.name``."""
        return self.kind.provider or self.kind.name

    @property
    def address(self) -> str:
        """Base URL, or the backend's name if it has none."""
        return str(getattr(self.settings, "url", "")) or self.name

    @property
    def slots(self) -> int:
        """Most requests in flight; 0: no limit."""
        if self.settings.max_in_flight:
            return self.settings.max_in_flight
        return self.capabilities.slots if self.capabilities else 0

    @property
    def full(self) -> bool:
        return 0 < self.slots <= self.in_flight

    def state(self) -> State:
        return self.health.state(time.monotonic())

    def load_age(self) -> float | None:
        return None if self.reading is None else time.monotonic() - self.read_at

    def cache(self) -> CacheStatus | None:
        return None if self.cached_blocks is None else self.cached_blocks.status()

    def first_token(self, seconds: float) -> None:
        old = self.ttft
        self.ttft = seconds if old is None else old + TTFT_WEIGHT * (seconds - old)

    def view(self, weight: float, turns: float, prefix_tokens: int) -> BackendView:
        reading = self.reading
        return BackendView(
            name=self.name,
            adapter=self.kind.name,
            weight=weight,
            in_flight=self.in_flight,
            max_in_flight=self.slots,
            turns=turns,
            queued_tokens=self.queued_tokens,
            running=reading.running if reading else None,
            waiting=reading.waiting if reading else None,
            kv_usage=reading.kv_usage if reading else None,
            load_age=self.load_age(),
            ttft=self.ttft,
            prefix_tokens=prefix_tokens,
        )

    def lacks(self, request: Request) -> str | None:
        """The capability that the request needs and this backend has not, in words."""
        able = self.capabilities
        if able is None:
            return None
        if request.endpoint not in able.endpoints:
            return f"does not serve {request.endpoint}"
        needs = (
            (request.needs_tools and not able.tools, "cannot call tools"),
            (request.needs_schema and not able.schema, "cannot bind the answer to a schema"),
            (request.needs_multimodal and not able.multimodal, "takes text only"),
            (request.sampling.logprobs is not None and not able.logprobs, "gives no logprobs"),
        )
        lacking = next((text for missing, text in needs if missing), None)
        if lacking is None and request.extra and not able.extra_fields:
            return f"does not know the field {request.extra[0]!r}"
        return lacking


class Fleet:
    """All backends, probed in the background from :meth:`start` to :meth:`aclose`."""

    def __init__(self, config: Config, backends: Mapping[str, Backend]) -> None:
        self.backends = dict(backends)
        self._pools = {
            name: _pool(model.backends, self.backends) for name, model in config.models.items()
        }
        self._tasks: list[asyncio.Task[None]] = []
        #: Called when a slot came free or a backend's state changed.
        self.on_change: Callable[[], None] = lambda: None
        #: Called with the name of a backend that was lost: its caches are cold when it returns.
        self.on_lost: Callable[[str], None] = lambda name: None

    def pool(self, model: str) -> tuple[tuple[Backend, float], ...]:
        """Backends of a model with their weights."""
        return self._pools[model]

    @property
    def models(self) -> Iterable[str]:
        return self._pools

    async def start(self) -> None:
        for backend in self.backends.values():
            await backend.adapter.start()
            self._tasks.append(asyncio.create_task(self._watch(backend)))
            if backend.settings.load_interval:
                self._tasks.append(asyncio.create_task(self._read_load(backend)))
            if backend.adapter.cache_events() is not None:
                backend.cached_blocks = view = CachedBlocks()
                following = follow(
                    backend.name, backend.adapter, view, backend.settings.probe_interval
                )
                self._tasks.append(asyncio.create_task(following))

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(backend.adapter.aclose() for backend in self.backends.values()))

    async def _watch(self, backend: Backend) -> None:
        """Probe for ever: at its interval, fast while it starts, at once when in doubt."""
        settings = backend.settings
        while True:
            before = backend.state()
            await self._probe(backend)
            after = backend.state()
            if before != after:
                log.info("backend", backend=backend.name, state=after, reason=backend.health.reason)
                if before == "healthy":
                    self.on_lost(backend.name)
                self.on_change()
            pause = settings.probe_interval if after == "healthy" else settings.probe_interval / 5
            backend.doubt.clear()
            try:
                async with asyncio.timeout(pause):
                    await backend.doubt.wait()
                # A storm of failed attempts must not become a storm of probes.
                await asyncio.sleep(0.1)
            except TimeoutError:
                continue

    async def _probe(self, backend: Backend) -> None:
        timeout = backend.settings.probe_timeout
        try:
            async with asyncio.timeout(timeout):
                backend.capabilities = await backend.adapter.probe()
        except TimeoutError:
            backend.health.probe_failed(f"no answer to the probe within {timeout:g} s")
        except BackendError as error:
            loading = isinstance(error, BackendBusy)
            backend.health.probe_failed(error.message, loading=loading)
        except Exception as error:  # a plugin's bug must not end the probing
            log.exception("probe raised", backend=backend.name)
            backend.health.probe_failed(f"the adapter's probe raised {error!r}")
        else:
            backend.health.probe_ok()

    async def _read_load(self, backend: Backend) -> None:
        settings = backend.settings
        while True:
            await asyncio.sleep(settings.load_interval)
            if backend.state() == "starting":
                continue
            try:
                async with asyncio.timeout(settings.probe_timeout):
                    reading = await backend.adapter.load()
            except (TimeoutError, BackendError):
                continue  # its age in the snapshot says so
            except Exception:  # a plugin's bug must not end the reading
                log.exception("load raised", backend=backend.name)
                continue
            if reading is not None:
                backend.reading, backend.read_at = reading, time.monotonic() - reading.age


def _pool(
    shares: Iterable[str], backends: Mapping[str, Backend]
) -> tuple[tuple[Backend, float], ...]:
    weights = shares if isinstance(shares, Mapping) else dict.fromkeys(shares)
    return tuple(
        (backends[name], share.weight if share is not None else 1.0)
        for name, share in weights.items()
    )


def describe(backend: Backend, models: list[str]) -> dict[str, object]:
    """A backend as the admin port shows it."""
    reading = backend.reading
    return {
        "name": backend.name,
        "adapter": backend.kind.name,
        "state": backend.state(),
        "reason": backend.health.reason,
        "in_flight": backend.in_flight,
        "max_in_flight": backend.slots,
        "running": reading.running if reading else None,
        "waiting": reading.waiting if reading else None,
        "kv_usage": reading.kv_usage if reading else None,
        "load_age": backend.load_age(),
        "ttft": backend.ttft,
        "models": models,
        "capabilities": structs.asdict(backend.capabilities) if backend.capabilities else None,
        "requests": backend.requests,
        "failures": backend.failures,
        "cache": backend.cache(),
    }
