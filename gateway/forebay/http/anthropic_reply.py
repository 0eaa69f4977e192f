"""Anthropic's Messages API on the way out: events, messages and errors.

The order of events is the one that its SDKs rely on: ``message_start``, per block start, deltas
and stop, ``message_delta`` with the stop reason, ``message_stop``; each named in ``event:``.
"""

from __future__ import annotations

import msgspec

from forebay.api import (
    BackendGarbage,
    Delta,
    Finished,
    ForebayError,
    GenerateRequest,
    Tokens,
    Usage,
)
from forebay.attempt import Answered, FlightEvent
from forebay.http.encode import counted_mark
from forebay.http.reply import Reply, public_message
from forebay.http.segments import Segment, Segments, Step

_encode = msgspec.json.encode

_STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class ArgumentsGarbage(BackendGarbage):
    """What the model wrote; the backend is as healthy as before."""

    counts = False


class MessageReply(Reply):
    """The answer to ``/v1/messages``, streamed or whole."""

    def __init__(self, request: GenerateRequest) -> None:
        self._request = request
        self._segments = Segments(request.id)
        self._begun = False

    def chunk(self, event: FlightEvent) -> bytes:
        match event:
            case Delta():
                return self._start() + b"".join(map(_block_event, self._segments.take(event)))
            case Finished():
                closing = b"".join(map(_block_event, self._segments.close()))
                return self._start() + closing + self._stop(event.usage)
        raise TypeError(f"{event!r} is no typed event")

    def _start(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        return _event("message_start", message=self._message([], None, None))

    def _stop(self, usage: Usage | None) -> bytes:
        delta = {"stop_reason": self._stop_reason(), "stop_sequence": None}
        return _event("message_delta", delta=delta, usage=usage_object(usage)) + _event(
            "message_stop"
        )

    def _stop_reason(self) -> str:
        """Which stop sequence it was, or whether it was one, no backend's events tell."""
        reason = self._segments.finish or "stop"
        # Servers that were made to call a tool say "stop"; a client would not run the tool then.
        if self._segments.calls and reason == "stop":
            return "tool_use"
        return _STOP_REASONS[reason]

    def _message(
        self, content: list[dict[str, object]], stop_reason: str | None, usage: Usage | None
    ) -> dict[str, object]:
        return {
            "id": f"msg_{self._request.id}",
            "type": "message",
            "role": "assistant",
            "model": self._request.model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": None,
            "usage": usage_object(usage),
        }

    def add(self, event: FlightEvent) -> None:
        if isinstance(event, Delta):
            self._segments.take(event)

    def body(self, finished: Finished) -> bytes:
        cut = self._segments.finish == "length"
        content = [_whole_block(segment, cut) for segment in self._segments.all]
        return _encode(self._message(content, self._stop_reason(), finished.usage))

    def failure(self, error: ForebayError) -> bytes:
        return _sse("error", error_body(error))


class CountReply(Reply):
    """The answer to ``/v1/messages/count_tokens``."""

    def __init__(self) -> None:
        self._count = 0

    def chunk(self, event: FlightEvent) -> bytes:
        raise TypeError("a count is not streamed")

    def add(self, event: FlightEvent) -> None:
        if not isinstance(event, Answered) or not isinstance(event.result, Tokens):
            raise TypeError(f"{event!r} is no answer to a tokenize request")
        self._count = len(event.result.ids)

    def body(self, finished: Finished) -> bytes:
        return _encode({"input_tokens": self._count})

    def failure(self, error: ForebayError) -> bytes:
        return error_body(error)


def _block_event(step: Step) -> bytes:
    index = step.segment.index
    match step.kind:
        case "open":
            return _event("content_block_start", index=index, content_block=_block(step.segment))
        case "grow":
            return _event("content_block_delta", index=index, delta=_delta(step))
        case "close":
            return _event("content_block_stop", index=index)


def _block(segment: Segment, text: str = "", arguments: object = None) -> dict[str, object]:
    match segment.kind:
        case "text":
            return {"type": "text", "text": text}
        case "reasoning":
            return {"type": "thinking", "thinking": text, "signature": ""}
        case "call":
            name, call_id = segment.name, segment.call_id
            return {"type": "tool_use", "id": call_id, "name": name, "input": arguments or {}}


def _delta(step: Step) -> dict[str, str]:
    match step.segment.kind:
        case "text":
            return {"type": "text_delta", "text": step.piece}
        case "reasoning":
            return {"type": "thinking_delta", "thinking": step.piece}
        case "call":
            return {"type": "input_json_delta", "partial_json": step.piece}


def _whole_block(segment: Segment, cut: bool) -> dict[str, object]:
    if segment.kind != "call":
        return _block(segment, segment.content)
    return _block(segment, arguments=_arguments(segment, cut))


def _arguments(segment: Segment, cut: bool) -> dict[str, object]:
    """The arguments of a call; of one that was cut by the length limit none.

    :raises ArgumentsGarbage: they are no JSON object.
    """
    try:
        return msgspec.json.decode(segment.content or "{}", type=dict[str, object])
    except (msgspec.DecodeError, UnicodeEncodeError):
        if cut:
            return {}
        raise ArgumentsGarbage(
            f"the arguments with which the model calls {segment.name!r} are no JSON object"
        ) from None


def usage_object(usage: Usage | None) -> dict[str, object]:
    """Anthropic counts prompt tokens that came from the cache apart from the others."""
    if usage is None:
        return {"input_tokens": 0, "output_tokens": 0}
    cached = usage.cached_tokens or 0
    figures: dict[str, object] = {
        "input_tokens": usage.prompt_tokens - cached,
        "output_tokens": usage.completion_tokens,
    }
    if usage.cached_tokens is not None:
        figures["cache_read_input_tokens"] = cached
    return {**figures, **counted_mark(usage)}


def status(error: ForebayError) -> int:
    """Overload is 529 in this dialect."""
    return 529 if error.status == 503 else error.status


def error_body(error: ForebayError) -> bytes:
    """``{type: error, error: {type, message}}``."""
    code = status(error)
    fallback = "invalid_request_error" if code < 500 else "api_error"
    message = public_message(error)
    return _encode(
        {"type": "error", "error": {"type": _ERROR_TYPES.get(code, fallback), "message": message}}
    )


def _event(name: str, **fields: object) -> bytes:
    return _sse(name, _encode({"type": name, **fields}))


def _sse(name: str, data: bytes) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"
