"""The configuration: one typed tree. A field's docstring is its manual (docs/configuration.md)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from forebay.api import BackendSettings, Timeouts

Port = Annotated[int, Meta(ge=0, le=65535)]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]
KeyHash = Annotated[
    str,
    Meta(
        pattern="^sha256:[0-9a-fA-F]{64}$",
        description="`sha256:` and 64 hex digits, as `forebay key new` prints them",
    ),
]


class Section(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Base of every section: frozen, unknown keys refused."""


class Listen(Section, frozen=True):
    """The data port."""

    host: str = "127.0.0.1"
    """Address to bind. Anything but loopback needs `keys`, or `--insecure`."""
    port: Port = 8000
    """TCP port; 0: any free one."""


class Admin(Section, frozen=True):
    """The admin port: health, metrics, decisions, fleet. Never share it with clients."""

    host: str = "127.0.0.1"
    """Address to bind."""
    port: Port = 8001
    """TCP port; 0: any free one."""


class Limits(Section, frozen=True):
    """What a single request may ask for. Each refusal names its field."""

    body_bytes: Positive = 8 << 20
    """Largest request body in bytes (413 above)."""
    header_bytes: Positive = 32 << 10
    """Largest sum of header names and values in bytes (431 above)."""
    json_depth: Positive = 64
    """Deepest nesting of the JSON body."""
    n: Positive = 16
    """Most choices (`n` times the number of prompts)."""
    max_tokens: Positive = 131_072
    """Largest `max_tokens` or `max_completion_tokens`."""
    stop: Count = 16
    """Most stop strings."""
    stop_bytes: Positive = 1024
    """Longest stop string, in bytes."""
    stored_bytes: Count = 64 << 20
    """Memory for `/v1/responses` that were stored, in bytes per tenant; 0: none is kept."""
    inputs: Positive = 2048
    """Most inputs of an embeddings request."""
    documents: Positive = 1000
    """Most documents of a rerank request, or pairs of texts of a score request."""


class Share(Section, frozen=True):
    """A backend's part in a model."""

    weight: Annotated[float, Meta(gt=0)] = 1.0
    """Relative share of the traffic, greater than 0, for the policies that weigh."""


class SamplingDefaults(Section, frozen=True):
    """What holds for requests to a model where the client says nothing. Unset: the neutral value,
    by which every token keeps its probability, unless a backend has `neutral_sampling: false`."""

    temperature: Annotated[float, Meta(ge=0)] | None = None
    """Divides the logits; 0: the likeliest token always. Neutral: 1."""
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    """Share of probability from which is drawn. Neutral: 1."""
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    """Likeliest tokens from which is drawn. Neutral: -1, all."""
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    """Least probability of a token, as a share of the likeliest one's. Neutral: 0."""
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    """Taken off a logit for each time that its token was generated. Neutral: 0."""
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    """Taken off a logit once its token was generated. Neutral: 0."""
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    """Divides the logits of tokens that stand in prompt or answer. Neutral: 1."""
    max_tokens: Positive | None = None
    """Longest answer in tokens. Unset: 16 for completions, what the context holds for chats."""


class Model(Section, frozen=True):
    """A model name that clients may ask for."""

    backends: list[str] | dict[str, Share]
    """Names of the backends that serve it, or a map from name to `{weight: …}`."""
    policy: str | dict[str, Any] = "prefix_affinity"
    """Name of a policy, `{name: …, option: …}`, or `./file.py:Class`."""
    timeouts: Timeouts = Timeouts()
    """How long the parts of a request may take; 0 switches one off, but for `connect`."""
    max_attempts: Positive = 3
    """Backends tried for one request before its first byte, at most."""
    max_queue: Count = 256
    """Requests that may wait for a free backend; more are refused with 503. 0: none may wait."""
    queue_timeout: Seconds = 30.0
    """Seconds a request may wait for a free backend."""
    sampling: SamplingDefaults = SamplingDefaults()
    """Sampling fields that clients leave out, e.g. those that the model's authors recommend."""


class Health(Section, frozen=True):
    """When a backend is taken out, and when it comes back."""

    failures: Count = 3
    """Consecutive failed attempts that eject a backend; 0: never."""
    probe_failures: Positive = 2
    """Consecutive failed probes after which a backend counts as unhealthy."""
    ejection: Seconds = 5.0
    """Seconds of the first ejection; doubles with each one in a row."""
    ejection_max: Seconds = 60.0
    """Longest ejection in seconds."""


class Key(Section, frozen=True):
    """An API key. The key itself is never stored."""

    hash: KeyHash
    """`sha256:<64 hex digits>` of the key; `forebay key new` makes both."""
    tenant: str = "default"
    """Whom its requests belong to."""


class Tracing(Section, frozen=True):
    """OpenTelemetry."""

    otlp_endpoint: str = ""
    """Base URL of an OTLP/HTTP collector, e.g. `http://127.0.0.1:4318`; empty: no spans."""
    service_name: str = "forebay"
    """`service.name` of the exported spans."""
    sample: Annotated[float, Meta(ge=0, le=1)] = 1.0
    """Share of new traces that are recorded, 0 to 1; an incoming trace keeps its own decision."""


class Logging(Section, frozen=True):
    """Logs on standard error. Prompts and answers are never logged."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level shown."""
    format: Literal["json", "console"] = "json"
    """One JSON object a line, or text for people."""


class Plugins(Section, frozen=True):
    """Which plugins are loaded."""

    only: list[str] | None = None
    """Names of the entry points to load; unset: all that are installed."""


class Config(Section, frozen=True):
    """The whole file."""

    backends: dict[str, BackendSettings] = {}
    """Backends by name; which further keys one takes depends on its `adapter`."""
    models: dict[str, Model] = {}
    """Model names by which clients ask; several backends may stand behind one."""
    listen: Listen = Listen()
    """The data port."""
    admin: Admin = Admin()
    """The admin port."""
    keys: dict[str, Key] = {}
    """API keys by name; empty: none is asked for."""
    limits: Limits = Limits()
    """What a single request may ask for."""
    health: Health = Health()
    """When backends are taken out."""
    tracing: Tracing = Tracing()
    """Spans."""
    logging: Logging = Logging()
    """Logs."""
    plugins: Plugins = Plugins()
    """Plugins."""
    drain_timeout: Seconds = 30.0
    """Seconds that open requests may still take after SIGTERM."""
    data_dir: str = "~/.cache/forebay"
    """Where models and sockets are kept."""
    decisions: Positive = 10_000
    """Decision records kept in memory for `forebay explain`."""
