"""llama.cpp's ``llama-server`` (tag b11434) with one model, ``--jinja``, ``--metrics`` and 4 slots.

Shapes, order of keys and sentences were recorded from the real server and are compared with it by
``tests/e2e/test_fakes_are_true.py``. Read in ``tools/server/{server-context,server-common,
server-task,server-schema}.cpp``, as the recorded one had no template for tools and was started
neither for embeddings nor for reranking: calls, vectors, ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from fake_servers.answer import Holding, Piece
from fake_servers.constraint import Impossible, by_grammar, by_schema
from fake_servers.model import BOS, EOS, Step, detokenize, piece_of
from fake_servers.openai_like import OpenAIFake, Writer
from fake_servers.serving import Refusal, event, likeness, reply, vector
from forebay.testing import Exchange

__all__ = ["LlamaCpp", "LlamaCppEmbedding", "LlamaCppReranking"]

_SIGNS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_FINGERPRINT = "b0-unknown"
_NUMBERS = (
    *("temperature", "top_p", "top_k", "min_p", "max_tokens", "max_completion_tokens", "n_predict"),
    *("seed", "n", "presence_penalty", "frequency_penalty", "repeat_penalty"),
)


class LlamaCppWriter(Writer):
    def __init__(self, server: OpenAIFake, body: Mapping[str, Any], chat: bool) -> None:
        super().__init__(server, body, chat)
        number = int(server.number() + server.number(), 16)
        self.id = "chatcmpl-" + "".join(_SIGNS[number // 62**place % 62] for place in range(32))
        self.counts: dict[int, int] = {}

    @property
    def model(self) -> str:
        """Its own name, whatever was asked for."""
        return self.server.model

    def chunk(self, choices: list[Any], **more: Any) -> bytes:
        """``created`` is the clock's; a completion's chunks have their keys in another order."""
        head = {"choices": choices, "created": self.server.now()}
        rest = {"model": self.model, "system_fingerprint": _FINGERPRINT, "object": self.object}
        if self.chat:
            return event({**head, "id": self.id, **rest, **more})
        timings = {"timings": more.pop("timings")} if "timings" in more else {}
        return event({**head, **rest, **more, "id": self.id, **timings})

    def logprobs(self, index: int, steps: Sequence[Step]) -> dict[str, Any] | None:
        """The same form for both routes; the bytes are the token's own."""
        asked = self.body.get("logprobs")
        top = (self.body.get("top_logprobs") or 0) if self.chat else asked
        if asked is None or asked is False:
            return None
        visible = [step for step in steps if step.token != EOS]
        return {
            "content": [
                {
                    **likely(step.token, step.logprob),
                    "top_logprobs": [likely(*pair) for pair in step.top[: int(top or 0)]],
                }
                for step in visible
            ]
        }

    def piece(self, index: int, piece: Piece) -> Iterator[bytes]:
        count = self.counts[index] = self.counts.get(index, 0) + len(piece.steps)
        logprobs = self.logprobs(index, piece.steps)
        if not self.chat:
            yield from self.text_piece(index, piece, logprobs, count)
            return
        if count == len(piece.steps):
            delta = {"role": "assistant", "content": None}
            yield self.chunk([{"finish_reason": None, "index": index, "delta": delta}])
        for delta in self.deltas(index, piece):
            choice = {"finish_reason": None, "index": index, "delta": delta}
            yield self.chunk([{**choice, **({"logprobs": logprobs} if logprobs else {})}])
        if piece.finish:
            finish = "tool_calls" if self.tool and piece.finish == "stop" else piece.finish
            choice = {"finish_reason": finish, "index": index, "delta": {}}
            timings = self.timings(index)
            if self.option("include_usage"):
                yield self.chunk([choice])
                yield self.chunk([], usage=self.usage_of(index), timings=timings)
            else:
                yield self.chunk([choice], timings=timings)

    def text_piece(self, index: int, piece: Piece, logprobs: object, count: int) -> Iterator[bytes]:
        """The last chunk has no text, but usage, whoever asked."""
        if piece.text or not piece.finish:
            choice = {"text": piece.text, "index": index, "logprobs": logprobs}
            yield self.chunk([{**choice, "finish_reason": None}])
        if piece.finish:
            choice = {"text": "", "index": index, "logprobs": None, "finish_reason": piece.finish}
            more = {"usage": self.usage_of(index), "timings": self.timings(index)}
            yield self.chunk([choice], **more)

    def deltas(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        if self.tool is None:
            if piece.text:
                yield {"content": piece.text}
            return
        if index not in self.said:
            call = {"index": 0, "id": self.server.number() + self.server.number()}
            function = {"name": self.tool, "arguments": ""}
            yield {"tool_calls": [{**call, "type": "function", "function": function}]}
        if piece.text:
            yield {"tool_calls": [{"index": 0, "function": {"arguments": piece.text}}]}

    def usage_of(self, index: int) -> dict[str, Any]:
        """Of one choice: each has a task, and a usage, of its own."""
        prompt, said = len(self.asks[index].prompt), self.counts[index]
        counts = {"completion_tokens": said, "prompt_tokens": prompt, "total_tokens": prompt + said}
        return {**counts, "prompt_tokens_details": {"cached_tokens": 0}}

    def timings(self, index: int) -> dict[str, Any]:
        prompt, said = len(self.asks[index].prompt), self.counts[index]
        return {
            "cache_n": 0,
            "prompt_n": prompt,
            "prompt_ms": 2.0 * prompt,
            "prompt_per_token_ms": 2.0,
            "prompt_per_second": 500.0,
            "predicted_n": said,
            "predicted_ms": 10.0 * said,
            "predicted_per_token_ms": 10.0,
            "predicted_per_second": 100.0,
        }

    def whole(self, answers: Mapping[int, Sequence[Piece]]) -> dict[str, Any]:
        """Usage and timings are the first choice's."""
        for index, said in answers.items():
            self.counts[index] = sum(len(piece.steps) for piece in said)
        return {
            "choices": [self.choice(index, said) for index, said in sorted(answers.items())],
            "created": self.server.now(),
            "model": self.model,
            "system_fingerprint": _FINGERPRINT,
            "object": self.object,
            "usage": self.usage_of(0),
            "id": self.id,
            "timings": self.timings(0),
        }

    def choice(self, index: int, said: Sequence[Piece]) -> dict[str, Any]:
        text, finish = "".join(piece.text for piece in said), said[-1].finish
        logprobs = self.logprobs(index, [step for piece in said for step in piece.steps])
        if not self.chat:
            choice = {"text": text, "index": index, "logprobs": logprobs}
            return {**choice, "finish_reason": finish}
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self.tool is not None:
            finish = "tool_calls" if finish == "stop" else finish
            function = {"name": self.tool, "arguments": text}
            number = self.server.number() + self.server.number()
            call = {"type": "function", "function": function, "id": number}
            message |= {"content": None, "tool_calls": [call]}
        choice = {"finish_reason": finish, "index": index, "message": message}
        return {**choice, **({"logprobs": logprobs} if logprobs else {})}


def likely(token: int, logprob: float) -> dict[str, Any]:
    piece = piece_of(token)
    text = piece.decode(errors="replace")
    return {"id": token, "token": text, "bytes": list(piece), "logprob": logprob}


class LlamaCpp(OpenAIFake):
    writer = LlamaCppWriter
    holding: ClassVar[Holding] = "begin"
    content_type = "text/event-stream"
    routes: ClassVar[Mapping[str, str]] = {
        "GET /health": "health",
        "GET /props": "props",
        "GET /slots": "slots_page",
        "GET /v1/models": "models",
        "GET /metrics": "metrics",
        "POST /tokenize": "tokenize",
        "POST /detokenize": "detokenize",
        "POST /apply-template": "apply_template",
        "POST /v1/chat/completions": "chat",
        "POST /v1/completions": "complete",
        "POST /v1/embeddings": "embed",
        "POST /v1/rerank": "rerank",
    }

    async def elsewhere(self, exchange: Exchange, path: str) -> None:
        """404 for a method that is not served, too, with its keys in another order."""
        error = {"message": "File Not Found", "type": "not_found_error", "code": 404}
        reply(exchange, 404, {"error": error}, _JSON)

    def refuse(self, exchange: Exchange, refusal: Refusal) -> None:
        kinds = {500: "server_error", 501: "not_supported_error", 503: "unavailable_error"}
        kind = refusal.kind or kinds.get(refusal.status, "invalid_request_error")
        error: dict[str, Any] = {"code": refusal.status, "message": refusal.message, "type": kind}
        if isinstance(refusal, TooLong):
            error |= {"n_prompt_tokens": refusal.tokens, "n_ctx": self.context}
        reply(exchange, refusal.status, {"error": error}, _JSON)

    def body(self, exchange: Exchange) -> dict[str, Any]:
        try:
            content = json.loads(exchange.body)
        except ValueError as wrong:
            message = f"[json.exception.parse_error.101] parse error: {wrong}"
            raise Refusal(400, message) from None
        return content if isinstance(content, dict) else {}

    def check(self, body: dict[str, Any], chat: bool) -> None:
        """What is out of all sense passes: a temperature below 0 is greedy, as 0 is."""
        required = "messages" if chat else "prompt"
        if required not in body:
            raise Refusal(400, f"'{required}' is required" if chat else '"prompt" must be provided')
        if chat and not isinstance(body["messages"], list):
            raise Refusal(400, "Expected 'messages' to be an array")
        if body[required] == [] and not chat:
            raise Refusal(400, '"prompt" must not be empty')
        if chat:
            self.check_chat(body)
        for name in _NUMBERS:
            if body.get(name) is not None and not isinstance(body[name], (int, float)):
                kind = "string" if isinstance(body[name], str) else "array"
                message = f"[json.exception.type_error.302] type must be number, but is {kind}"
                raise Refusal(400, f"Field '{name}': {message}")
        if body.get("n") is not None and not 1 <= body["n"] <= 4:
            message = f"Field 'n': Value must be between 1 <= value <= 4, but got {body['n']}"
            raise Refusal(400, message)
        self.tolerate(body)

    def check_chat(self, body: dict[str, Any]) -> None:
        if body.get("tools") and body.get("grammar"):
            raise Refusal(400, "Cannot use custom grammar constraints with tools.")
        if body.get("logprobs") and body.get("tools") and body.get("stream"):
            raise Refusal(400, "logprobs is not supported with tools + stream")
        if body.get("top_logprobs") and not body.get("logprobs"):
            raise Refusal(400, "top_logprobs requires logprobs to be set to true")
        for tool in body.get("tools") or ():
            if "name" not in tool.get("function", {}):
                shown = json.dumps(body["tools"], indent=2)
                message = "Failed to parse tools: [json.exception.out_of_range.403] key 'name' not"
                raise Refusal(500, f"{message} found; tools = {shown}")
        choice = body.get("tool_choice")
        if isinstance(choice, str) and choice not in ("auto", "none", "required"):
            raise Refusal(400, f"Invalid tool_choice: {choice}")

    def tolerate(self, body: dict[str, Any]) -> None:
        """Put right what the server itself takes without a word."""
        if (body.get("temperature") or 0) < 0:
            body["temperature"] = 0
        if (body.get("top_p") or 0) > 1:
            body["top_p"] = 1
        for name in ("max_tokens", "max_completion_tokens", "n_predict"):
            if body.get(name) == 0:
                body[name] = 1
            elif (body.get(name) or 0) < 0:
                body[name] = None
        if body.get("n_predict") and not body.get("max_tokens"):
            body["max_tokens"] = body["n_predict"]
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        if limit and limit > self.context:
            body["max_tokens"] = body["max_completion_tokens"] = None
        bias = body.get("logit_bias") or {}
        body["logit_bias"] = {key: bias[key] for key in bias if key.lstrip("-").isdecimal()}

    def constraint(self, body: dict[str, Any]) -> str | None:
        format_ = body.get("response_format") or {}
        kind, schema = format_.get("type", "text"), body.get("json_schema")
        try:
            if kind == "json_object":
                schema = format_.get("schema") or {"type": "object"}
                return by_schema(schema) if format_.get("schema") else '{"one": "two"}'
            if kind == "json_schema":
                schema = (format_.get("json_schema") or {}).get("schema") or {}
            elif kind != "text":
                message = 'response_format type must be one of "text" or "json_object", but got:'
                raise Refusal(400, f"{message} {kind}")
            if schema is not None and body.get("grammar"):
                raise Refusal(
                    400, 'Either "json_schema" or "grammar" can be specified, but not both'
                )
            if schema is not None:
                return by_schema(schema)
            return by_grammar(body["grammar"]) if body.get("grammar") else None
        except Impossible as why:
            if "grammar" in body:
                raise Refusal(400, "Failed to parse grammar") from None
            message = "Unable to generate parser for this template. Automatic parser generation"
            message += f" failed: JSON schema error at #: {why}"
            raise Refusal(400, message) from None

    def called(self, body: dict[str, Any]) -> str | None:
        """A choice that is no word is not understood, and taken for `auto`."""
        if isinstance(body.get("tool_choice"), dict):
            body = {**body, "tool_choice": "auto"}
        return super().called(body)

    def fits(self, prompt: Sequence[int], body: Mapping[str, Any]) -> None:
        if len(prompt) >= self.context:
            raise TooLong(len(prompt), self.context)

    def default_tokens(self, chat: bool, prompt_tokens: int) -> int:
        """No limit but the context's."""
        return self.context - prompt_tokens

    def headers(self, writer: Writer) -> Mapping[str, str]:
        return _JSON

    async def health(self, exchange: Exchange) -> None:
        reply(exchange, 200, {"status": "ok"}, _JSON)

    async def props(self, exchange: Exchange) -> None:
        page = json.loads(Path(__file__).parents[1].joinpath("llamacpp_props.json").read_text())
        page["chat_template_caps"] = {**page.get("chat_template_caps", {}), "supports_tools": True}
        reply(exchange, 200, page, _JSON)

    async def slots_page(self, exchange: Exchange) -> None:
        slots = [
            {"id": number, "n_ctx": self.context, "is_processing": number < self.running}
            for number in range(4)
        ]
        reply(exchange, 200, slots, _JSON)

    async def models(self, exchange: Exchange) -> None:
        """Two lists, of which the first is Ollama's."""
        meta = {"n_ctx_train": 32768, "n_ctx": self.context}
        card = {"id": self.model, "object": "model", "created": self.now(), "owned_by": "llamacpp"}
        listed = {"name": self.model, "model": self.model}
        lists = {"models": [listed], "object": "list", "data": [{**card, "meta": meta}]}
        reply(exchange, 200, lists, _JSON)

    async def metrics(self, exchange: Exchange) -> None:
        page = Path(__file__).parents[1].joinpath("llamacpp_metrics.txt").read_text()
        lines = []
        for line in page.splitlines():
            for name, value in (("processing", self.running), ("deferred", self.waiting)):
                if line.startswith(f"llamacpp:requests_{name} "):
                    line = f"llamacpp:requests_{name} {value}"
            lines.append(line)
        kind = {"content-type": "text/plain; version=0.0.4"}
        reply(exchange, 200, "\n".join([*lines, ""]).encode(), kind)

    async def tokenize(self, exchange: Exchange) -> None:
        body = self.body(exchange)
        tokens = self.text_tokens(body.get("content", ""), body.get("add_special", False))
        if not body.get("with_pieces"):
            reply(exchange, 200, {"tokens": tokens}, _JSON)
            return
        pieces = []
        for token in tokens:
            raw = b"<bos>" if token == BOS else piece_of(token)
            try:
                pieces.append({"id": token, "piece": raw.decode()})
            except UnicodeDecodeError:
                pieces.append({"id": token, "piece": list(raw)})
        reply(exchange, 200, {"tokens": pieces}, _JSON)

    async def detokenize(self, exchange: Exchange) -> None:
        tokens = self.body(exchange).get("tokens", [])
        begin = "<bos>" if tokens[:1] == [BOS] else ""
        reply(exchange, 200, {"content": begin + detokenize(tokens)}, _JSON)

    async def apply_template(self, exchange: Exchange) -> None:
        prompt = detokenize(self.chat_prompt(self.body(exchange)["messages"]))
        reply(exchange, 200, {"prompt": prompt}, _JSON)

    async def embed(self, exchange: Exchange) -> None:
        message = "This server does not support embeddings. Start it with `--embeddings`"
        raise Refusal(501, message)

    async def rerank(self, exchange: Exchange) -> None:
        message = "This server does not support reranking. Start it with `--reranking`"
        raise Refusal(501, message)


_JSON = {"content-type": "application/json; charset=utf-8"}


class TooLong(Refusal):
    def __init__(self, tokens: int, context: int) -> None:
        message = f"request ({tokens} tokens) exceeds the available context size ({context} tokens)"
        super().__init__(400, f"{message}, try increasing it", "exceed_context_size_error")
        self.tokens = tokens


class LlamaCppEmbedding(LlamaCpp):
    """Started with ``--embeddings --pooling mean``."""

    async def embed(self, exchange: Exchange) -> None:
        body = self.body(exchange)
        given = body.get("input", body.get("content"))
        if not given:
            raise Refusal(400, '"input" or "content" must be provided')
        given = given if isinstance(given, list) else [given]
        given = [given] if isinstance(given[0], int) else given
        texts = [text if isinstance(text, str) else detokenize(text) for text in given]
        count = sum(len(self.text_tokens(text, special=True)) for text in texts)
        data = [
            {"embedding": vector(text), "index": index, "object": "embedding"}
            for index, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count}
        content = {"model": self.model, "object": "list", "usage": usage, "data": data}
        reply(exchange, 200, content, _JSON)


class LlamaCppReranking(LlamaCpp):
    """Started with ``--reranking``."""

    async def rerank(self, exchange: Exchange) -> None:
        body = self.body(exchange)
        if not isinstance(body.get("query"), str):
            raise Refusal(400, '"query" must be provided')
        documents = body.get("documents") or body.get("texts")
        if not documents:
            raise Refusal(400, '"documents" must be a non-empty string array')
        results = [
            {"index": index, "relevance_score": likeness(body["query"], text)}
            for index, text in enumerate(documents)
        ]
        results.sort(key=lambda result: -result["relevance_score"])
        count = sum(len(self.text_tokens(text, special=True)) for text in documents)
        usage = {"prompt_tokens": count, "total_tokens": count}
        content = {"model": self.model, "object": "list", "usage": usage}
        results = results[: body.get("top_n") or len(results)]
        reply(exchange, 200, {**content, "results": results}, _JSON)
