"""Every span name and attribute key, in one place.

GenAI names follow the OpenTelemetry semantic conventions 1.41, the last version in the main
repository and the one that viewers read today; HTTP names follow the stable HTTP conventions. When
the GenAI names move on, this module is what changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from opentelemetry.util.types import AttributeValue

from forebay.api import Decision, EmbedRequest, GenerateRequest, Request, Usage

Attributes = dict[str, AttributeValue]

ROUTE_SPAN = "route"
QUEUE_SPAN, PREFILL_SPAN, DECODE_SPAN = "queue", "prefill", "decode"
#: Where the two are not told apart.
QUEUE_PREFILL_SPAN, INFERENCE_SPAN = "queue+prefill", "inference"

ERROR_TYPE = "error.type"
RESEND_COUNT = "http.request.resend_count"
SYNTHETIC = "forebay.synthetic"
TIMING_SOURCE = "forebay.timing_source"
USAGE_SOURCE = "forebay.usage_source"
LANE = "forebay.lane"
TIME_TO_FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
FINISH_REASONS = "gen_ai.response.finish_reasons"
RESPONSE_MODEL = "gen_ai.response.model"
RESPONSE_STATUS = "http.response.status_code"

#: `forebay.timing_source` of phases that the backend did not report.
GATEWAY = "gateway"
#: `error.type` of a client that left; nobody's fault, so the span's status stays unset.
CLIENT_DISCONNECTED = "client_disconnected"

#: Where the conventions have another name than the endpoint, or none and it keeps its own.
_OPERATIONS = {"chat": "chat", "completions": "text_completion"}
_METHODS = frozenset(
    {"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}
)
_SAMPLING = (
    ("max_tokens", "gen_ai.request.max_tokens"),
    ("temperature", "gen_ai.request.temperature"),
    ("top_p", "gen_ai.request.top_p"),
    ("frequency_penalty", "gen_ai.request.frequency_penalty"),
    ("presence_penalty", "gen_ai.request.presence_penalty"),
    ("seed", "gen_ai.request.seed"),
)
#: A model name is the client's to choose; longer ones are cut in spans and logs.
LONGEST_NAME = 128


def error_type(error: str) -> str:
    """The kind of an error as `error.type`; an outcome's ``client_disconnect`` counts as one."""
    return CLIENT_DISCONNECTED if error == "client_disconnect" else error


def server_span(route: str, method: str) -> tuple[str, Attributes]:
    """Name and attributes of the SERVER span; an unheard-of method becomes ``_OTHER``."""
    known = method in _METHODS
    name = f"{method if known else 'HTTP'} {route}".rstrip()
    return name, {
        "http.request.method": method if known else "_OTHER",
        "http.route": route,
        "url.path": route,
        "url.scheme": "http",
    }


def server_result(status: int, decision: Decision | None) -> Attributes:
    """What the SERVER span says at its end. 499 and 0 (nothing at all) were never sent."""
    attributes: Attributes = {} if status in (0, 499) else {RESPONSE_STATUS: status}
    if decision is None:
        return attributes
    attributes["forebay.request_id"] = decision.request_id
    attributes["forebay.tenant"] = decision.identity.tenant
    attributes["gen_ai.request.model"] = decision.model[:LONGEST_NAME]
    if decision.outcome is not None:
        attributes["forebay.outcome"] = decision.outcome.result
        attributes["forebay.queue_seconds"] = decision.outcome.queue
        attributes["forebay.overhead_seconds"] = decision.outcome.overhead
    return attributes


def route(decision: Decision) -> Attributes:
    """The routing decision: each candidate as ``name=score`` or ``name!veto``."""
    attributes: Attributes = {
        "forebay.policy": decision.policy,
        "forebay.policy_version": decision.policy_version,
        "forebay.candidates": [
            f"{c.backend}!{c.veto}" if c.score is None else f"{c.backend}={c.score:.4g}"
            for c in decision.candidates
        ],
        "forebay.order": decision.order,
        "forebay.probability": decision.probability,
    }
    if decision.arm:
        attributes["forebay.arm"] = decision.arm
    return attributes


def route_on_attempt(decision: Decision, backend: str) -> Attributes:
    """The decision in at most six attributes, so that an attempt explains itself."""
    attributes: Attributes = {
        "forebay.policy": decision.policy,
        "forebay.candidate_count": len(decision.candidates),
    }
    score = next((c.score for c in decision.candidates if c.backend == backend), None)
    if score is not None:
        attributes["forebay.score"] = score
    if decision.arm:
        attributes["forebay.arm"] = decision.arm
    return attributes


def attempt_span(request: Request) -> tuple[str, Attributes]:
    """Name and attributes of an attempt that stem from the request.

    Stop strings are left out: they are the client's text.
    """
    operation = _OPERATIONS.get(request.endpoint, request.endpoint)
    model = request.model[:LONGEST_NAME]
    attributes: Attributes = {
        "gen_ai.operation.name": operation,
        "gen_ai.request.model": model,
    }
    if isinstance(request, GenerateRequest):
        attributes["gen_ai.request.stream"] = request.stream
        if request.n != 1:
            attributes["gen_ai.request.choice.count"] = request.n
    elif isinstance(request, EmbedRequest) and request.dimensions is not None:
        attributes["gen_ai.embeddings.dimension.count"] = request.dimensions
    sampling = request.sampling
    for field, key in _SAMPLING:
        value = getattr(sampling, field)
        if value is not None:
            attributes[key] = value
    if sampling.top_k is not None:
        attributes["gen_ai.request.top_k"] = float(sampling.top_k)  # a double in 1.41
    return f"{operation} {model}", attributes


def backend(name: str, provider: str, address: str) -> Mapping[str, AttributeValue]:
    """Who is asked. ``address`` is a URL, ``host:port``, or the path of a Unix socket."""
    attributes: Attributes = {"forebay.backend": name, "gen_ai.provider.name": provider}
    parts = urlsplit(address if "//" in address else f"//{address}")
    if address.startswith("/") or not parts.hostname:
        if address:
            attributes["server.address"] = address
        return attributes
    attributes["server.address"] = parts.hostname
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    if port is not None:
        attributes["server.port"] = port
    return attributes


def usage(figures: Usage) -> Attributes:
    """Token counts; input tokens include those read from the cache."""
    attributes: Attributes = {
        "gen_ai.usage.input_tokens": figures.prompt_tokens,
        "gen_ai.usage.output_tokens": figures.completion_tokens,
    }
    if figures.cached_tokens is not None:
        attributes["gen_ai.usage.cache_read.input_tokens"] = figures.cached_tokens
    if figures.source == "counted":
        attributes[USAGE_SOURCE] = figures.source
    return attributes
