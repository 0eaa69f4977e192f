"""Asking the admin port of a running gateway."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
import httpx
import msgspec

from forebay.cli.group import Failed

__all__ = ["admin_option", "fetch", "json_option"]

Answer = TypeVar("Answer")
Function = Callable[..., Any]

#: Seconds. The admin port answers from memory.
_TIMEOUT = 10.0


def admin_option(function: Function) -> Function:
    return click.option(
        "--admin",
        "admin_url",
        metavar="URL",
        default="http://127.0.0.1:8001",
        show_default=True,
        envvar="FOREBAY_ADMIN",
        show_envvar=True,
        help="Admin port of the gateway.",
    )(function)


def json_option(function: Function) -> Function:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def fetch(base: str, path: str, kind: type[Answer], *, missing: str = "") -> Answer:
    """GET from the admin port; ``missing`` is said when it answers 404.

    :raises Failed: nobody answers, or not as Forebay's admin port does.
    """
    response = _get(base, path)
    if response.status_code == httpx.codes.NOT_FOUND and missing:
        raise Failed(missing)
    try:
        response.raise_for_status()
        return msgspec.json.decode(response.content, type=kind)
    except (httpx.HTTPStatusError, msgspec.DecodeError) as error:
        raise Failed(
            f"{base} answers {path} with HTTP {response.status_code}, but not as an admin port of "
            "this version does; is it the data port, or another program? Give the right one with "
            "--admin URL"
        ) from error


def _get(base: str, path: str) -> httpx.Response:
    try:
        # Proxies from the environment are for the internet, not for the gateway.
        with httpx.Client(timeout=_TIMEOUT, trust_env=False) as client:
            return client.get(f"{base.rstrip('/')}{path}")
    except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise click.BadParameter(
            f"'{base}' is not an http(s) URL; write one like http://127.0.0.1:8001",
            param_hint="--admin",
        ) from error
    except httpx.TransportError as error:
        raise Failed(
            f"cannot reach the admin port at {base}: {error or type(error).__name__}. "
            "Is `forebay serve` running? If its admin port is another one, give it with --admin URL"
        ) from error
