"""The events of a message that Anthropic's API streams, as those of the typed lane."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec
from msgspec import Struct

from forebay.api import (
    BackendBusy,
    BackendError,
    BackendFailed,
    BackendGarbage,
    BackendRefused,
    Delta,
    Event,
    Finished,
    FinishReason,
    Started,
    ToolCallDelta,
    Usage,
)

__all__ = ["MessageReader"]

#: Any other stop reason (``pause_turn`` …) is a stop.
_FINISHES: dict[str, FinishReason] = {
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


class Counts(Struct):
    """``input_tokens`` are those that were neither read from the cache nor written to it."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


class Head(Struct):
    usage: Counts = msgspec.field(default_factory=Counts)
    model: str = ""


class Block(Struct):
    type: str
    text: str = ""
    thinking: str = ""
    id: str = ""
    name: str = ""


class Change(Struct):
    """The ``delta`` of a block, or of the message."""

    type: str = ""
    text: str = ""
    thinking: str = ""
    partial_json: str = ""
    stop_reason: str | None = None


class Failure(Struct):
    type: str = ""
    message: str = ""


class Said(Struct):
    type: str
    index: int = 0
    message: Head = msgspec.field(default_factory=Head)
    content_block: Block | None = None
    delta: Change = msgspec.field(default_factory=Change)
    usage: Counts = msgspec.field(default_factory=Counts)
    error: Failure = msgspec.field(default_factory=Failure)


class MessageReader:
    """Of one message; unknown events, ``ping`` among them, are passed over, as the API asks."""

    def __init__(self) -> None:
        self.done = False
        self._begun = False
        self._model = ""
        self._counts: dict[str, int] = {}
        #: Of each block that is a tool's call: its number among the calls.
        self._calls: dict[int, int] = {}
        self._reason: FinishReason | None = None

    def events(self, event: bytes) -> Iterator[Event]:
        """What one SSE event says.

        :raises BackendError: it is an error, or none of Anthropic's.
        """
        data = b"\n".join(
            line[5:].removeprefix(b" ") for line in event.split(b"\n") if line[:5] == b"data:"
        )
        if not data or self.done:
            return
        try:
            said = msgspec.json.decode(data, type=Said)
        except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
            raise BackendGarbage(f"an event of the backend: {wrong}") from None
        if said.type == "error":
            raise _failure(said.error)
        if said.type == "message_start":
            self._begun, self._model = True, said.message.model
            self._count(said.message.usage)
            yield Started()
        elif not self._begun and said.type != "ping":
            raise BackendGarbage("the backend's message does not begin with message_start")
        elif said.type == "content_block_start" and said.content_block is not None:
            yield from self._open(said.index, said.content_block)
        elif said.type == "content_block_delta":
            yield from self._piece(said.index, said.delta)
        elif said.type == "message_delta":
            self._count(said.usage)
            if said.delta.stop_reason is not None:
                self._reason = _FINISHES.get(said.delta.stop_reason, "stop")
        elif said.type == "message_stop":
            yield from self._end()

    def _open(self, index: int, block: Block) -> Iterator[Delta]:
        if block.type == "tool_use":
            number = self._calls[index] = len(self._calls)
            yield Delta(tool_calls=(ToolCallDelta(number, block.id, block.name),))
        elif block.text or block.thinking:
            yield Delta(text=block.text, reasoning=block.thinking)

    def _piece(self, index: int, piece: Change) -> Iterator[Delta]:
        if piece.partial_json:
            # Blocks of other types (the server's own tools) are none of the client's calls.
            if index in self._calls:
                call = ToolCallDelta(self._calls[index], arguments=piece.partial_json)
                yield Delta(tool_calls=(call,))
        elif piece.text or piece.thinking:
            yield Delta(text=piece.text, reasoning=piece.thinking)

    def _count(self, counts: Counts) -> None:
        """Later figures are those of the whole message so far, and replace earlier ones."""
        for name in Counts.__struct_fields__:
            value: Literal[None] | int = getattr(counts, name)
            if value is not None:
                self._counts[name] = value

    def _end(self) -> Iterator[Event]:
        if self._reason is None:
            raise BackendGarbage("the backend's message has no stop_reason")
        self.done = True
        yield Delta(finish_reason=self._reason)
        get = self._counts.get
        cached = get("cache_read_input_tokens")
        prompt = get("input_tokens", 0) + (cached or 0) + get("cache_creation_input_tokens", 0)
        usage = Usage(prompt, get("output_tokens", 0), cached) if self._counts else None
        yield Finished(usage, model=self._model)


def _failure(failure: Failure) -> BackendError:
    message = failure.message or "the backend reports an error without a message"
    if failure.type in ("overloaded_error", "rate_limit_error"):
        return BackendBusy(message)
    if failure.type in ("invalid_request_error", "request_too_large"):
        return BackendRefused(message)
    return BackendFailed(message)
