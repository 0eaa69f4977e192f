"""An answer as the dialects with blocks or items see it: runs of reasoning, runs of text, calls.

One state machine for streamed and whole answers of both dialects, so that they cannot differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec
from msgspec import Raw, Struct, structs

from forebay.api import (
    BackendGarbage,
    Delta,
    FinishReason,
    GenerateRequest,
    RequestError,
    ToolCallDelta,
)
from forebay.config import Limits
from forebay.http.decode import chat_request
from forebay.http.reply import Arrival


class Segment(Struct, kw_only=True):
    """One part of an answer, complete or still growing."""

    #: From 0, in the order in which they began.
    index: int
    kind: Literal["reasoning", "text", "call"]
    #: Of a call.
    call_id: str = ""
    name: str = ""
    pieces: list[str] = []

    @property
    def content(self) -> str:
        """The text, or the arguments of a call as JSON."""
        return "".join(self.pieces)


class Step(Struct, frozen=True):
    """What happened to a segment: it opened, grew by ``piece``, or closed for good."""

    kind: Literal["open", "grow", "close"]
    segment: Segment
    piece: str = ""


class Segments:
    """Of one answer with one choice."""

    def __init__(self, request_id: str) -> None:
        self.all: list[Segment] = []
        #: The backend's word on why it ended; None: none has come yet.
        self.finish: FinishReason | None = None
        self._request_id = request_id
        self._open: Segment | None = None
        self._calls: dict[int, Segment] = {}

    @property
    def calls(self) -> bool:
        """There is a tool call among them."""
        return bool(self._calls)

    def take(self, delta: Delta) -> list[Step]:
        """:raises BackendGarbage: a call has no name, or goes on after something else began."""
        steps: list[Step] = []
        if delta.reasoning:
            self._run("reasoning", delta.reasoning, steps)
        if delta.text:
            self._run("text", delta.text, steps)
        for call in delta.tool_calls:
            self._call(call, steps)
        self.finish = delta.finish_reason or self.finish
        return steps

    def close(self) -> list[Step]:
        """The answer is complete."""
        steps: list[Step] = []
        self._end(steps)
        return steps

    def chat_message(self) -> dict[str, object]:
        """The answer as a message of the chat dialect; reasoning is no part of it."""
        text = "".join(segment.content for segment in self.all if segment.kind == "text")
        calls = [
            {
                "id": segment.call_id,
                "type": "function",
                "function": {"name": segment.name, "arguments": segment.content},
            }
            for segment in self._calls.values()
        ]
        if not calls:
            return {"role": "assistant", "content": text}
        return {"role": "assistant", "content": text or None, "tool_calls": calls}

    def _run(self, kind: Literal["reasoning", "text"], piece: str, steps: list[Step]) -> None:
        segment = self._open
        if segment is None or segment.kind != kind:
            segment = self._begin(Segment(index=len(self.all), kind=kind), steps)
        self._grow(segment, piece, steps)

    def _call(self, call: ToolCallDelta, steps: list[Step]) -> None:
        segment = self._calls.get(call.index)
        if segment is None:
            if not call.name:
                raise BackendGarbage("the backend began a tool call without the tool's name")
            call_id = call.id or f"call_{self._request_id}_{call.index}"
            segment = Segment(index=len(self.all), kind="call", call_id=call_id, name=call.name)
            self._calls[call.index] = self._begin(segment, steps)
        elif segment is not self._open:
            raise BackendGarbage("the backend mixes the pieces of its tool calls")
        if call.arguments:
            self._grow(segment, call.arguments, steps)

    def _begin(self, segment: Segment, steps: list[Step]) -> Segment:
        self._end(steps)
        self._open = segment
        self.all.append(segment)
        steps.append(Step("open", segment))
        return segment

    def _grow(self, segment: Segment, piece: str, steps: list[Step]) -> None:
        segment.pieces.append(piece)
        steps.append(Step("grow", segment, piece))

    def _end(self, steps: list[Step]) -> None:
        if self._open is not None:
            steps.append(Step("close", self._open))
            self._open = None


def translated(
    arrival: Arrival, body: Mapping[str, object], limits: Limits, names: Mapping[str, str]
) -> GenerateRequest:
    """The typed request that a client of OpenAI's chat dialect would have made with ``body``.

    ``names``: what the client calls a field of that body, for refusals.

    :raises RequestError: a value is out of bounds.
    """
    encoded = msgspec.json.encode({k: v for k, v in body.items() if v is not None})
    try:
        request = chat_request(structs.replace(arrival, body=encoded), limits)
    except RequestError as error:
        error.param = names.get(error.param or "", error.param)
        raise
    return structs.replace(request, typed=True)


def as_text(raw: Raw) -> str:
    """JSON inside a string, as OpenAI's chat dialect has the arguments of a call."""
    return bytes(raw).decode()
