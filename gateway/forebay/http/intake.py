"""What arrives: headers within bounds, a usable request id, a body within bounds and in time."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterable, Mapping

from litestar.types import Receive

from forebay.api import ForebayError, RequestError, TooLarge

# Longer than any sane client needs for 8 MiB; shorter than a slow-body attack would like.
BODY_SECONDS = 30.0

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")


class HeadersTooLarge(RequestError):
    kind = "headers_too_large"
    status = 431


class BodyTimeout(RequestError):
    kind = "body_timeout"
    status = 408


class ClientLeft(ForebayError):
    """The client went away; nobody will read what we answer."""

    kind = "client_disconnected"
    status = 499


def read_headers(raw: Iterable[tuple[bytes, bytes]], limit: int) -> Mapping[str, str]:
    """Lower-case names; of a repeated header the last value.

    :raises HeadersTooLarge: names and values together have more than ``limit`` bytes.
    """
    headers: dict[str, str] = {}
    size = 0
    for name, value in raw:
        size += len(name) + len(value)
        headers[name.decode("latin-1")] = value.decode("latin-1")
    if size > limit:
        raise HeadersTooLarge(f"the headers have {size} bytes; at most {limit} are allowed")
    return headers


def request_id(headers: Mapping[str, str]) -> str:
    """The client's, if it is harmless to log; else a new one."""
    given = headers.get("x-request-id")
    return given if given and _REQUEST_ID.match(given) else os.urandom(16).hex()


async def read_body(receive: Receive, headers: Mapping[str, str], limit: int) -> bytes:
    """The whole body.

    :raises TooLarge: it has more than ``limit`` bytes; known from its length before any is read.
    :raises BodyTimeout: it did not come within 30 s.
    :raises ClientLeft: the client closed the connection in the middle.
    """
    declared = headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    message = await _receive(receive, BODY_SECONDS)
    body = message.get("body", b"")
    if not message.get("more_body"):
        return body
    parts = bytearray(body)
    end = asyncio.get_running_loop().time() + BODY_SECONDS
    while message.get("more_body"):
        message = await _receive(receive, end - asyncio.get_running_loop().time())
        parts += message.get("body", b"")
        if len(parts) > limit:
            raise _too_large(limit)
    return bytes(parts)


async def _receive(receive: Receive, seconds: float) -> dict[str, bytes]:
    try:
        async with asyncio.timeout(seconds):
            message = await receive()
    except TimeoutError:
        raise BodyTimeout(f"the body did not come within {BODY_SECONDS:g} s") from None
    if message["type"] == "http.disconnect":
        raise ClientLeft("the client closed the connection")
    return message  # type: ignore[return-value]  # an http.request message


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body has more than {limit} bytes, the most that is allowed here")
