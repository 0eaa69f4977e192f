"""The native answers of text-generation-inference: events of `/generate_stream`, and errors.

An event is `data:{json}` without a space; there is no `[DONE]`: the event whose `generated_text` is
not null is the last. An error is an event too, in an answer with status 200.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec
from msgspec import Struct

from forebay.api import (
    BackendBusy,
    BackendError,
    BackendFailed,
    BackendGarbage,
    BackendRefused,
    Delta,
    FinishReason,
    StreamTruncated,
    Timings,
    TokenLogprob,
    Usage,
)
from forebay_plugins.openai_errors import code_of
from forebay_plugins.openai_shape import seconds
from forebay_plugins.stop_strings import StopStrings

__all__ = ["NativeStream", "failure", "kind_of", "timings_of", "trimmed", "whole"]

#: Bytes of the longest event; the last one repeats the whole text.
MAX_EVENT = 4 << 20
_FINISHES: Mapping[str, FinishReason] = {
    "eos_token": "stop",
    "stop_sequence": "stop",
    "length": "length",
}
_BUSY = frozenset({"overloaded", "healthcheck"})
_REFUSED = frozenset({"validation", "template_error", "missing_template_variable", "tool_error"})
#: How the messages of these errors begin; chat streams carry no error type.
_TEXTS = {
    "Model is overloaded": "overloaded",
    "Input validation error": "validation",
    "Template error": "template_error",
    "Missing template": "missing_template_variable",
    "Tool error": "tool_error",
}


class Token(Struct):
    id: int
    text: str
    logprob: float | None = None
    special: bool = False


class Details(Struct):
    finish_reason: str
    generated_tokens: int
    #: Only in streams, and since 3.0.
    input_length: int | None = None
    tokens: list[Token] = []
    top_tokens: list[list[Token]] = []


class Piece(Struct):
    """An event of the stream, or the whole answer, which has no ``token``."""

    token: Token | None = None
    top_tokens: list[Token] = []
    generated_text: str | None = None
    details: Details | None = None
    error: str | None = None
    error_type: str = ""


_PIECE = msgspec.json.Decoder(Piece)


class NativeStream:
    """One stream; feed it what the socket gives, then :meth:`end`."""

    def __init__(self, logprobs: bool) -> None:
        self._logprobs = logprobs
        self._rest = b""
        self.usage: Usage | None = None

    def feed(self, chunk: bytes) -> Iterator[Delta]:
        """What the events say that this chunk completes; nothing counts after the last event.

        :raises BackendError: one of them is an error, or none of TGI's.
        """
        *events, self._rest = (self._rest + chunk).split(b"\n\n")
        if len(self._rest) > MAX_EVENT:
            raise BackendGarbage(f"an event of the backend is longer than {MAX_EVENT} bytes")
        for event in events:
            if self.ended:
                return
            if event.startswith(b"data:"):  # the others are comments, to keep the connection up
                yield self._delta(_piece(event[5:]))

    @property
    def ended(self) -> bool:
        return self.usage is not None

    def end(self) -> Usage:
        """The body has ended.

        :raises StreamTruncated: the answer is not complete.
        """
        if self.usage is None:
            raise StreamTruncated("the backend's stream ended without a finish reason")
        return self.usage

    def _delta(self, piece: Piece) -> Delta:
        token = piece.token
        if token is None:
            raise BackendGarbage("an event of the backend has no token")
        reason: FinishReason | None = None
        if piece.generated_text is not None:
            reason, self.usage = _finish(piece.details, None)
        return Delta(
            text="" if token.special else token.text,
            finish_reason=reason,
            token_ids=(token.id,),
            logprobs=_logprobs([token], [piece.top_tokens]) if self._logprobs else (),
        )


def whole(body: bytes, logprobs: bool, headers: Mapping[str, str]) -> tuple[Delta, Usage]:
    """The answer of `/generate`; the length of the prompt stands in a header alone.

    :raises BackendGarbage: it is none.
    """
    piece = _piece(body)
    if piece.generated_text is None:
        raise BackendGarbage("the backend's answer has no generated_text")
    count = headers.get("x-prompt-tokens", "")
    reason, usage = _finish(piece.details, int(count) if count.isdecimal() else None)
    details = piece.details or Details("", 0)
    delta = Delta(
        text=piece.generated_text,
        finish_reason=reason,
        token_ids=tuple(token.id for token in details.tokens),
        logprobs=_logprobs(details.tokens, details.top_tokens) if logprobs else (),
    )
    return delta, usage


def _piece(data: bytes) -> Piece:
    try:
        piece = _PIECE.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
        raise BackendGarbage(f"the backend's answer is not of TGI's shape: {wrong}") from None
    if piece.error is not None:
        raise failure(piece.error, piece.error_type)
    return piece


def _finish(details: Details | None, prompt: int | None) -> tuple[FinishReason, Usage]:
    if details is None or details.finish_reason not in _FINISHES:
        raise BackendGarbage("the backend's answer does not say why it ended")
    length = details.input_length if details.input_length is not None else prompt
    source = Usage(
        prompt_tokens=length or 0,
        completion_tokens=details.generated_tokens,
        source="reported" if length is not None else "counted",
    )
    return _FINISHES[details.finish_reason], source


def _logprobs(tokens: Sequence[Token], tops: Sequence[Sequence[Token]]) -> tuple[TokenLogprob, ...]:
    """Of the visible tokens; ``tops`` is empty where none were asked for."""
    found = []
    for place, token in enumerate(tokens):
        if token.special or token.logprob is None:
            continue
        top = tops[place] if place < len(tops) else ()
        likeliest = [(t.text, t.logprob) for t in top if t.logprob is not None]
        best = sorted(likeliest, key=lambda pair: -pair[1])
        found.append(TokenLogprob(token.text, token.logprob, tuple(best)))
    return tuple(found)


def kind_of(message: str) -> str:
    """The ``error_type`` of an error that came without one; empty if its text does not tell."""
    return next((kind for begin, kind in _TEXTS.items() if message.startswith(begin)), "")


def failure(message: str, kind: str) -> BackendError:
    """The error of this ``error_type``; any but those known is the server's own fault."""
    if kind in _BUSY:
        return BackendBusy(message)
    if kind in _REFUSED:
        return BackendRefused(message, status=422, code=code_of(message))
    return BackendFailed(message)


def timings_of(headers: Mapping[str, str]) -> Timings | None:
    """Of an answer that did not stream; others have no such headers."""
    queue, inference = (_number(headers.get(f"x-{name}-time")) for name in ("queue", "inference"))
    if queue is None and inference is None:
        return None
    return Timings(queue=queue, inference=inference, source="tgi.headers")


def _number(milliseconds: str | None) -> float | None:
    if milliseconds is None or not milliseconds.isdecimal():
        return None
    return seconds(int(milliseconds))


def trimmed(delta: Delta, stops: StopStrings) -> Delta:
    """Without the stop string: TGI, unlike OpenAI, sends it along, and sees it only where a token
    ends with it. What it generates beyond one is dropped, but counted."""
    beyond = stops.found
    text = stops.feed(delta.text)
    reason = delta.finish_reason
    if reason is not None:
        text += stops.end()
        reason = "stop" if stops.found else reason
    if beyond:
        return Delta(delta.index, text, reason)
    return msgspec.structs.replace(delta, text=text, finish_reason=reason)
