"""The seam to a backend: :class:`Adapter`, and :class:`AdapterKind` with which a plugin offers one.

An adapter turns everything its backend does differently into the one model of
:mod:`forebay.api.messages`. See ``docs/writing-an-adapter.md``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from forebay.api.cache import CacheBatch
from forebay.api.errors import Unsupported
from forebay.api.http import Upstream
from forebay.api.messages import Attempt, Endpoint, Event, GenerateRequest
from forebay.api.operations import Operation, Result

__all__ = [
    "Adapter",
    "AdapterContext",
    "AdapterKind",
    "BackendSettings",
    "Capabilities",
    "Distribution",
    "HttpBackendSettings",
    "Load",
]


class BackendSettings(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What every backend can be configured with; an adapter's own settings derive from it."""

    adapter: str
    """Name of the adapter kind, as `forebay plugins` lists them."""
    max_in_flight: Annotated[int, Meta(ge=0)] = 0
    """Requests sent to this backend at once; 0: as many as it reports slots, or no limit."""
    probe_interval: Annotated[float, Meta(gt=0)] = 5.0
    """Seconds between two health probes."""
    probe_timeout: Annotated[float, Meta(gt=0)] = 3.0
    """Seconds after which a probe has failed."""
    load_interval: Annotated[float, Meta(ge=0)] = 1.0
    """Seconds between two readings of the backend's own load figures; 0: never read."""
    exports_traces: bool = False
    """The backend exports spans of its own, so none are synthesised from its timings."""
    neutral_sampling: bool = True
    """Sampling fields that neither the client nor `models.NAME.sampling` sets are sent with the
    value that changes nothing, so that all backends sample alike; false: the server's own defaults
    apply."""
    examine: bool = True
    """Ask it some eight short questions when it joins and when its version or models change:
    whether schemas, stop strings, tools, logprobs, usage and cancelling really work. Together at
    most 300 tokens are generated; 1024 more where cancelling does not work. `false`: nothing is
    asked, and what the adapter claims is believed."""


class HttpBackendSettings(BackendSettings, kw_only=True, frozen=True):
    """Settings of backends that are reached by HTTP."""

    url: str
    """Base URL without `/v1`, e.g. `http://127.0.0.1:8081`."""
    model: str = ""
    """Name of the model at the backend; empty: the name under which Forebay serves it."""
    api_key: str = ""
    """Sent as a bearer token; empty: none. Use `${NAME}` to take it from the environment."""
    headers: dict[str, str] = {}
    """Further headers sent with every request."""


class Capabilities(Struct, frozen=True, kw_only=True):
    """What a probe found. A request is only sent where its needs are met.

    ``tools``, ``schema``, ``logprobs`` and ``stop`` are claims: the gateway asks the backend small
    questions and believes what it finds, unless :attr:`BackendSettings.examine` is off.
    """

    endpoints: frozenset[Endpoint] = frozenset({"chat", "completions"})
    tools: bool = False
    schema: bool = False
    logprobs: bool = False
    multimodal: bool = False
    #: Takes fields beyond the model (``GenerateRequest.extra``): they are passed on as they came.
    extra_fields: bool = True
    #: Tokens of prompt and answer together; 0: not known.
    max_context: int = 0
    #: Requests it works on at once; 0: not known.
    slots: int = 0
    version: str = ""
    models: tuple[str, ...] = ()
    stop: bool = True
    #: Choices of one prompt (``n``) that it gives; 0: any number, or not known.
    max_choices: int = 0
    #: Answers ``echo`` with ``max_tokens`` 0: the prompt with its log probabilities, and no more.
    scoring: bool = False
    #: Of further fields (``GenerateRequest.extra``), those that it takes if not all of them.
    fields: frozenset[str] = frozenset()


