"""Anthropic's Messages API (version 2023-06-01), as its clients see it.

Read in anthropics/anthropic-sdk-python (009b035): ``types/`` (shapes), ``lib/streaming`` (order of
events), ``_exceptions.py`` (statuses); sentences as the API's documentation gives them. Nobody
drove the real one here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from fake_servers.answer import Piece, pieces
from fake_servers.constraint import by_schema
from fake_servers.model import Ask
from fake_servers.serving import FakeServer, Refusal, calls_named, compact, reply, text_of
from forebay.testing import Exchange

__all__ = ["Anthropic"]

_KNOWN = frozenset(
    (
        *("model", "messages", "max_tokens", "metadata", "stop_sequences", "stream", "system"),
        *("temperature", "thinking", "tool_choice", "tools", "top_k", "top_p", "service_tier"),
    )
)
_KINDS = {404: "not_found_error", 413: "request_too_large", 529: "overloaded_error"}


def named(kind: str, **content: Any) -> bytes:
    return f"event: {kind}\n".encode() + b"data: " + compact({"type": kind, **content}) + b"\n\n"


class Anthropic(FakeServer):
    routes: ClassVar[Mapping[str, str]] = {
        "GET /v1/models": "models",
        "POST /v1/messages": "messages",
        "POST /v1/messages/count_tokens": "count",
    }

    async def elsewhere(self, exchange: Exchange, path: str) -> None:
        raise Refusal(404, "Not found")

    def refuse(self, exchange: Exchange, refusal: Refusal) -> None:
        kind = refusal.kind or _KINDS.get(refusal.status, "invalid_request_error")
        error = {"type": kind, "message": refusal.message}
        content = {"type": "error", "error": error, "request_id": f"req_{self.number()}"}
        reply(exchange, refusal.status, content)

    def check(self, body: Mapping[str, Any]) -> None:
        for name in ("model", "max_tokens", "messages"):
            if name not in body:
                raise Refusal(400, f"{name}: Field required")
        for name in body.keys() - _KNOWN:
            raise Refusal(400, f"{name}: Extra inputs are not permitted")
        if body["model"] != self.model:
            raise Refusal(404, f"model: {body['model']}")
        if not isinstance(body["max_tokens"], int):
            raise Refusal(400, "max_tokens: Input should be a valid integer")
        if body["max_tokens"] < 1:
            raise Refusal(400, "max_tokens: Input should be greater than or equal to 1")
        if not body["messages"]:
            raise Refusal(400, "messages: at least one message is required")
        for place, message in enumerate(body["messages"]):
            if message.get("role") not in ("user", "assistant"):
                raise Refusal(400, f"messages.{place}.role: Input should be 'user' or 'assistant'")
        self.check_sampling(body)

    def check_sampling(self, body: Mapping[str, Any]) -> None:
        for name in ("temperature", "top_p"):
            value = body.get(name)
            if value is not None and not 0 <= value <= 1:
                raise Refusal(400, f"{name}: range: 0..1")
        for stop in body.get("stop_sequences") or ():
            if not stop.strip():
                raise Refusal(400, "stop_sequences: each stop sequence must contain non-whitespace")
        for place, tool in enumerate(body.get("tools") or ()):
            if not tool.get("name"):
                raise Refusal(400, f"tools.{place}.name: Field required")

    def prompt(self, body: Mapping[str, Any]) -> tuple[int, ...]:
        system = body.get("system") or ""
        spoken = system if isinstance(system, str) else text_of({"content": system})
        messages = [{"role": "system", "content": spoken}] if spoken else []
        return self.chat_prompt([*messages, *map(flattened, body["messages"])])

    def ask(self, body: Mapping[str, Any]) -> tuple[Ask, str | None]:
        """What is asked, and the tool that is called."""
        prompt = self.prompt(body)
        if len(prompt) >= self.context:
            message = f"prompt is too long: {len(prompt)} tokens > {self.context} maximum"
            raise Refusal(400, message)
        tool = self.tool(body)
        forced = by_schema(tool["input_schema"]) if tool else None
        ask = Ask(
            prompt=prompt,
            max_tokens=min(body["max_tokens"], self.context - len(prompt)),
            temperature=body.get("temperature", 1.0),
            top_p=body.get("top_p", 1.0),
            top_k=body.get("top_k", 0),
            stop=tuple(body.get("stop_sequences") or ()),
            forced=forced,
        )
        return ask, tool["name"] if tool else None

    def tool(self, body: Mapping[str, Any]) -> dict[str, Any] | None:
        tools, choice = body.get("tools") or [], body.get("tool_choice") or {"type": "auto"}
        if not tools or choice["type"] == "none":
            return None
        if choice["type"] == "any":
            return dict(tools[0])
        if choice["type"] == "tool":
            found = [tool for tool in tools if tool["name"] == choice["name"]]
            if not found:
                raise Refusal(400, f"Tool '{choice['name']}' not found in provided tools")
            return dict(found[0])
        messages = [flattened(message) for message in body["messages"]]
        return next((tool for tool in tools if calls_named(messages, tool["name"])), None)

    async def messages(self, exchange: Exchange) -> None:
        body = self.body(exchange)
        self.check(body)
        ask, tool = self.ask(body)
        usage = {"input_tokens": len(ask.prompt), "cache_creation_input_tokens": 0}
        usage |= {"cache_read_input_tokens": 0, "output_tokens": 1}
        message = {
            "id": f"msg_{self.number()}{self.number()[:8]}",
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        call = {"type": "tool_use", "id": f"toolu_{self.number()}", "name": tool, "input": {}}
        block = {"type": "text", "text": ""} if tool is None else call
        found: list[Piece] = []
        async with self.slot():
            for place, piece in enumerate(pieces(ask, "begin")):
                await self.tick(place)
                if body.get("stream") and place == 0:
                    exchange.begin("text/event-stream; charset=utf-8")
                    exchange.send(named("message_start", message=message))
                    exchange.send(named("content_block_start", index=0, content_block=block))
                    exchange.send(named("ping"))
                if body.get("stream") and piece.text:
                    delta = {"type": "text_delta", "text": piece.text}
                    if tool is not None:
                        delta = {"type": "input_json_delta", "partial_json": piece.text}
                    exchange.send(named("content_block_delta", index=0, delta=delta))
                found.append(piece)
        count = sum(len(piece.steps) for piece in found)
        end = ending(found[-1], tool)
        if body.get("stream"):
            exchange.send(named("content_block_stop", index=0))
            exchange.send(named("message_delta", delta=end, usage={"output_tokens": count}))
            exchange.send(named("message_stop"))
            return
        text = "".join(piece.text for piece in found)
        whole = {**block, "text": text} if tool is None else {**block, "input": json.loads(text)}
        counts = {**usage, "output_tokens": count}
        reply(exchange, 200, {**message, "content": [whole], **end, "usage": counts})

    async def count(self, exchange: Exchange) -> None:
        reply(exchange, 200, {"input_tokens": len(self.prompt(self.body(exchange)))})

    async def models(self, exchange: Exchange) -> None:
        card = {"type": "model", "id": self.model, "display_name": "A model"}
        card["created_at"] = "2026-01-01T00:00:00Z"
        page = {"has_more": False, "first_id": self.model, "last_id": self.model}
        reply(exchange, 200, {"data": [card], **page})


def flattened(message: Mapping[str, Any]) -> dict[str, Any]:
    """Blocks as the parts whose text is read."""
    content = message.get("content")
    if isinstance(content, list):
        texts = [block.get("text") or json.dumps(block) for block in content]
        content = "\n".join(texts)
    return {"role": message.get("role"), "content": content}


def ending(piece: Piece, tool: str | None) -> dict[str, Any]:
    reason = "max_tokens" if piece.finish == "length" else "end_turn"
    if tool is not None and piece.finish == "stop":
        reason = "tool_use"
    elif piece.matched is not None:
        reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": piece.matched}
