"""SGLang 0.5.23's OpenAI server, started with a tool parser, metrics and priority scheduling.

Read in its wheel: ``entrypoints/openai/{protocol,serving_*}.py`` (shapes and order of events),
``sampling/sampling_params.py`` (bounds, and their sentences), ``managers/tokenizer_manager.py``
(prompts that are too long), ``entrypoints/http_server.py`` (routes, validation errors). Nobody
drove the real one here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from fake_servers.answer import Piece
from fake_servers.constraint import Impossible, by_grammar, by_regex, by_schema
from fake_servers.model import detokenize
from fake_servers.openai_fields import mistakes, named_tool
from fake_servers.openai_like import OpenAIFake, Writer, token_texts
from fake_servers.serving import Refusal, event, likeness, reply, vector
from forebay.testing import Exchange

__all__ = ["Sglang", "SglangEmbedding"]

#: Field, what it may be, and how that is said.
_BOUNDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("temperature", lambda value: value >= 0, "a non-negative finite number"),
    ("top_p", lambda value: 0 < value <= 1, "in (0, 1]"),
    ("min_p", lambda value: 0 <= value <= 1, "in [0, 1]"),
    ("top_k", lambda value: value == -1 or value >= 1, "-1 (disable) or at least 1"),
    ("frequency_penalty", lambda value: -2 <= value <= 2, "in [-2, 2]"),
    ("presence_penalty", lambda value: -2 <= value <= 2, "in [-2, 2]"),
    ("repetition_penalty", lambda value: 0 < value <= 2, "in (0, 2] (1.0 = no penalty)"),
)


class SglangWriter(Writer):
    def __init__(self, server: OpenAIFake, body: Mapping[str, Any], chat: bool) -> None:
        super().__init__(server, body, chat)
        self.id = server.number() + server.number()

    def texts(self, index: int, steps: Sequence[Any]) -> list[str]:
        return token_texts(steps)

    def chunk(self, choices: list[Any], usage: object = None) -> bytes:
        return event(
            {
                "id": self.id,
                "object": self.object,
                "created": self.created,
                "model": self.model,
                "choices": choices,
                "usage": usage,
            }
        )

    def said_in(self, index: int, finish: str | None = None, **said: Any) -> dict[str, Any]:
        """A choice of a chunk of chat."""
        delta = {"role": None, "content": None, "reasoning_content": None, "tool_calls": None}
        tail = {"logprobs": said.pop("logprobs", None), "finish_reason": finish}
        tail["matched_stop"] = said.pop("matched", None)
        return {"index": index, "delta": {**delta, **said}, **tail}

    def begin(self) -> Iterator[bytes]:
        if self.chat:
            for index in range(len(self.asks)):
                yield self.chunk([self.said_in(index, role="assistant", content="")])

    def piece(self, index: int, piece: Piece) -> Iterator[bytes]:
        """The finish reason of chat comes in a chunk of its own."""
        logprobs = self.logprobs(index, piece.steps)
        if not self.chat:
            tail = {"logprobs": logprobs, "finish_reason": piece.finish}
            choice = {"index": index, "text": piece.text, **tail, "matched_stop": piece.matched}
            yield self.chunk([choice])
            return
        if self.tool is not None:
            yield self.chunk([self.said_in(index, tool_calls=[self.call(index, piece)])])
        elif piece.text or logprobs:
            yield self.chunk([self.said_in(index, content=piece.text, logprobs=logprobs)])
        if piece.finish:
            finish = "tool_calls" if self.tool and piece.finish == "stop" else piece.finish
            yield self.chunk([self.said_in(index, finish, matched=piece.matched)])

    def call(self, index: int, piece: Piece) -> dict[str, Any]:
        first = index not in self.said
        function = {"name": self.tool if first else None, "arguments": piece.text}
        number = f"call_{self.server.number()}{self.server.number()[:8]}" if first else None
        return {"id": number, "index": 0, "type": "function", "function": function}

    def end(self) -> Iterator[bytes]:
        if self.option("include_usage"):
            yield self.chunk([], self.counts())
        yield from super().end()

    def counts(self) -> dict[str, Any]:
        return self.usage(prompt_tokens_details=None, reasoning_tokens=0)

    def whole(self, answers: Mapping[int, Sequence[Piece]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": [self.choice(index, said) for index, said in sorted(answers.items())],
            "usage": self.counts(),
            "metadata": {"weight_version": "default"},
        }

    def choice(self, index: int, said: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in said)
        steps = [step for piece in said for step in piece.steps]
        finish = said[-1].finish
        tail = {"logprobs": self.logprobs(index, steps), "finish_reason": finish}
        tail["matched_stop"] = said[-1].matched
        if not self.chat:
            echo = detokenize(self.asks[index].prompt) if self.body.get("echo") else ""
            return {"index": index, "text": echo + text, **tail}
        message: dict[str, Any] = {"role": "assistant", "content": text}
        message |= {"reasoning_content": None, "tool_calls": None}
        if self.tool is not None:
            function = {"name": self.tool, "arguments": text}
            number = f"call_{self.server.number()}{self.server.number()[:8]}"
            call = {"id": number, "index": 0, "type": "function", "function": function}
            message |= {"content": None, "tool_calls": [call]}
            tail["finish_reason"] = "tool_calls" if finish == "stop" else finish
        return {"index": index, "message": message, **tail}


class Sglang(OpenAIFake):
    writer = SglangWriter
    embeds: ClassVar[bool] = False
    routes: ClassVar[Mapping[str, str]] = {
        "GET /health": "health",
        "GET /server_info": "server_info",
        "GET /v1/models": "models",
        "GET /metrics": "metrics",
        "GET /v1/loads": "loads",
        "POST /tokenize": "tokenize",
        "POST /detokenize": "detokenize",
        "POST /v1/chat/completions": "chat",
        "POST /v1/completions": "complete",
        "POST /v1/embeddings": "embed",
        "POST /v1/rerank": "rerank",
    }

    def refuse(self, exchange: Exchange, refusal: Refusal) -> None:
        """Flat, and the status stands in it as a number."""
        reply(exchange, refusal.status, flat(refusal))

    def check(self, body: dict[str, Any], chat: bool) -> None:
        found = mistakes(body, ("messages",) if chat else ("prompt",))
        kinds = ("text", "json_object", "json_schema", "structural_tag")
        kind = (body.get("response_format") or {}).get("type", "text")
        if kind not in kinds:
            loc = ("body", "response_format", "type")
            found.append({"type": "literal_error", "loc": loc, "input": kind})
        for name in ("max_tokens", "max_completion_tokens"):
            value = body.get(name)
            if isinstance(value, int) and value <= 0:
                said = "Value error, max_tokens must be positive"
                loc = ("body", name)
                found.append({"type": "value_error", "loc": loc, "msg": said, "input": value})
        if found:
            raise Refusal(400, str(found), "Bad Request")
        self.check_words(body, chat)
        self.check_sampling(body)

    def check_words(self, body: dict[str, Any], chat: bool) -> None:
        if chat and not body["messages"]:
            raise Refusal(400, "Messages cannot be empty.")
        if not chat and not body["prompt"]:
            raise Refusal(400, "Prompt cannot be empty")
        if chat and body.get("tool_choice") == "required" and not body.get("tools"):
            raise Refusal(400, "Tools cannot be empty if tool choice is set to required.")
        if isinstance(body.get("tool_choice"), dict) and named_tool(body) is None:
            name = body["tool_choice"].get("function", {}).get("name")
            raise Refusal(400, f"Tool '{name}' not found in tools list.")

    def check_sampling(self, body: dict[str, Any]) -> None:
        if isinstance(body.get("n"), int) and body["n"] < 1:
            raise Refusal(400, f"n must be at least 1, got {body['n']}.")
        for name, right, said in _BOUNDS:
            value = body.get(name)
            if value is not None and not right(value):
                raise Refusal(400, f"{name} must be {said}, got {value}.")
        for key in body.get("logit_bias") or ():
            if not key.lstrip("-").isdecimal():
                raise Refusal(400, f"invalid literal for int() with base 10: {key!r}")

    def constraint(self, body: dict[str, Any]) -> str | None:
        format_ = body.get("response_format") or {}
        wanted = [name for name in ("json_schema", "regex", "ebnf") if body.get(name)]
        if len(wanted) > 1:
            raise Refusal(400, "Only one of regex, json_schema, or ebnf can be set.")
        try:
            if format_.get("type") == "json_schema":
                return by_schema((format_.get("json_schema") or {}).get("schema") or {})
            if format_.get("type") == "json_object":
                return '{"one": "two"}'
            if body.get("regex"):
                return by_regex(body["regex"])
            if body.get("ebnf"):
                return by_grammar(body["ebnf"])
        except Impossible as why:
            raise Refusal(400, f"Failed to compile json grammar: {why}") from None
        return None

    def fits(self, prompt: Sequence[int], body: Mapping[str, Any]) -> None:
        count, context = len(prompt), self.context
        if count >= context:
            message = f"The input ({count} tokens) is longer than the model's context length"
            raise Refusal(400, f"{message} ({context} tokens).")
        wanted = body.get("max_completion_tokens") or body.get("max_tokens") or 0
        if count + wanted > context:
            message = (
                f"Requested token count exceeds the model's maximum context length of {context}"
            )
            message += f" tokens. You requested a total of {count + wanted} tokens: {count} tokens"
            message += f" from the input messages and {wanted} tokens for the completion. Please"
            message += " reduce the number of tokens in the input messages or the completion to fit"
            raise Refusal(400, f"{message} within the limit.")

    async def health(self, exchange: Exchange) -> None:
        reply(exchange, 200)

    async def models(self, exchange: Exchange) -> None:
        card = {"id": self.model, "object": "model", "created": self.now(), "owned_by": "sglang"}
        card |= {"root": self.model, "parent": None, "max_model_len": self.context}
        reply(exchange, 200, {"object": "list", "data": [card]})

    async def server_info(self, exchange: Exchange) -> None:
        arguments = {
            "model_path": self.model,
            "served_model_name": self.model,
            "is_embedding": self.embeds,
            "tool_call_parser": "pythonic",
            "max_running_requests": self.slots._value + self.running,
            "enable_metrics": True,
            "enable_priority_scheduling": True,
            "schedule_low_priority_values_first": False,
            "internal_states": [{"last_gen_throughput": 0.0}],
            "version": "0.5.23",
        }
        reply(exchange, 200, arguments)

    async def loads(self, exchange: Exchange) -> None:
        rank = {"dp_rank": 0, "num_running_reqs": self.running, "num_waiting_reqs": self.waiting}
        reply(exchange, 200, {"version": "0.5.23", "loads": [{**rank, "token_usage": 0.0}]})

    async def metrics(self, exchange: Exchange) -> None:
        labels = f'model_name="{self.model}",engine_type="unified",tp_rank="0",pp_rank="0"'
        lines = []
        for name, value in (
            ("num_running_reqs", self.running),
            ("num_queue_reqs", self.waiting),
            ("token_usage", self.running / 100),
        ):
            lines += [f"# TYPE sglang:{name} gauge", f"sglang:{name}{{{labels}}} {float(value)}"]
        page = "\n".join(lines) + "\n"
        reply(exchange, 200, page.encode(), {"content-type": "text/plain; version=0.0.4"})

    async def tokenize(self, exchange: Exchange) -> None:
        body = self.body(exchange)
        if not isinstance(body.get("prompt"), str):
            raise Refusal(400, str(mistakes(body, ("prompt",))), "Bad Request")
        tokens = self.text_tokens(body["prompt"], body.get("add_special_tokens", True))
        counts = {"count": len(tokens), "max_model_len": self.context}
        reply(exchange, 200, {"tokens": tokens, **counts})

    async def detokenize(self, exchange: Exchange) -> None:
        reply(exchange, 200, {"text": detokenize(self.body(exchange)["tokens"])})

    async def embed(self, exchange: Exchange) -> None:
        body = self.body(exchange)
        if not self.embeds:
            message = "This model does not appear to be an embedding model by default. Please add"
            raise Refusal(400, f"{message} `--is-embedding` when launching the server.")
        given = body.get("input")
        if not given:
            raise Refusal(400, "Input cannot be empty")
        given = given if isinstance(given, list) else [given]
        given = [given] if isinstance(given[0], int) else given
        texts = [text if isinstance(text, str) else detokenize(text) for text in given]
        count = sum(len(self.text_tokens(text, special=True)) for text in texts)
        usage = {"prompt_tokens": count, "total_tokens": count, "completion_tokens": 0}
        data = [
            {"object": "embedding", "embedding": vector(text), "index": index}
            for index, text in enumerate(texts)
        ]
        content = {"object": "list", "data": data, "model": body.get("model", self.model)}
        reply(exchange, 200, {**content, "usage": {**usage, "prompt_tokens_details": None}})

    async def rerank(self, exchange: Exchange) -> None:
        """A bare list, whose key is ``score``."""
        body = self.body(exchange)
        keep = body.get("return_documents", True)
        ranks = [
            {
                "score": likeness(body["query"], text),
                "document": text if keep else None,
                "index": index,
                "meta_info": {"prompt_tokens": len(self.text_tokens(text, special=True))},
            }
            for index, text in enumerate(body["documents"])
        ]
        ranks.sort(key=lambda rank: -float(rank["score"]))  # type: ignore[arg-type]
        reply(exchange, 200, ranks[: body.get("top_n") or len(ranks)])


class SglangEmbedding(Sglang):
    """Started with `--is-embedding`."""

    embeds = True


def flat(refusal: Refusal) -> dict[str, Any]:
    kind = refusal.kind or "BadRequestError"
    said = {"object": "error", "message": refusal.message, "type": kind}
    return {**said, "param": refusal.param, "code": refusal.status}
