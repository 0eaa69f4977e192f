"""How answers leave: the seam of a dialect, and plain answers written straight to ASGI."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from litestar.types import Send

from forebay.api import (
    BackendError,
    BackendRefused,
    BackendTimeout,
    Endpoint,
    Finished,
    ForebayError,
    Identity,
    Request,
)
from forebay.attempt import FlightEvent
from forebay.config import Limits

Headers = list[tuple[bytes, bytes]]

_PATH_TYPE = re.compile(r":\w+}")


class Reply(ABC):
    """The answer to one request, in its client's dialect."""

    #: Of a whole body.
    content_type: bytes = b"application/json"
    #: Further headers of a whole body.
    headers: Sequence[tuple[bytes, bytes]] = ()

    @abstractmethod
    def chunk(self, event: FlightEvent) -> bytes:
        """What a streaming client is sent for this event; may be empty."""

    @abstractmethod
    def add(self, event: FlightEvent) -> None:
        """Take an event of an answer that does not stream."""

    @abstractmethod
    def body(self, finished: Finished) -> bytes:
        """The whole answer, once all events have been added."""

    @abstractmethod
    def failure(self, error: ForebayError) -> bytes:
        """What a streaming client is sent when the stream breaks: never a success."""


def own_status(error: ForebayError) -> int:
    return error.status


class Dialect(msgspec.Struct, frozen=True):
    """A route of the data port that takes a body and asks a backend."""

    #: For metrics: a closed set.
    endpoint: Endpoint | str
    #: A Litestar path.
    route: str
    #: Body, limits, request id, Unix seconds, who asks, path parameters and headers.
    decode: Callable[[Arrival, Limits], tuple[Request, Reply]]
    #: The body of an error response.
    error_body: Callable[[ForebayError], bytes]
    #: The HTTP status of an error response.
    status: Callable[[ForebayError], int] = own_status

    @property
    def template(self) -> str:
        """The route for people and traces, without Litestar's types: ``/v2/models/{model}``."""
        return _PATH_TYPE.sub("}", self.route)


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """A request as it came, with what the gateway knows of it already."""

    body: bytes
    request_id: str
    #: Unix seconds.
    created: int
    identity: Identity
    headers: Mapping[str, str]
    #: Of the route's path.
    parameters: Mapping[str, str]


def public_message(error: ForebayError) -> str:
    """What a client is told, the field named first.

    Where a backend stands and what it said in failing is the operator's affair, in the log.
    """
    message = error.message
    if isinstance(error, BackendError) and not isinstance(error, BackendRefused | BackendTimeout):
        message = f"no backend could serve the request ({error.kind}); the gateway's log says why"
    return f"{error.param}: {message}" if error.param else message


def error_object(error: ForebayError) -> dict[str, Any]:
    """``message, type, param, code``: the four that every OpenAI client reads."""
    return {
        "error": {
            "message": public_message(error),
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def openai_error(error: ForebayError) -> bytes:
    return msgspec.json.encode(error_object(error))


def internal_error() -> ForebayError:
    """What a client is told of a bug: nothing but where it is written down."""
    return ForebayError("an error inside the gateway; its log says more under the request id")


def error_headers(error: ForebayError) -> Headers:
    """``retry-after`` where it helps: whole seconds, and milliseconds for those who read them."""
    if error.retry_after is None:
        return []
    return [
        (b"retry-after", str(max(1, math.ceil(error.retry_after))).encode()),
        (b"retry-after-ms", str(max(1, round(error.retry_after * 1000))).encode()),
    ]


async def send_body(
    send: Send,
    status: int,
    headers: Headers,
    body: bytes,
    content_type: bytes = b"application/json",
) -> None:
    """A whole response."""
    head: Headers = [
        (b"content-type", content_type),
        (b"content-length", str(len(body)).encode()),
        *headers,
    ]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def send_error(send: Send, dialect: Dialect, error: ForebayError, headers: Headers) -> None:
    """An error response in the client's dialect."""
    all_headers = [*headers, *error_headers(error)]
    await send_body(send, dialect.status(error), all_headers, dialect.error_body(error))
