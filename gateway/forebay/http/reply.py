"""Plain answers and errors in OpenAI's shape, written straight to ASGI."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from litestar.types import Send

from forebay.api import BackendError, BackendRefused, BackendTimeout, ForebayError

Headers = list[tuple[bytes, bytes]]

JSON = (b"content-type", b"application/json")


def error_object(error: ForebayError) -> dict[str, Any]:
    """``message, type, param, code``: the four that every OpenAI client reads."""
    message = _public_message(error)
    return {
        "error": {
            "message": f"{error.param}: {message}" if error.param else message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def _public_message(error: ForebayError) -> str:
    """Where a backend stands and what it said in failing is the operator's affair, in the log."""
    if isinstance(error, BackendError) and not isinstance(error, BackendRefused | BackendTimeout):
        return f"no backend could serve the request ({error.kind}); the gateway's log says why"
    return error.message


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


async def send_body(send: Send, status: int, headers: Headers, body: bytes) -> None:
    """A whole response."""
    length = (b"content-length", str(len(body)).encode())
    await send(
        {"type": "http.response.start", "status": status, "headers": [JSON, length, *headers]}
    )
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def send_error(send: Send, error: ForebayError, headers: Headers) -> None:
    body = msgspec.json.encode(error_object(error))
    await send_body(send, error.status, [*headers, *error_headers(error)], body)
