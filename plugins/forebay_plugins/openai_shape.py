"""The parts of OpenAI's answers that the gateway reads: of a chunk as of a whole body."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from forebay.api import BackendFailed, BackendGarbage, StreamTruncated, Usage
from forebay_plugins.openai_errors import error_in

__all__ = ["Answer", "ReportedUsage", "decode", "finish_of", "seconds"]

_FINISHES = frozenset({"stop", "length", "tool_calls", "content_filter", "function_call"})


class PromptDetails(Struct):
    cached_tokens: int | None = None


class ReportedUsage(Struct):
    """OpenAI's ``usage`` object."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None

    def usage(self) -> Usage:
        details = self.prompt_tokens_details
        return Usage(
            prompt_tokens=self.prompt_tokens or 0,
            completion_tokens=self.completion_tokens or 0,
            cached_tokens=details.cached_tokens if details else None,
        )


class Choice(Struct):
    index: int = 0
    delta: dict[str, Any] | None = None
    text: str | None = None
    finish_reason: str | None = None


class Answer(Struct):
    """A chunk of a stream, or the body of an answer that does not stream."""

    choices: list[Choice]
    usage: ReportedUsage | None = None


def decode(data: bytes) -> tuple[dict[str, Any], Answer]:
    """The JSON object, and what of it the gateway reads.

    :raises BackendGarbage: it is not JSON, or not of OpenAI's shape.
    :raises BackendError: it is an error that came with a 200.
    """
    try:
        content = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise BackendGarbage("the backend's answer is not JSON") from None
    error = error_in(content)
    if error is not None:
        raise error
    try:
        return content, msgspec.convert(content, Answer)
    except msgspec.ValidationError as wrong:
        raise BackendGarbage(f"the backend's answer is not of OpenAI's shape: {wrong}") from None


def finish_of(reason: str) -> str:
    """A server's finish reason as one of OpenAI's; any other one (``eos``, ``repetition``) is stop.

    :raises StreamTruncated: the server gave the request up (vLLM ``abort``; TensorRT-LLM
        ``cancelled`` and ``timeout``).
    :raises BackendFailed: the server failed on it (vLLM ``error``).
    """
    if reason in ("abort", "cancelled", "timeout"):
        raise StreamTruncated(f"the backend gave the request up ({reason})")
    if reason == "error":
        raise BackendFailed("the backend failed while generating")
    return reason if reason in _FINISHES else "stop"


def seconds(milliseconds: object) -> float | None:
    """A figure that servers give in milliseconds; None if it is none."""
    return milliseconds / 1000 if isinstance(milliseconds, int | float) else None
