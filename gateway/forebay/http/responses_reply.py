"""OpenAI's Responses API on the way out: numbered events, and response objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import msgspec

from forebay.api import Delta, Finished, ForebayError, GenerateRequest, Usage
from forebay.attempt import FlightEvent
from forebay.http.encode import counted_mark
from forebay.http.reply import Reply, public_message
from forebay.http.segments import Segment, Segments, Step

#: Is given the response object and the answer as a message of the chat dialect.
Keep = Callable[[bytes, Mapping[str, object]], None]

_encode = msgspec.json.encode

_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
_ITEM = {"reasoning": "rs", "text": "msg", "call": "fc"}


class ResponseReply(Reply):
    """The answer to ``POST /v1/responses``, streamed or whole."""

    def __init__(
        self, request: GenerateRequest, head: Mapping[str, object], keep: Keep | None
    ) -> None:
        self._head = head
        self._keep = keep
        self._segments = Segments(request.id)
        self._suffix = str(head["id"]).removeprefix("resp_")
        self._sequence = 0

    def chunk(self, event: FlightEvent) -> bytes:
        match event:
            case Delta():
                return self._start() + self._steps(self._segments.take(event))
            case Finished():
                return self._start() + self._steps(self._segments.close()) + self._end(event.usage)
        raise TypeError(f"{event!r} is no typed event")

    def _start(self) -> bytes:
        if self._sequence:
            return b""
        response = self._response("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def _end(self, usage: Usage | None) -> bytes:
        response = self._ended(usage)
        self._store(_encode(response))
        return self._event(f"response.{response['status']}", response=response)

    def add(self, event: FlightEvent) -> None:
        if isinstance(event, Delta):
            self._segments.take(event)

    def body(self, finished: Finished) -> bytes:
        body = _encode(self._ended(finished.usage))
        self._store(body)
        return body

    def failure(self, error: ForebayError) -> bytes:
        """Both that clients look for: the flat error, and the failed response as the last word."""
        message = public_message(error)
        flat = self._event("error", code=error.code, message=message, param=error.param)
        reason = {"code": "server_error", "message": message}
        failed = self._response("failed", output=self._output("incomplete"), error=reason)
        return flat + self._event("response.failed", response=failed)

    def _store(self, body: bytes) -> None:
        if self._keep is not None:
            self._keep(body, self._segments.chat_message())

    def _ended(self, usage: Usage | None) -> dict[str, object]:
        reason = _INCOMPLETE.get(self._segments.finish or "stop")
        status = self._last_status
        return self._response(
            status,
            output=self._output(status),
            usage=None if usage is None else usage_object(usage),
            incomplete_details=None if reason is None else {"reason": reason},
        )

    @property
    def _last_status(self) -> str:
        """Of the response, and of its last item once that has ended."""
        return "incomplete" if self._segments.finish in _INCOMPLETE else "completed"

    def _response(self, status: str, **fields: object) -> dict[str, object]:
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
            **fields,
        }

    def _output(self, last_status: str) -> list[dict[str, object]]:
        segments = self._segments.all
        last = len(segments) - 1
        return [
            self._item(segment, last_status if segment.index == last else "completed")
            for segment in segments
        ]

    def _item(self, segment: Segment, status: str) -> dict[str, object]:
        item: dict[str, object] = {"id": self._item_id(segment), "status": status}
        match segment.kind:
            case "text":
                content = [_part(segment)]
                return {**item, "type": "message", "role": "assistant", "content": content}
            case "reasoning":
                return {**item, "type": "reasoning", "summary": [], "content": [_part(segment)]}
            case "call":
                return {
                    **item,
                    "type": "function_call",
                    "call_id": segment.call_id,
                    "name": segment.name,
                    "arguments": segment.content,
                }

    def _item_id(self, segment: Segment) -> str:
        return f"{_ITEM[segment.kind]}_{self._suffix}_{segment.index}"

    def _steps(self, steps: list[Step]) -> bytes:
        return b"".join(event for step in steps for event in self._step(step))

    def _step(self, step: Step) -> Iterator[bytes]:
        """The events of one step, from the item inwards and back."""
        segment = step.segment
        at: dict[str, object] = {"item_id": self._item_id(segment), "output_index": segment.index}
        if segment.kind != "call":
            at["content_index"] = 0
        name = _NAMES[segment.kind]
        match step.kind:
            case "open":
                yield self._item_added(segment)
                if segment.kind != "call":
                    part = _part(segment, "")
                    yield self._event("response.content_part.added", **at, part=part)
            case "grow":
                yield self._event(f"{name}.delta", **at, **_logprobs(segment), delta=step.piece)
            case "close":
                said = {"arguments" if segment.kind == "call" else "text": segment.content}
                yield self._event(f"{name}.done", **at, **_logprobs(segment), **said)
                if segment.kind != "call":
                    yield self._event("response.content_part.done", **at, part=_part(segment))
                yield self._item_done(segment)

    def _item_added(self, segment: Segment) -> bytes:
        item = self._item(segment, "in_progress")
        if segment.kind == "call":
            item["arguments"] = ""
        else:
            item["content"] = []
        return self._event("response.output_item.added", output_index=segment.index, item=item)

    def _item_done(self, segment: Segment) -> bytes:
        last = segment.index == len(self._segments.all) - 1
        item = self._item(segment, self._last_status if last else "completed")
        return self._event("response.output_item.done", output_index=segment.index, item=item)

    def _event(self, name: str, **fields: object) -> bytes:
        data = _encode({"type": name, "sequence_number": self._sequence, **fields})
        self._sequence += 1
        return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"


_NAMES = {
    "text": "response.output_text",
    "reasoning": "response.reasoning_text",
    "call": "response.function_call_arguments",
}


def _logprobs(segment: Segment) -> dict[str, object]:
    """Events of output text must have the field, empty where none were asked for."""
    return {"logprobs": []} if segment.kind == "text" else {}


def _part(segment: Segment, text: str | None = None) -> dict[str, object]:
    said = segment.content if text is None else text
    if segment.kind == "reasoning":
        return {"type": "reasoning_text", "text": said}
    return {"type": "output_text", "text": said, "annotations": [], "logprobs": []}


def usage_object(usage: Usage) -> dict[str, object]:
    """Backends do not say how many tokens were reasoning, nor how many went into a cache."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens or 0,
            "cache_write_tokens": 0,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        **counted_mark(usage),
    }
