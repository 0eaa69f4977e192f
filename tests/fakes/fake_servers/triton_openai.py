"""Triton's OpenAI frontend before a model of vLLM's backend, with a parser for tool calls.

Read in triton-inference-server/server (e1db8a6): ``python/openai/openai_frontend``. Its HTTP code
was driven here as it is, over a stand-in for the server in its process: shapes, order of members,
statuses and sentences are as it gave them.
"""

from __future__ import annotations

import struct
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from fake_servers.answer import Piece
from fake_servers.model import EOS, Step, detokenize
from fake_servers.openai_fields import mistakes, named_tool
from fake_servers.openai_like import OpenAIFake, Writer, token_texts
from fake_servers.serving import Refusal, event, reply, vector
from forebay.testing import Exchange

__all__ = ["TritonOpenAI", "TritonOpenAIEmbedding"]

_BOTH = frozenset(
    (
        *("frequency_penalty", "ignore_eos", "logit_bias", "logprobs", "max_tokens", "min_tokens"),
        *("model", "n", "presence_penalty", "seed", "stop", "stream", "stream_options"),
        *("temperature", "top_p", "user"),
    )
)
_COMPLETION = _BOTH | {"best_of", "echo", "prompt", "suffix"}
_CHAT = _BOTH | {
    *("function_call", "functions", "max_completion_tokens", "messages", "response_format"),
    *("tool_choice", "tools", "top_logprobs"),
}
_EMBEDDING = frozenset(("dimensions", "encoding_format", "input", "model", "user"))
#: Field, and the least and most that it may be.
_BOUNDS = (
    ("temperature", 0, 2),
    ("top_p", 0, 1),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("n", 1, 128),
    ("top_logprobs", 0, 20),
)
_ROLES = ("system", "user", "assistant", "tool", "function")


class TritonWriter(Writer):
    @property
    def forced(self) -> bool:
        """A call that had to be made is said in other words than one of the model's own accord."""
        return self.tool is not None and named_tool(self.body) is not None

    def envelope(self, choices: list[Any], usage: object) -> dict[str, Any]:
        head = {"id": self.id, "choices": choices, "created": self.created, "model": self.model}
        return {**head, "system_fingerprint": None, "object": self.object, "usage": usage}

    def chunk(self, choice: Mapping[str, Any]) -> bytes:
        return event(self.envelope([choice], None))

    def begin(self) -> Iterator[bytes]:
        if self.chat:
            delta = {"content": "", "function_call": None, "role": "assistant"}
            yield self.chunk(self.in_chat(delta))

    def in_chat(
        self, delta: Mapping[str, Any], logprobs: object = None, finish: str | None = None
    ) -> dict[str, Any]:
        return {"delta": delta, "logprobs": logprobs, "finish_reason": finish, "index": 0}

    def piece(self, index: int, piece: Piece) -> Iterator[bytes]:
        """The last has its text; whatever ended it, it is called a stop."""
        logprobs = self.logprobs(index, piece.steps)
        finish = "stop" if piece.finish else None
        if not self.chat:
            choice = {"finish_reason": finish, "index": 0, "logprobs": logprobs}
            yield self.chunk({**choice, "text": piece.text})
        elif self.tool is None:
            delta = {"content": piece.text, "function_call": None, "role": None}
            yield self.chunk(self.in_chat(delta, logprobs, finish))
        elif self.forced:
            function = {"name": self.tool, "arguments": piece.text}
            delta = {"tool_calls": [{"index": 0, "function": function}]}
            yield self.chunk(self.in_chat(delta, logprobs, finish))
        else:
            yield from self.chosen(index, piece, logprobs)

    def chosen(self, index: int, piece: Piece, logprobs: object) -> Iterator[bytes]:
        """As the parser of the model's calls says it: the name first, then arguments alone."""
        if index not in self.said:
            call = {"index": 0, "id": f"cmpl-{self.server.number()}", "type": "function"}
            named = {**call, "function": {"name": self.tool}}
            yield self.chunk(self.in_chat({"tool_calls": [named]}, logprobs))
        said = {"index": 0, "function": {"arguments": piece.text}}
        finish = "tool_calls" if piece.finish else None
        yield self.chunk(self.in_chat({"tool_calls": [said]}, logprobs, finish))

    def end(self) -> Iterator[bytes]:
        if self.option("include_usage"):
            yield event(self.envelope([], self.usage()))
        yield from super().end()

    def whole(self, answers: Mapping[int, Sequence[Piece]]) -> dict[str, Any]:
        said = answers[0]
        text = "".join(piece.text for piece in said)
        logprobs = self.logprobs(0, [step for piece in said for step in piece.steps])
        choice: dict[str, Any] = {"finish_reason": "stop", "index": 0}
        if not self.chat:
            echo = detokenize(self.asks[0].prompt) if self.body.get("echo") else ""
            choice |= {"logprobs": logprobs, "text": echo + text}
            return self.envelope([choice], self.usage())
        calls = None
        if self.tool is not None:
            # The id of a call that was forced is the answer's own.
            number = self.id if self.forced else f"cmpl-{self.server.number()}"
            function = {"name": self.tool, "arguments": text}
            calls, text = [{"id": number, "type": "function", "function": function}], ""
            choice["finish_reason"] = "stop" if self.forced else "tool_calls"
        message = {"content": text, "tool_calls": calls, "role": "assistant", "function_call": None}
        return self.envelope([{**choice, "message": message, "logprobs": logprobs}], self.usage())

    def logprobs(self, index: int, steps: Sequence[Step]) -> dict[str, Any] | None:
        """Of each token's place the likeliest, whichever was chosen, unless none other is asked."""
        wanted = self.body.get("top_logprobs", 1) if self.chat else self.body.get("logprobs")
        if not self.body.get("logprobs"):
            return None
        kept = [step for step in steps if step.token != EOS]
        if not kept:
            return None
        tops = [
            list(zip(token_texts([step]), [step.logprob], strict=True))
            if not wanted
            else self.likeliest(step, wanted)
            for step in kept
        ]
        if self.chat:
            entries = [[_entry(*one) for one in top] for top in tops]
            return {"content": [{**top[0], "top_logprobs": top} for top in entries]}
        offset, offsets = len(self.said.get(index, "")), []
        for top in tops:
            offsets.append(offset)
            offset += len(top[0][0])
        return {
            "text_offset": offsets,
            "token_logprobs": [top[0][1] for top in tops],
            "tokens": [top[0][0] for top in tops],
            "top_logprobs": [dict(top) for top in tops],
        }

    def likeliest(self, step: Step, count: int) -> list[tuple[str, float]]:
        """With the chosen one, if it is not among them."""
        found = dict(step.top[:count]) | {step.token: step.logprob}
        best = sorted(found.items(), key=lambda item: -item[1])
        return [(_text(token), logprob) for token, logprob in best]


