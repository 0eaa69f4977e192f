"""OpenAI's own API: chat, completions, embeddings, models, with its strictness.

Read in openai/openai-python (e43b422): ``types/`` (shapes); sentences of errors as the API's
documentation gives them. Nobody drove the real one here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from fake_servers.answer import Piece
from fake_servers.constraint import Impossible, by_schema
from fake_servers.model import detokenize
from fake_servers.openai_fields import named_tool, stops_of
from fake_servers.openai_like import OpenAIFake, Writer
from fake_servers.serving import Refusal, event, reply, vector
from forebay.testing import Exchange

__all__ = ["PlainOpenAI"]

_BOTH = frozenset(
    (
        *("model", "stream", "stream_options", "max_tokens", "temperature", "top_p", "n", "stop"),
        *("presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "user", "seed"),
    )
)
_KNOWN = {
    True: _BOTH
    | {
        *("messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "store"),
        *("response_format", "parallel_tool_calls", "metadata", "service_tier", "reasoning_effort"),
    },
    False: _BOTH | {"prompt", "suffix", "echo", "best_of"},
}
#: Field, and the least and most that it may be.
_BOUNDS = (
    ("temperature", 0, 2),
    ("top_p", 0, 1),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("n", 1, 128),
    ("top_logprobs", 0, 20),
)
_INTEGERS = ("n", "max_tokens", "max_completion_tokens", "seed", "top_logprobs")


class PlainWriter(Writer):
    def chunk(self, choices: list[Any], **more: Any) -> bytes:
        head = {"id": self.id, "object": self.object, "created": self.created}
        nothing = {"usage": None} if self.option("include_usage") else {}
        tail = {"service_tier": "default", "system_fingerprint": "fp_b1cb4f1ec8"}
        return event({**head, "model": self.model, **tail, "choices": choices, **nothing, **more})

    def begin(self) -> Iterator[bytes]:
        if self.chat and self.tool is None:
            for index in range(len(self.asks)):
                delta = {"role": "assistant", "content": "", "refusal": None}
                choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
                yield self.chunk([choice])

    def piece(self, index: int, piece: Piece) -> Iterator[bytes]:
        """The end comes in a chunk of its own."""
        logprobs = self.logprobs(index, piece.steps)
        if piece.text or logprobs:
            tail = {"logprobs": logprobs, "finish_reason": None}
            said = {"delta": self.delta(index, piece)} if self.chat else {"text": piece.text}
            yield self.chunk([{"index": index, **said, **tail}])
        if piece.finish:
            said = {"delta": {}} if self.chat else {"text": ""}
            yield self.chunk(
                [{"index": index, **said, "logprobs": None, "finish_reason": self.finish(piece)}]
            )

    def finish(self, piece: Piece) -> str | None:
        """A function that was named ends with `stop`."""
        chosen = self.tool is not None and not isinstance(self.body.get("tool_choice"), dict)
        return "tool_calls" if chosen and piece.finish == "stop" else piece.finish

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        if self.tool is None:
            return {"content": piece.text}
        function: dict[str, Any] = {"arguments": piece.text}
        if index in self.said:
            return {"tool_calls": [{"index": 0, "function": function}]}
        call = {"index": 0, "id": f"call_{self.server.number()}", "type": "function"}
        calls = [{**call, "function": {"name": self.tool, **function}}]
        return {"role": "assistant", "content": None, "tool_calls": calls}

    def end(self) -> Iterator[bytes]:
        if self.option("include_usage"):
            yield self.chunk([], usage=self.counts())
        yield from super().end()

    def counts(self) -> dict[str, Any]:
        return self.usage(prompt_tokens_details={"cached_tokens": 0, "audio_tokens": 0})

    def whole(self, answers: Mapping[int, Sequence[Piece]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": [self.choice(index, said) for index, said in sorted(answers.items())],
            "usage": self.counts(),
            "service_tier": "default",
            "system_fingerprint": "fp_b1cb4f1ec8",
        }

    def choice(self, index: int, said: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in said)
        logprobs = self.logprobs(index, [step for piece in said for step in piece.steps])
        tail = {"logprobs": logprobs, "finish_reason": self.finish(said[-1])}
        if not self.chat:
            echo = detokenize(self.asks[index].prompt) if self.body.get("echo") else ""
            return {"text": echo + text, "index": index, **tail}
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self.tool is not None:
            call = {"id": f"call_{self.server.number()}", "type": "function"}
            function = {"name": self.tool, "arguments": text}
            message |= {"content": None, "tool_calls": [{**call, "function": function}]}
        message |= {"refusal": None, "annotations": []}
        return {"index": index, "message": message, **tail}


class PlainOpenAI(OpenAIFake):
    writer = PlainWriter
    routes: ClassVar[Mapping[str, str]] = {
        "GET /v1/models": "models",
        "POST /v1/chat/completions": "chat",
        "POST /v1/completions": "complete",
        "POST /v1/embeddings": "embed",
    }

    async def elsewhere(self, exchange: Exchange, path: str) -> None:
        if any(route.endswith(f" {path}") for route in self.routes):
            message = f"Not allowed to {exchange.method} on {path}"
            raise Refusal(
                405, f"{message} (HINT: Perhaps you meant to use a different HTTP method?)"
            )
        raise Refusal(404, f"Invalid URL ({exchange.method} {path})")

    def refuse(self, exchange: Exchange, refusal: Refusal) -> None:
        """``kind`` is the code."""
        error = {"message": refusal.message, "type": "invalid_request_error"}
        error |= {"param": refusal.param, "code": refusal.kind or None}
        reply(exchange, refusal.status, {"error": error})

    def check(self, body: dict[str, Any], chat: bool) -> None:
        name = body.get("model")
        if not name:
            raise Refusal(400, "you must provide a model parameter")
        if name != self.model:
            message = f"The model `{name}` does not exist or you do not have access to it."
            raise Refusal(404, message, "model_not_found")
        for field in sorted(body.keys() - _KNOWN[chat]):
            raise Refusal(400, f"Unrecognized request argument supplied: {field}")
        required = "messages" if chat else "prompt"
        if required not in body:
            message = f"Missing required parameter: '{required}'."
            raise Refusal(400, message, "missing_required_parameter", required)
        if chat and not body["messages"]:
            message = (
                "Invalid 'messages': empty array. Expected an array with minimum length 1, but"
            )
            raise Refusal(400, f"{message} got an empty array instead.", "empty_array", "messages")
        self.check_values(body)
        self.check_tools(body)

    def check_values(self, body: dict[str, Any]) -> None:
        for name in _INTEGERS:
            if body.get(name) is not None and not isinstance(body[name], int):
                message = (
                    f"Invalid type for '{name}': expected an integer, but got a string instead."
                )
                raise Refusal(400, message, "invalid_type", name)
        for name, least, most in _BOUNDS:
            value = body.get(name)
            if value is not None and not least <= value <= most:
                kind = "below_min" if value < least else "above_max"
                side, bound = ("minimum", least) if value < least else ("maximum", most)
                message = (
                    f"Invalid '{name}': decimal {kind.replace('_', ' ')} value. Expected a value"
                )
                code = f"decimal_{kind}_value"
                raise Refusal(400, f"{message} with {side} {bound}, but got {value}.", code, name)
        for name in ("max_tokens", "max_completion_tokens"):
            if body.get(name) is not None and body[name] < 1:
                message = (
                    f"Invalid '{name}': integer below minimum value. Expected a value >= 1, but"
                )
                code = "integer_below_min_value"
                raise Refusal(400, f"{message} got {body[name]} instead.", code, name)
        if body.get("top_logprobs") and not body.get("logprobs"):
            message = "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled."
            raise Refusal(400, message, param="top_logprobs")
        if body.get("stream_options") and not body.get("stream"):
            message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
            raise Refusal(400, message, param="stream_options")
        if "" in stops_of(body):
            raise Refusal(400, "Invalid 'stop': an empty string is not allowed.", param="stop")

    def check_tools(self, body: dict[str, Any]) -> None:
        if body.get("tools") == []:
            message = (
                "Invalid 'tools': empty array. Expected an array with minimum length 1, but got"
            )
            raise Refusal(400, f"{message} an empty array instead.", "empty_array", "tools")
        for place, tool in enumerate(body.get("tools") or ()):
            if not (tool.get("function") or {}).get("name"):
                param = f"tools[{place}].function.name"
                message = f"Missing required parameter: '{param}'."
                raise Refusal(400, message, "missing_required_parameter", param)
        choice = body.get("tool_choice")
        if choice not in (None, "none") and not body.get("tools"):
            message = "'tool_choice' is only allowed when 'tools' are specified."
            raise Refusal(400, message, param="tool_choice")
        if isinstance(choice, dict) and named_tool(body) is None:
            message = "Tool choice 'function' not found in 'tools' parameter."
            raise Refusal(400, message, param="tool_choice")

    def constraint(self, body: dict[str, Any]) -> str | None:
        format_ = body.get("response_format") or {}
        kind = format_.get("type", "text")
        if kind not in ("text", "json_object", "json_schema"):
            message = (
                f"Invalid value: '{kind}'. Supported values are: 'json_object', 'json_schema',"
            )
            raise Refusal(400, f"{message} and 'text'.", "invalid_value", "response_format.type")
        try:
            if kind == "json_schema":
                return by_schema((format_.get("json_schema") or {}).get("schema") or {})
        except Impossible as why:
            message = f"Invalid schema for response_format: {why}"
            raise Refusal(400, message, "invalid_json_schema", "response_format") from None
        return '{"one": "two"}' if kind == "json_object" else None

    def fits(self, prompt: Sequence[int], body: Mapping[str, Any]) -> None:
        wanted = body.get("max_completion_tokens") or body.get("max_tokens") or 0
        if wanted > self.context:
            message = (
                f"max_tokens is too large: {wanted}. This model supports at most {self.context}"
            )
            raise Refusal(400, f"{message} completion tokens.", "invalid_value", "max_tokens")
        if len(prompt) + wanted > self.context:
            message = f"This model's maximum context length is {self.context} tokens. However, your"
            message += (
                f" messages resulted in {len(prompt)} tokens. Please reduce the length of the"
            )
            code = "context_length_exceeded"
            raise Refusal(400, f"{message} messages.", code, "messages")

    async def models(self, exchange: Exchange) -> None:
        card = {"id": self.model, "object": "model", "created": 1_700_000_000, "owned_by": "system"}
        reply(exchange, 200, {"object": "list", "data": [card]})

    async def embed(self, exchange: Exchange) -> None:
        body = self.body(exchange)
        given = body.get("input")
        if not given:
            raise Refusal(400, "'$.input' is invalid.", param="input")
        given = given if isinstance(given, list) else [given]
        given = [given] if isinstance(given[0], int) else given
        texts = [text if isinstance(text, str) else detokenize(text) for text in given]
        count = sum(len(self.text_tokens(text, special=False)) for text in texts)
        data = [
            {"object": "embedding", "index": index, "embedding": vector(text)}
            for index, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count}
        reply(exchange, 200, {"object": "list", "data": data, "model": self.model, "usage": usage})
