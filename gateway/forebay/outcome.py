"""What became of a request, in one word: for metrics, logs, spans and decisions."""

from __future__ import annotations

import asyncio

from forebay.api import BackendError, ForebayError, NoBackend, Overloaded


def kind_of(error: BaseException) -> str:
    """The short word for metrics, logs and spans."""
    if isinstance(error, asyncio.CancelledError):
        return "client_disconnected"
    return error.kind if isinstance(error, ForebayError) else "internal_error"


def result_of(status: int, error: BaseException | None) -> str:
    """The outcome's one word, from a closed set."""
    if error is None:
        return "ok"
    if status == 499:
        return "client_disconnect"
    if isinstance(error, Overloaded | NoBackend):
        return "shed"
    if isinstance(error, BackendError):
        if status == 200:
            return "truncated"
        if error.status == 504:
            return "upstream_timeout"
        return "client_error" if error.status < 500 else "upstream_error"
    return "client_error" if 400 <= status < 500 else "internal_error"
