"""Putting a stream's chunks together to the body that the same request gives without streaming."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from forebay.api import GenerateRequest

__all__ = ["WholeAnswer"]


class WholeAnswer:
    """Feed it the events that :class:`~forebay_plugins.sse.Scanner` returns."""

    def __init__(self, request: GenerateRequest) -> None:
        self._chat = request.endpoint == "chat"
        self._head: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}

    def add(self, events: bytes) -> None:
        """Whole events, each a single ``data:`` line."""
        for event in events.split(b"\n\n")[:-1]:
            chunk = msgspec.json.decode(event[6:])
            self._head = self._head or {k: v for k, v in chunk.items() if k != "choices"}
            for piece in chunk["choices"]:
                self._merge(piece)

    def body(self, usage: dict[str, Any] | None, closing: Mapping[str, Any]) -> bytes:
        """The JSON body; ``closing`` are the top-level fields of the last chunks."""
        kind = "chat.completion" if self._chat else "text_completion"
        choices = [self._choices[index] for index in sorted(self._choices)]
        for choice in choices:
            for call in choice.get("message", {}).get("tool_calls", ()):
                call.pop("index", None)
        body = {**closing, **self._head, "object": kind, "choices": choices, "usage": usage}
        if usage is None:
            del body["usage"]
        return msgspec.json.encode(body)

    def _merge(self, piece: dict[str, Any]) -> None:
        index = piece.get("index", 0)
        empty: dict[str, Any] = {"message": {"content": None}} if self._chat else {"text": ""}
        choice = self._choices.setdefault(index, {"index": index, **empty})
        for name, value in piece.items():
            if name == "delta":
                _join(choice["message"], value)
            elif name == "text":
                choice["text"] += value
            elif name == "logprobs" and isinstance(value, dict):
                choice["logprobs"] = choice.get("logprobs") or {}
                _join(choice["logprobs"], value)
            elif value is not None or name not in choice:
                choice[name] = value


def _join(whole: dict[str, Any], piece: dict[str, Any]) -> None:
    """Texts are joined, lists extended, tool calls (which have an ``index``) joined by index."""
    for name, value in piece.items():
        known = whole.get(name)
        if name == "tool_calls":
            for call in value:
                _join_call(whole.setdefault(name, []), call)
        elif known is None or name == "role":
            whole[name] = value
        elif isinstance(known, str | list) and value is not None:
            whole[name] = known + value


def _join_call(calls: list[dict[str, Any]], piece: dict[str, Any]) -> None:
    """Its id, type and name come once, its arguments in pieces."""
    call = next((call for call in calls if call.get("index") == piece.get("index")), None)
    if call is None:
        calls.append({**piece, "function": dict(piece.get("function") or {})})
        return
    for name, value in (piece.get("function") or {}).items():
        call["function"][name] = call["function"].get(name, "") + value