class TritonOpenAI(OpenAIFake):
    writer = TritonWriter
    routes: ClassVar[Mapping[str, str]] = {
        "GET /health/ready": "ready",
        "GET /v1/models": "models",
        "POST /v1/chat/completions": "chat",
        "POST /v1/completions": "complete",
    }

    def refuse(self, exchange: Exchange, refusal: Refusal) -> None:
        reply(exchange, refusal.status, {"detail": refusal.message})

    async def script(self, exchange: Exchange) -> None:
        """FastAPI's refusal is a list of mistakes."""
        try:
            await super().script(exchange)
        except Mistaken as wrong:
            reply(exchange, 422, {"detail": wrong.found})

    def body(self, exchange: Exchange) -> dict[str, Any]:
        try:
            return super().body(exchange)
        except Refusal:
            loc, said = ["body", 0], "JSON decode error"
            found = {"type": "json_invalid", "loc": loc, "msg": said, "input": {}}
            raise Mistaken([{**found, "ctx": {"error": "Expecting value"}}]) from None

    def check(self, body: dict[str, Any], chat: bool) -> None:
        required = ("messages", "model") if chat else ("model", "prompt")
        found = mistakes(body, required, _CHAT if chat else _COMPLETION)
        found += _bounds(body) + (_in_chat(body) if chat else [])
        if found:
            raise Mistaken(found)
        if body["model"] != self.model:
            raise Refusal(400, f"Unknown model: {body['model']}")
        if (body.get("n") or 1) > 1:
            said = f"Received n={body['n']}, but only single choice (n=1) is currently supported"
            raise Refusal(400, said)
        if body.get("logit_bias") is not None:
            raise Refusal(400, f"logit bias is not {'currently ' if chat else ''}supported")
        if chat:
            self.check_chat(body)
        else:
            self.check_completion(body)
        if body.get("stream_options") and not body.get("stream"):
            raise Refusal(400, "`stream_options` can only be used when `stream` is True")

    def check_completion(self, body: dict[str, Any]) -> None:
        if body.get("suffix") is not None:
            raise Refusal(400, "suffix is not currently supported")
        if not body["prompt"]:
            raise Refusal(400, "prompt must be non-empty")
        if not isinstance(body["prompt"], str):
            raise Refusal(400, "only single string input is supported")
        if "best_of" in body:
            said = "best_of is no longer supported in vLLM backend, removed from vLLM V1 engine"
            raise Refusal(400, said)

    def check_chat(self, body: dict[str, Any]) -> None:
        if body.get("top_logprobs") is not None and not body.get("logprobs"):
            raise Refusal(400, "`top_logprobs` can only be used when `logprobs` is True")
        choice, tools = body.get("tool_choice"), body.get("tools")
        if not tools and (choice == "required" or isinstance(choice, dict)):
            kind = '"required"' if choice == "required" else "Named"
            said = "tool choice requires CreateChatCompletionRequest.tools to be provided"
            raise Refusal(400, f"{kind} {said}")
        if isinstance(choice, dict) and named_tool(body) is None:
            name = choice["function"]["name"]
            raise Refusal(400, f"Tool '{name}' has not been passed in `tools`.")
        function = named_tool(body)
        if function is not None and function.get("parameters") is None:
            raise Refusal(500, "'NoneType' object has no attribute 'model_dump_json'")
        for message in body["messages"]:
            parts = message.get("content")
            for part in parts if isinstance(parts, list) else []:
                if part.get("type") != "text":
                    raise Refusal(400, f"only text message is supported, but got {part['type']}")

    def constraint(self, body: dict[str, Any]) -> str | None:
        """`response_format` is taken and left aside."""
        return None

    def fits(self, prompt: Sequence[int], body: Mapping[str, Any]) -> None:
        """vLLM's own sentence, for which Triton has but one status. A stream breaks off."""
        if len(prompt) >= self.context:
            said = f"The decoder prompt (length {len(prompt)}) is longer than the maximum model"
            raise Refusal(500, f"{said} length of {self.context}.")

    def default_tokens(self, chat: bool, prompt_tokens: int) -> int:
        return 16

    async def generate(self, exchange: Exchange, chat: bool) -> None:
        """A stream has begun before anything is asked of the model."""
        try:
            await super().generate(exchange, chat)
        except Refusal as refusal:
            if refusal.status != 500 or not exchange.json.get("stream"):
                raise
            exchange.begin(self.content_type)
            for data in self.writer(self, exchange.json, chat).begin():
                exchange.send(data)
            exchange.cut()

    async def ready(self, exchange: Exchange) -> None:
        reply(exchange, 200)

    async def models(self, exchange: Exchange) -> None:
        card = {"id": self.model, "created": self.now(), "object": "model"}
        cards = [{**card, "owned_by": "Triton Inference Server"}]
        reply(exchange, 200, {"object": "list", "data": cards})


