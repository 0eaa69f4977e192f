"""What OpenAI-shaped servers say when they refuse or fail, in any of their ways of saying it.

``{"error": {"message": …}}`` (vLLM, llama.cpp), ``{"object": "error", "message": …}`` (SGLang, old
vLLM), ``{"error": "text"}`` (TGI, Ollama), ``{"detail": …}`` (FastAPI), or plain text.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec
from msgspec import Struct

from forebay.api import (
    BackendBusy,
    BackendError,
    BackendFailed,
    BackendGarbage,
    BackendRefused,
)

__all__ = ["error_in", "error_of"]

#: 4xx that are the operator's affair, not the client's.
_OPERATOR = {
    401: "the backend refuses the gateway's key: check `api_key`",
    403: "the backend refuses the gateway's key: check `api_key`",
    404: "the backend does not know the model or the path: check `model` and `url`",
    405: "the backend does not know the path: check `url`",
    408: "the backend gave up waiting for the request",
}
#: llama.cpp's type for what OpenAI's clients know by this code.
_CODES = {"exceed_context_size_error": "context_length_exceeded"}
#: Characters of a backend's message that are passed on.
_LONGEST = 2000


class _Said(Struct):
    """What could be understood of an error body."""

    message: str = ""
    param: str | None = None
    code: str | None = None
    status: int = 0


def error_of(status: int, headers: Mapping[str, str], body: bytes) -> BackendError:
    """The error that an answer with this status is."""
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        content = body.decode(errors="replace")
    return _error(status, _understand(content), _seconds(headers.get("retry-after")))


def error_in(content: object) -> BackendError | None:
    """The error that stands in a 200: in an event of its stream, or in its body; None if none."""
    if not isinstance(content, dict):
        return BackendGarbage("the backend's answer is not a JSON object")
    if not content.get("error") and content.get("object") != "error":
        if "choices" in content:
            return None
        if "message" not in content and "detail" not in content:
            return BackendGarbage("the backend's answer has no choices")
    said = _understand(content)
    return _error(said.status or 500, said)


def _error(status: int, said: _Said, retry_after: float | None = None) -> BackendError:
    message = said.message[:_LONGEST] or f"the backend answered HTTP {status}"
    if status in (429, 503):
        return BackendBusy(message, retry_after=retry_after)
    if status in _OPERATOR:
        return BackendFailed(f"{_OPERATOR[status]} (HTTP {status}: {message})")
    if 400 <= status < 500:
        return BackendRefused(message, status=status, param=said.param, code=said.code)
    if 500 <= status < 600:
        return BackendFailed(message)
    return BackendGarbage(f"the backend answered HTTP {status} where 200 was expected")


def _understand(content: object) -> _Said:
    if isinstance(content, str):
        return _Said(message=content.strip())
    if not isinstance(content, dict):
        return _Said()
    error = content.get("error") or content
    if isinstance(error, str):
        return _Said(message=error)
    if not isinstance(error, dict):
        return _Said()
    code, kind = error.get("code"), error.get("type")
    return _Said(
        message=_text(error.get("message") or error.get("detail") or ""),
        param=_text(error.get("param") or "") or None,
        code=_CODES.get(str(kind)) or (code if isinstance(code, str) else None),
        status=code if isinstance(code, int) and 400 <= code < 600 else 0,
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _seconds(retry_after: str | None) -> float | None:
    """The header's delay: seconds or a date (RFC 9110, 10.2.3); None if absent or unreadable."""
    if not retry_after:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None