class Distribution(Struct, frozen=True):
    """How often a value lay at or below each bound and above the one before; then, above all."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


class Load(Struct, frozen=True, kw_only=True):
    """A backend's own view of its load. ``None``: it does not say."""

    running: int | None = None
    waiting: int | None = None
    #: Share of the KV cache in use, 0 to 1.
    kv_usage: float | None = None
    #: Seconds since the backend said so.
    age: float = 0.0
    #: What else is worth watching, by names of lower-case letters, digits and underscores; shown
    #: as metrics ``forebay_engine_*``: totals since its start, how things stand, distributions.
    counters: Mapping[str, float] = {}
    gauges: Mapping[str, float] = {}
    distributions: Mapping[str, Distribution] = {}


class AdapterContext(Struct, frozen=True, kw_only=True):
    """What the gateway hands to an adapter when it builds it."""

    #: The configured name of the backend.
    name: str
    #: Opens the transport to a base URL.
    connect: Callable[[str], Upstream]
    #: Where long-lived files (models, sockets) may be kept.
    data_dir: Path
    #: Environment for processes that the adapter starts (OTLP endpoint and the like).
    environment: Mapping[str, str] = {}


class Adapter(ABC):
    """One backend. Built without side effects; ``start`` is where work begins."""

    async def start(self) -> None:  # noqa: B027 - a default, to be overridden where there is work
        """Begin: spawn a process, open what must stay open. Called once, before any probe.

        Must not wait for a slow backend to be ready: a probe will tell when it is.
        """

    @abstractmethod
    def stream(self, request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        """Serve a request.

        An async generator. Either lane, never mixed: ``Started Delta* Finished`` or ``Relayed+
        Finished``. For a request that does not stream, either is fine too: one ``Relayed`` with the
        whole JSON body, or the typed events, which the gateway puts together. A request with
        ``typed`` set takes the typed events alone. Closing the generator
        (``aclose``) or cancelling the task must close the upstream at once. The gateway enforces
        the timeouts other than ``connect`` by cancelling.

        :raises BackendError: see :mod:`forebay.api.errors` for the cases.
        """

    @abstractmethod
    async def probe(self) -> Capabilities:
        """Ask the backend whether it is ready and what it can do. Cheap: runs every few seconds.

        :raises BackendError: it is not ready.
        """

    async def perform(self, request: Operation, attempt: Attempt) -> Result:
        """Do work that is no generation: embed, rerank, score, tokenize, detokenize, infer.

        Only asked for what ``Capabilities.endpoints`` names. Cancelling must close the upstream.

        :raises BackendError: as for :meth:`stream`.
        """
        raise Unsupported(f"this backend cannot serve {request.endpoint}")

    async def load(self) -> Load | None:
        """Read the backend's own load figures; None if it has none."""
        return None

    def cache_events(self) -> AsyncGenerator[CacheBatch, None] | None:
        """What happens in the backend's prefix cache; None if it does not tell (the default).

        Asked after :meth:`start`, and again when it has raised. The generator runs as long as the
        gateway and waits where there is nothing to tell, also for a backend that is not there. It
        begins with what is in the cache, as far as the backend can tell. Blocks that are told of
        are in the cache; not all that are in it need to be told of. Whenever events may have been
        lost, it says so with a ``CacheCleared`` before it goes on.

        :raises BackendError: the backend cannot be understood; what it told is dropped, and it is
            asked again after ``probe_interval``.
        """
        return None

    async def aclose(self) -> None:  # noqa: B027 - a default, to be overridden where there is work
        """End: close connections, stop processes. Calling it twice is fine."""


class AdapterKind(Struct, frozen=True, kw_only=True):
    """How a plugin offers a kind of backend."""

    #: What stands after ``adapter:`` in the configuration. Unique.
    name: str
    #: A subclass of :class:`BackendSettings`.
    settings: type[BackendSettings]
    build: Callable[[Any, AdapterContext], Adapter]
    #: One line for ``forebay plugins``.
    summary: str = ""
    #: ``gen_ai.provider.name`` on spans and metrics; the kind's name if empty.
    provider: str = ""
