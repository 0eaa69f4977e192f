"""What OpenAI-shaped servers say when they refuse or fail, in any of their ways of saying it.

``{"error": {"message": …}}`` (vLLM, llama.cpp), ``{"object": "error", "message": …}`` (SGLang, old
vLLM), ``{"error": "text"}`` (TGI, Ollama), ``{"detail": …}`` (FastAPI), or plain text.
"""

from __future__ import annotations

import re
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

__all__ = ["code_of", "error_in", "error_of"]

#: 4xx that are the operator's affair, not the client's.
_OPERATOR = {
    401: "the backend refuses the gateway's key: check `api_key`",
    403: "the backend refuses the gateway's key: check `api_key`",
    404: "the backend does not know the model or the path: check `model` and `url`",
    405: "the backend does not know the path: check `url`",
    408: "the backend gave up waiting for the request",
}
#: What OpenAI's clients shorten a conversation for.
_TOO_LONG = "context_length_exceeded"
#: In whose words prompt, or prompt and answer together, exceed what the model can hold.
_TOO_LONG_WORDS = re.compile(
    r"maximum context length"  # OpenAI, vLLM, SGLang
    r"|longer than the (?:maximum model|model's context) length"  # vLLM's engine, SGLang
    r"|tokens\) exceeds the maximum allowed length"  # SGLang
    r"|exceeds the available context size"  # llama.cpp
    r"|`inputs` must have less than \d+ tokens"  # TGI
    r"|`inputs` tokens \+ `max_new_tokens` must be"  # TGI
    r"|sum of prompt length .* should not exceed max_(?:num_tokens|seq_len)"  # TensorRT-LLM
    r"|Prompt length \(\d+\) exceeds maximum (?:input|sequence) length"  # its older engines
    r"|prompt is too long: \d+ tokens"  # Anthropic
    r"|the context holds \d+ tokens, but"  # our engine
)
#: What vLLM calls a prompt or messages that are too long.
_NO_FIELDS = ("input_tokens", "input_text")
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
        code = said.code or code_of(message)
        return BackendRefused(message, status=status, param=said.param, code=code)
    if code_of(message) and 500 <= status < 600:  # Triton's backends blame themselves
        return BackendRefused(message, code=code_of(message))
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
        param=_param(error.get("param")),
        code=_TOO_LONG if kind == "exceed_context_size_error" else _string(code),
        status=code if isinstance(code, int) and 400 <= code < 600 else 0,
    )


def code_of(message: str) -> str | None:
    """OpenAI's code for a refusal in these words; None if it has none, or they are not known."""
    return _TOO_LONG if _TOO_LONG_WORDS.search(message) else None


def _param(value: object) -> str | None:
    """The field at fault, if it is one that a client can have sent."""
    return None if not value or value in _NO_FIELDS else _text(value)


def _string(value: object) -> str | None:
    return value if isinstance(value, str) else None


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
