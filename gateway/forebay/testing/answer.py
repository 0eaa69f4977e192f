"""Reading an adapter's events strictly, as the pickiest client would (in either lane)."""

# ruff: noqa: S101 - a contract is made of assertions

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, get_args

from msgspec import Struct

from forebay.api import (
    Delta,
    Event,
    Finished,
    FinishReason,
    GenerateRequest,
    Relayed,
    Started,
)

__all__ = ["Answer", "read_answer"]

#: ``function_call`` is in OpenAI's enum too, for requests of the old form.
LEGAL = {*get_args(FinishReason), "function_call"}


class Answer(Struct):
    """What an answer says."""

    finished: Finished
    #: By choice.
    texts: dict[int, str] = {}
    finishes: dict[int, str] = {}
    #: Pieces in which the text came.
    pieces: int = 0
    #: The usage that the client can see (relay lane).
    usage: dict[str, Any] | None = None

    def add(self, index: int, text: str, reason: str | None) -> None:
        assert index not in self.finishes, f"choice {index} goes on after its finish reason"
        self.texts[index] = self.texts.get(index, "") + text
        self.pieces += bool(text)
        if reason is not None:
            assert reason in LEGAL, f"finish reason {reason!r} is not one of {sorted(LEGAL)}"
            self.finishes[index] = reason


def read_answer(request: GenerateRequest, events: Sequence[Event]) -> Answer:
    """What these events say.

    :raises AssertionError: they break the contract of :meth:`forebay.api.Adapter.stream`.
    """
    assert events, "there are no events"
    *body, last = events
    assert isinstance(last, Finished), f"the last event is {last!r}, not Finished"
    answer = Answer(last)
    if any(isinstance(event, Relayed) for event in body):
        data = [event for event in body if isinstance(event, Relayed)]
        assert len(data) == len(body), "the lanes are mixed"
        _relayed_stream(request, data, answer) if request.stream else _relayed(
            request, data, answer
        )
        assert last.finish_reasons == tuple(answer.finishes[i] for i in sorted(answer.finishes))
    else:
        assert isinstance(body[0], Started), f"the first event is {body[0]!r}, not Started"
        for event in body[1:]:
            assert isinstance(event, Delta), f"{event!r} stands among the deltas"
            answer.add(event.index, event.text, event.finish_reason)
    assert sorted(answer.finishes) == list(range(request.choices)), "a choice has not finished"
    return answer


def _relayed(request: GenerateRequest, events: list[Relayed], answer: Answer) -> None:
    assert len(events) == 1, "a body that does not stream is one event"
    body = json.loads(events[0].data)
    assert body["model"] == request.model
    assert body["id"]
    assert isinstance(body["created"], int)
    for choice in body["choices"]:
        text = choice["text"] if request.endpoint == "completions" else choice["message"]["content"]
        answer.add(choice["index"], text or "", choice["finish_reason"])
    answer.usage = body.get("usage")


def _relayed_stream(request: GenerateRequest, events: list[Relayed], answer: Answer) -> None:
    constant: set[tuple[Any, ...]] = set()
    roles: set[int] = set()
    for event in events:
        *parts, rest = event.data.split(b"\n\n")
        assert rest == b"", "relayed bytes end within an event"
        assert len(parts) == event.events, f"{len(parts)} events were counted as {event.events}"
        for part in parts:
            assert answer.usage is None, "something follows the usage chunk"
            chunk = _chunk(part)
            constant.add((chunk["id"], chunk["created"], chunk["model"], chunk["object"]))
            for choice in chunk["choices"]:
                delta = choice.get("delta", {})
                if request.endpoint == "chat":
                    index = choice["index"]
                    assert ("role" in delta) == (index not in roles), "the role comes once, first"
                    roles.add(index)
                text = choice.get("text") or delta.get("content") or ""
                answer.add(choice["index"], text, choice.get("finish_reason"))
            if not chunk["choices"]:
                answer.usage = chunk["usage"]
    kind = "chat.completion.chunk" if request.endpoint == "chat" else "text_completion"
    assert len(constant) == 1, f"id, created, model and object vary: {constant}"
    (found,) = constant
    assert found[0], "the id is empty"
    assert found[2:] == (request.model, kind)
    assert (answer.usage is not None) <= request.include_usage, "nobody asked for a usage chunk"


def _chunk(event: bytes) -> dict[str, Any]:
    assert event.startswith(b"data: "), f"{event[:40]!r} is not a data line"
    assert b"\n" not in event, "an event has more than one line"
    assert event != b"data: [DONE]", "[DONE] is the gateway's to write"
    chunk: dict[str, Any] = json.loads(event[6:])
    assert not chunk.get("error"), "an error is raised, not relayed"
    return chunk