class TritonOpenAIEmbedding(TritonOpenAI):
    """With a model that embeds; one input at a time, as a text or as token ids."""

    routes: ClassVar[Mapping[str, str]] = {
        **{route: to for route, to in TritonOpenAI.routes.items() if not route.startswith("POST")},
        "POST /v1/embeddings": "embed",
    }

    async def embed(self, exchange: Exchange) -> None:
        body = self.body(exchange)
        found = mistakes(body, ("input", "model"), _EMBEDDING)
        given = body.get("input")
        if given is not None and not given:
            said = "Value should have at least 1 item after validation, not 0"
            found.append(
                {"type": "too_short", "loc": ["body", "input"], "msg": said, "input": given}
            )
        elif isinstance(given, list) and not all(isinstance(one, int) for one in given):
            loc, said = ["body", "input", "str"], "Input should be a valid string"
            found.append({"type": "string_type", "loc": loc, "msg": said, "input": given})
        if found:
            raise Mistaken(found)
        if body["model"] != self.model:
            raise Refusal(400, f"Unknown model: {body['model']}")
        text = given if isinstance(given, str) else detokenize(given or [])
        count = len(self.text_tokens(text, special=False))
        made: Any = vector(text)
        if body.get("encoding_format") == "base64":
            made = b64encode(struct.pack(f"<{len(made)}f", *made)).decode()
        data = [{"object": "embedding", "embedding": made, "index": 0}]
        usage = {"prompt_tokens": count, "total_tokens": count}
        reply(exchange, 200, {"object": "list", "data": data, "model": self.model, "usage": usage})


class Mistaken(Exception):
    """Of another form than the frontend's schemas."""

    def __init__(self, found: list[dict[str, Any]]) -> None:
        super().__init__("mistaken")
        self.found = found


def _bounds(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for name, least, most in _BOUNDS:
        value = body.get(name)
        if isinstance(value, (int, float)) and not least <= value <= most:
            kind, bound = ("greater", least) if value < least else ("less", most)
            said = f"Input should be {kind} than or equal to {bound}"
            loc = ["body", name]
            found.append({"type": f"{kind}_than_equal", "loc": loc, "msg": said, "input": value})
    return found


def _in_chat(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Mistakes in messages and in ``response_format``."""
    found: list[dict[str, Any]] = []
    messages = body.get("messages")
    if messages == []:
        said = "List should have at least 1 item after validation, not 0"
        found.append({"type": "too_short", "loc": ["body", "messages"], "msg": said, "input": []})
    for place, message in enumerate(messages if isinstance(messages, list) else []):
        if message.get("role") not in _ROLES:
            loc = ["body", "messages", place, "ChatCompletionRequestSystemMessage", "role"]
            said = "Input should be 'system'"
            role = message.get("role")
            found.append({"type": "enum", "loc": loc, "msg": said, "input": role})
    kind = (body.get("response_format") or {}).get("type", "text")
    if kind not in ("text", "json_object"):
        loc = ["body", "response_format", "type"]
        said = "Input should be 'text' or 'json_object'"
        found.append({"type": "enum", "loc": loc, "msg": said, "input": kind})
    return found


def _text(token: int) -> str:
    return detokenize([token])


def _entry(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
