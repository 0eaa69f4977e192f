"""The live backends: their load as this gateway sees it, their health, their probes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping

import structlog

from forebay.api import BackendBusy, BackendError
from forebay.backend import Backend
from forebay.cached_blocks import CachedBlocks, follow
from forebay.config import Config
from forebay.examiner import Examiner

log = structlog.get_logger("forebay.fleet")

#: Probes within a probe interval: a loading backend is asked 50 times, one that is gone 5 times.
_HASTE = {"healthy": 1, "starting": 50}


class Fleet:
    """All backends, probed in the background from :meth:`start` to :meth:`aclose`."""

    def __init__(self, config: Config, backends: Mapping[str, Backend]) -> None:
        self.backends = dict(backends)
        self._pools = {
            name: _pool(model.backends, self.backends) for name, model in config.models.items()
        }
        self._tasks: list[asyncio.Task[None]] = []
        self._examiners = {
            backend.name: Examiner(backend, model, lambda: self.on_change())
            for model, pool in reversed(self._pools.items())
            for backend, _ in pool
            if backend.settings.examine
        }
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
        await asyncio.gather(*(examiner.aclose() for examiner in self._examiners.values()))
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
            pause = settings.probe_interval / _HASTE.get(after, 5)
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
        examiner = self._examiners.get(backend.name)
        try:
            async with asyncio.timeout(timeout):
                found = backend.capabilities = await backend.adapter.probe()
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
            if examiner is not None:
                examiner.probed(found)
        if examiner is not None and backend.state() == "unhealthy":
            examiner.lost()

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
