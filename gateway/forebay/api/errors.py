"""The exception tree.

    ForebayError
    ├── ConfigError                 the configuration is wrong; the program does not start
    ├── PluginError                 a plugin cannot be loaded or broke its contract
    ├── RequestError                the client's request is refused          (HTTP 4xx)
    │   ├── Unauthorized            no or wrong API key                      (401)
    │   ├── UnknownModel            no such model here                       (404)
    │   ├── TooLarge                body over the limit                      (413)
    │   └── Unsupported             no backend of this model can do it       (400)
    ├── Overloaded                  queue full or queue timeout              (503)
    ├── NoBackend                   nothing healthy serves this model        (503)
    └── BackendError                an attempt on a backend failed
        ├── ConnectFailed           nothing listens, or connect timed out    (502)
        ├── StaleConnection         a kept-alive connection was gone         (502)
        ├── BackendRefused          4xx: the request's fault, passed through (4xx)
        ├── BackendBusy             429 or 503: full, loading or draining    (503)
        ├── BackendFailed           any other 5xx, or an error event         (502)
        ├── BackendTimeout          first token, inter-token or total        (504)
        ├── BackendGarbage          the answer is not in the protocol        (502)
        └── StreamTruncated         the stream ended without a finish        (502)

Each class has a short, stable ``kind``: the label in metrics, logs and spans, and the ``code`` of
the OpenAI error object unless the error carries a more precise one.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "BackendBusy",
    "BackendError",
    "BackendFailed",
    "BackendGarbage",
    "BackendLacks",
    "BackendRefused",
    "BackendTimeout",
    "ConfigError",
    "ConnectFailed",
    "ForebayError",
    "NoBackend",
    "Overloaded",
    "PluginError",
    "RequestError",
    "StaleConnection",
    "StreamTruncated",
    "TooLarge",
    "Unanswered",
    "Unauthorized",
    "UnknownModel",
    "Unsupported",
]


class ForebayError(Exception):
    """Root of the tree.

    ``message`` is shown to the person who can act on it; ``retry_after`` is in seconds.
    """

    kind: ClassVar[str] = "internal_error"
    status: int = 500
    type: ClassVar[str] = "server_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.kind
        self.retry_after = retry_after


class ConfigError(ForebayError):
    kind = "config_error"


class PluginError(ForebayError):
    kind = "plugin_error"


class RequestError(ForebayError):
    """The request is refused; ``param`` names the field, the message says what is accepted."""

    kind = "invalid_request"
    status = 400
    type = "invalid_request_error"


class Unauthorized(RequestError):
    kind = "invalid_api_key"
    status = 401
    type = "authentication_error"


class UnknownModel(RequestError):
    kind = "model_not_found"
    status = 404


class TooLarge(RequestError):
    kind = "request_too_large"
    status = 413


class Unsupported(RequestError):
    """No backend of this model has the capability that the request needs."""

    kind = "unsupported"


class Overloaded(ForebayError):
    """Too much for all backends together. Not 429: that is for a client over its own limit."""

    kind = "overloaded"
    status = 503
    type = "service_unavailable_error"


class NoBackend(ForebayError):
    kind = "no_backend_available"
    status = 503
    type = "service_unavailable_error"


class BackendError(ForebayError):
    """One attempt on one backend failed.

    ``retryable``: another candidate may be tried, as long as no byte has reached the client.
    ``counts``: the failure speaks against the backend's health.
    """

    kind = "backend_error"
    status = 502
    type = "upstream_error"
    retryable: bool = True
    counts: bool = True


class ConnectFailed(BackendError):
    kind = "connect_failed"


class Unanswered(ConnectFailed):
    """The server took the request, and closed the connection without a word."""


class StaleConnection(BackendError):
    """The server closed a kept-alive connection under us: says nothing about its health."""

    kind = "stale_connection"
    counts = False


class BackendRefused(BackendError):
    """A 4xx of the backend, passed through: elsewhere the request would be at fault as well."""

    kind = "backend_refused"
    type = "invalid_request_error"
    retryable = False
    counts = False

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.status = status


class BackendLacks(BackendRefused):
    """The request cannot be put in this backend's words: another one may have them."""

    retryable = True


class BackendBusy(BackendError):
    """429 or 503: the backend is full, loading or draining. Never ejects it by itself."""

    kind = "backend_busy"
    status = 503
    counts = False


class BackendFailed(BackendError):
    kind = "backend_failed"


class BackendTimeout(BackendError):
    """``phase``: ``first_token``, ``inter_token`` or ``total``; the code: ``<phase>_timeout``."""

    kind = "backend_timeout"
    status = 504

    def __init__(self, phase: str, seconds: float) -> None:
        super().__init__(
            f"the backend exceeded the {phase} timeout of {seconds:g} s",
            code=f"{phase}_timeout",
        )
        self.phase = phase
        # All the time that the request had is used up, by whomever: nobody else could make it.
        self.retryable = self.counts = phase != "total"


class BackendGarbage(BackendError):
    kind = "backend_garbage"


class StreamTruncated(BackendError):
    kind = "stream_truncated"
