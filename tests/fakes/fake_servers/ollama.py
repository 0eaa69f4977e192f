"""Ollama at its state of August 2026 (fb30760): its own API, and its ``/v1``.

Read at ollama/ollama: ``api/types.go`` (shapes; zeros are left out), ``server/routes.go`` (routes,
statuses), ``middleware/openai.go`` and ``openai/openai.go`` (which fields ``/v1`` knows; it drops
the others), ``llm/llama_server.go`` (its runner's errors, as JSON within a text). Nobody drove the
real one here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from fake_servers.answer import Holding, Piece, pieces
from fake_servers.constraint import Impossible, by_schema
from fake_servers.model import BOS, EOS, Ask, piece_of, tokenize
from fake_servers.openai_fields import stops_of
from fake_servers.openai_like import OpenAIFake, Writer
from fake_servers.serving import Refusal, calls_named, compact, event, reply, vector
from forebay.testing import Exchange

__all__ = ["Ollama"]

_WHEN = "2026-08-21T12:00:00.000000000Z"
#: Fields that its ``/v1`` knows.
_KNOWN = frozenset(
    (
        *("model", "messages", "prompt", "stream", "stream_options", "max_tokens", "seed", "stop"),
        *("temperature", "frequency_penalty", "presence_penalty", "top_p", "response_format"),
        *("tools", "reasoning", "reasoning_effort", "logprobs", "top_logprobs", "suffix"),
    )
)


class OllamaWriter(Writer):
    """Of ``/v1``."""

    def __init__(self, server: OpenAIFake, body: Mapping[str, Any], chat: bool) -> None:
        super().__init__(server, body, chat)
        # One of a thousand: ids come twice.
        prefix = "chatcmpl" if chat else "cmpl"
        self.id = f"{prefix}-{int(server.number(), 16) % 999}"

    def head(self, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": "fp_ollama",
            "choices": choices,
        }

    def piece(self, index: int, piece: Piece) -> Iterator[bytes]:
        if not self.chat:
            choice = {"text": piece.text, "index": index, "finish_reason": piece.finish}
            yield event(self.head([choice]))
            return
        first = {} if index in self.said else {"role": "assistant"}
        choice: dict[str, Any] = {"index": index, "delta": {**first, "content": piece.text}}
        logprobs = self.logprobs(index, piece.steps)
        more = {"logprobs": logprobs} if logprobs else {}
        if self.tool is None:
            yield event(self.head([{**choice, "finish_reason": None, **more}]))
        if piece.finish:
            if self.tool is not None:
                calls = [self.call(self.said.get(index, "") + piece.text)]
                delta = {"role": "assistant", "content": "", "tool_calls": calls}
                yield event(self.head([{"index": index, "delta": delta, "finish_reason": None}]))
            choice = {"index": index, "delta": {}, "finish_reason": self.finish(piece)}
            yield event(self.head([choice]))

    def finish(self, piece: Piece) -> str | None:
        return "tool_calls" if self.tool and piece.finish == "stop" else piece.finish

    def call(self, arguments: str) -> dict[str, Any]:
        function = {"name": self.tool, "arguments": arguments}
        number = f"call_{self.server.number()[:8]}"
        return {"id": number, "index": 0, "type": "function", "function": function}

    def end(self) -> Iterator[bytes]:
        if self.option("include_usage"):
            yield event({**self.head([]), "usage": self.counts()})
        yield from super().end()

    def counts(self) -> dict[str, Any]:
        usage = self.usage()
        return {
            name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")
        }

    def whole(self, answers: Mapping[int, Sequence[Piece]]) -> dict[str, Any]:
        ((_, said),) = answers.items()
        text, finish = "".join(piece.text for piece in said), self.finish(said[-1])
        if not self.chat:
            choice: dict[str, Any] = {"text": text, "index": 0, "finish_reason": finish}
            return {**self.head([choice]), "usage": self.counts()}
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self.tool is not None:
            message = {"role": "assistant", "content": "", "tool_calls": [self.call(text)]}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        logprobs = self.logprobs(0, [step for piece in said for step in piece.steps])
        more = {"logprobs": logprobs} if logprobs else {}
        return {**self.head([{**choice, **more}]), "usage": self.counts()}


class Ollama(OpenAIFake):
    writer = OllamaWriter
    holding: ClassVar[Holding] = "begin"
    content_type = "text/event-stream"
    routes: ClassVar[Mapping[str, str]] = {
        "GET /api/version": "version",
        "GET /api/tags": "tags",
        "GET /api/ps": "loaded",
        "POST /api/chat": "native_chat",
        "POST /api/generate": "native_generate",
        "POST /api/embed": "embed",
        "GET /v1/models": "models",
        "POST /v1/chat/completions": "chat",
        "POST /v1/completions": "complete",
        "POST /v1/embeddings": "openai_embed",
    }

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"slots": 1, **options})
        self.tag = f"{self.model}:latest"

    async def elsewhere(self, exchange: Exchange, path: str) -> None:
        """gin's own: plain text."""
        served = any(route.endswith(f" {path}") for route in self.routes)
        words = b"405 method not allowed" if served else b"404 page not found"
        exchange.answer(405 if served else 404, words)

    def refuse(self, exchange: Exchange, refusal: Refusal) -> None:
        """A text; under ``/v1`` it stands in OpenAI's form."""
        if not exchange.path.startswith("/v1/"):
            reply(exchange, refusal.status, {"error": refusal.message})
            return
        kinds = {400: "invalid_request_error", 404: "not_found_error"}
        kind = kinds.get(refusal.status, "api_error")
        error = {"message": refusal.message, "type": kind, "param": None, "code": None}
        reply(exchange, refusal.status, {"error": error})

    def known_model(self, body: Mapping[str, Any]) -> None:
        name = body.get("model")
        if not name:
            raise Refusal(400, "model is required")
        if name not in (self.model, self.tag):
            raise Refusal(404, f"model '{name}' not found")

    # Its own API.

    def body(self, exchange: Exchange) -> dict[str, Any]:
        try:
            content = exchange.json
        except ValueError as wrong:
            raise Refusal(400, f"invalid character: {wrong}") from None
        if not isinstance(content, dict):
            message = "json: cannot unmarshal array into Go value of type api.ChatRequest"
            raise Refusal(400, message)
        return content

    def native_ask(self, body: Mapping[str, Any], prompt: tuple[int, ...]) -> Ask:
        options = body.get("options") or {}
        context = options.get("num_ctx") or self.context
        if len(prompt) >= context:
            if body.get("truncate", True):
                prompt = prompt[-context + 1 :]
            else:
                raise Refusal(400, runner_too_long(len(prompt), context))
        limit = options.get("num_predict", -1)
        stop = options.get("stop") or ()
        return Ask(
            prompt=prompt,
            max_tokens=limit if limit > 0 else context - len(prompt),
            temperature=max(options.get("temperature", 0.8), 0),
            top_p=options.get("top_p", 0.9),
            top_k=options.get("top_k", 40),
            min_p=options.get("min_p", 0.0),
            frequency_penalty=options.get("frequency_penalty", 0.0),
            presence_penalty=options.get("presence_penalty", 0.0),
            repetition_penalty=options.get("repeat_penalty", 1.0),
            seed=options.get("seed"),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            forced=self.formatted(body.get("format")),
        )

    def formatted(self, wanted: Any) -> str | None:
        try:
            if wanted == "json":
                return '{"one": "two"}'
            return by_schema(wanted) if isinstance(wanted, dict) else None
        except Impossible as why:
            error = {"code": 400, "message": f"JSON schema conversion failed:\n{why}"}
            said = {"error": {**error, "type": "invalid_request_error"}}
            raise Refusal(400, json.dumps(said)) from None

    async def native_chat(self, exchange: Exchange) -> None:
        body = self.body(exchange)
        self.known_model(body)
        prompt = self.chat_prompt(body.get("messages") or [])
        ask, tool = self.native_ask(body, prompt), None
        for offered in body.get("tools") or ():
            function = {
                "name": "",
                **(offered.get("function") or {}),
            }  # Go's zero, if there is none
            if calls_named(body["messages"], function["name"]):
                tool = function["name"]
                forced = by_schema(function.get("parameters") or {"type": "object"})
                ask = replace(ask, forced=forced)
        await self.native(exchange, body, ask, chat=True, tool=tool)

    async def native_generate(self, exchange: Exchange) -> None:
        body = self.body(exchange)
        self.known_model(body)
        ask = self.native_ask(body, (BOS, *tokenize(body.get("prompt", ""))))
        await self.native(exchange, body, ask, chat=False, tool=None)

    async def native(
        self, exchange: Exchange, body: Mapping[str, Any], ask: Ask, chat: bool, tool: str | None
    ) -> None:
        lines: list[dict[str, Any]] = []
        streams = body.get("stream", True)
        count, text = 0, ""
        async with self.slot():
            for place, piece in enumerate(pieces(ask, self.holding)):
                await self.tick(place)
                if streams and place == 0:
                    exchange.begin("application/x-ndjson")
                count += len(piece.steps)
                text += piece.text
                fresh = [self.line(body, chat, piece)] if tool is None and piece.text else []
                if piece.finish:
                    if tool is not None:
                        fresh.append(self.called_line(tool, text))
                    fresh.append(self.last(chat, ask, piece, count))
                for line in fresh:
                    if streams:
                        exchange.send(compact(line) + b"\n")
                lines += fresh
        if not streams:
            reply(exchange, 200, whole_of(lines, chat))

    def line(self, body: Mapping[str, Any], chat: bool, piece: Piece) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": piece.text}}
        content = {"model": self.tag, "created_at": _WHEN}
        content |= said if chat else {"response": piece.text}
        content["done"] = False
        if body.get("logprobs"):
            top = body.get("top_logprobs") or 0
            content["logprobs"] = [
                {
                    **likely(step.token, step.logprob),
                    **({"top_logprobs": [likely(*pair) for pair in step.top[:top]]} if top else {}),
                }
                for step in piece.steps
                if step.token != EOS
            ]
        return content

    def called_line(self, tool: str, arguments: str) -> dict[str, Any]:
        """A call comes whole, its arguments as an object."""
        function = {"index": 0, "name": tool, "arguments": json.loads(arguments)}
        call = {"id": f"call_{self.number()[:8]}", "function": function}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        return {"model": self.tag, "created_at": _WHEN, "message": message, "done": False}

    def last(self, chat: bool, ask: Ask, piece: Piece, count: int) -> dict[str, Any]:
        said: dict[str, Any] = {"message": {"role": "assistant", "content": ""}}
        return {
            "model": self.tag,
            "created_at": _WHEN,
            **(said if chat else {"response": ""}),
            "done": True,
            "done_reason": piece.finish,
            "total_duration": 50_000_000,
            "load_duration": 5_000_000,
            "prompt_eval_count": len(ask.prompt),
            "prompt_eval_duration": 15_000_000,
            "eval_count": count,
            "eval_duration": 30_000_000,
        }

    async def embed(self, exchange: Exchange) -> None:
        body = self.body(exchange)
        self.known_model(body)
        given = body.get("input")
        texts = given if isinstance(given, list) else [given]
        size = body.get("dimensions") or 64
        count = sum(len(tokenize(text)) for text in texts)
        found = [vector(text, 64)[:size] for text in texts]
        head = {"model": self.tag, "embeddings": found, "total_duration": 14_000_000}
        reply(exchange, 200, {**head, "load_duration": 1_000_000, "prompt_eval_count": count})

    async def version(self, exchange: Exchange) -> None:
        reply(exchange, 200, {"version": "0.13.0"})

    async def tags(self, exchange: Exchange) -> None:
        able = ["completion", "tools", "embedding"]
        reply(exchange, 200, {"models": [{**self.card(), "capabilities": able}]})

    async def loaded(self, exchange: Exchange) -> None:
        more = {"expires_at": _WHEN, "size_vram": 0, "context_length": self.context}
        reply(exchange, 200, {"models": [{**self.card(), **more}]})

    def card(self) -> dict[str, Any]:
        details = {"parent_model": "", "format": "gguf", "family": "gemma3", "families": ["gemma3"]}
        details |= {"parameter_size": "268M", "quantization_level": "Q4_K_M"}
        card = {"name": self.tag, "model": self.tag, "modified_at": _WHEN, "size": 253_000_000}
        return {**card, "digest": "0" * 64, "details": details}

    # Its `/v1`.

    def check(self, body: dict[str, Any], chat: bool) -> None:
        """Go's decoder minds types; of what it does not know it takes no notice."""
        for name, kind, go in (
            ("temperature", (int, float), "float64"),
            ("max_tokens", (int,), "int"),
            ("seed", (int,), "int"),
            ("messages", (list,), "[]openai.Message"),
        ):
            value = body.get(name)
            if value is not None and not isinstance(value, kind):
                found = {str: "string", list: "array", dict: "object"}.get(type(value), "number")
                where = f"Go struct field ChatCompletionRequest.{name} of type {go}"
                raise Refusal(400, f"json: cannot unmarshal {found} into {where}")
        for name in body.keys() - _KNOWN:
            del body[name]
        if chat and not body.get("messages"):
            raise Refusal(400, "[] is too short - 'messages'")
        for tool in body.get("tools") or ():
            tool["function"] = {"name": "", **(tool.get("function") or {})}
        body.setdefault("temperature", 1.0)
        body.setdefault("top_p", 1.0)
        body["stop"] = list(stops_of(body))
        self.known_model(body)

    def constraint(self, body: dict[str, Any]) -> str | None:
        wanted = body.get("response_format") or {}
        if wanted.get("type") == "json_object":
            return self.formatted("json")
        if wanted.get("type") == "json_schema":
            return self.formatted((wanted.get("json_schema") or {}).get("schema"))
        return None

    def fits(self, prompt: Sequence[int], body: Mapping[str, Any]) -> None:
        """Any prompt does: it is cut without a word."""

    def asks(self, body: dict[str, Any], chat: bool, forced: str | None) -> list[Ask]:
        if not chat and not isinstance(body.get("prompt"), str):
            where = "Go struct field CompletionRequest.prompt of type string"
            raise Refusal(400, f"json: cannot unmarshal array into {where}")
        if not chat and not body["prompt"]:
            body = {**body, "prompt": " "}
        (ask,) = super().asks(body, chat, forced)
        return [replace(ask, prompt=ask.prompt[-self.context + 1 :])]

    def default_tokens(self, chat: bool, prompt_tokens: int) -> int:
        return max(self.context - prompt_tokens, 1)

    async def models(self, exchange: Exchange) -> None:
        card = {"id": self.tag, "object": "model", "created": 1787313600, "owned_by": "library"}
        reply(exchange, 200, {"object": "list", "data": [card]})

    async def openai_embed(self, exchange: Exchange) -> None:
        body = self.body(exchange)
        self.known_model(body)
        given = body.get("input")
        texts = given if isinstance(given, list) else [given]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise Refusal(400, "invalid input")
        count = sum(len(tokenize(text)) for text in texts)
        data = [
            {"object": "embedding", "embedding": vector(text, 64), "index": index}
            for index, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count}
        reply(
            exchange, 200, {"object": "list", "data": data, "model": body["model"], "usage": usage}
        )


def likely(token: int, logprob: float) -> dict[str, Any]:
    raw = piece_of(token)
    return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}


def runner_too_long(tokens: int, context: int) -> str:
    message = f"request ({tokens} tokens) exceeds the available context size ({context} tokens),"
    error = {"code": 400, "message": f"{message} try increasing it"}
    kind = {"type": "exceed_context_size_error", "n_prompt_tokens": tokens, "n_ctx": context}
    return json.dumps({"error": {**error, **kind}})


def whole_of(lines: Sequence[dict[str, Any]], chat: bool) -> dict[str, Any]:
    """The last line, with what all say."""
    last = lines[-1]
    if not chat:
        return {**last, "response": "".join(line["response"] for line in lines)}
    messages = [line["message"] for line in lines]
    message = {"role": "assistant", "content": "".join(each["content"] for each in messages)}
    calls = [call for each in messages for call in each.get("tool_calls", ())]
    return {**last, "message": {**message, **({"tool_calls": calls} if calls else {})}}
