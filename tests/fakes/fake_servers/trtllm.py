"""``trtllm-serve`` of TensorRT-LLM, PyTorch backend, with a guided decoding backend and metrics.

Read in its state of 2026 (NVIDIA/TensorRT-LLM, commits 0076e939 and 01bf1923 among others):
``serve/openai_protocol.py`` (fields, of which unknown ones are refused),
``serve/postprocess_handlers.py`` (shapes, the blank at the end of the first event),
``serve/openai_server.py`` (errors, routes). Nobody drove the real one here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from fake_servers.answer import Piece
from fake_servers.constraint import Impossible, by_grammar, by_regex, by_schema
from fake_servers.model import detokenize
from fake_servers.openai_fields import mistakes, named_tool
from fake_servers.openai_like import OpenAIFake, Writer, token_texts
from fake_servers.serving import Refusal, event, reply
from forebay.testing import Exchange

__all__ = ["TrtLlm"]

# fmt: off
_BOTH = frozenset(
    [
        "add_special_tokens", "best_of", "conversation_params", "disaggregated_params",
        "early_stopping", "echo", "frequency_penalty", "ignore_eos",
        "include_stop_str_in_output", "length_penalty", "logit_bias", "logprobs",
        "lora_request", "max_tokens", "min_p", "min_tokens", "model", "n",
        "presence_penalty", "priority", "prompt_ignore_length", "repetition_penalty",
        "response_format", "seed", "skip_special_tokens", "spaces_between_special_tokens",
        "stop", "stop_token_ids", "stream", "stream_options", "temperature",
        "thinking_token_budget", "top_k", "top_p", "top_p_min", "truncate_prompt_tokens",
        "use_beam_search", "user",
    ]
)
_COMPLETION = _BOTH | {"detokenize", "prompt", "return_context_logits", "suffix"}
_CHAT = _BOTH | frozenset(
    [
        "add_generation_prompt", "agent_hierarchy", "cache_salt", "chat_template",
        "chat_template_kwargs", "documents", "max_completion_tokens", "messages",
        "mm_processor_kwargs", "prompt_token_ids", "reasoning_effort", "tool_choice",
        "tools", "top_logprobs",
    ]
)
# fmt: on


class TrtLlmWriter(Writer):
    def texts(self, index: int, steps: Sequence[Any]) -> list[str]:
        return token_texts(steps)

    def chunk(self, choices: list[Any], blank: bytes = b"", **more: Any) -> bytes:
        content = {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }
        return event(content)[:-2] + blank + b"\n\n"

    def begin(self) -> Iterator[bytes]:
        """Nulls are left out, and a blank stands before the line's end."""
        if self.chat:
            for index in range(len(self.asks)):
                yield self.chunk([{"index": index, "delta": {"role": "assistant"}}], b" ")

    def piece(self, index: int, piece: Piece) -> Iterator[bytes]:
        """In chat, what was not set is left out; in completions, all is there."""
        logprobs = self.logprobs(index, piece.steps)
        speed = {"avg_decoded_tokens_per_iter": 1.0}
        if not self.chat:
            tail = {"token_ids": None, "logprobs": logprobs, "finish_reason": piece.finish}
            choice = {"index": index, "text": piece.text, **tail, "stop_reason": piece.matched}
            yield self.chunk([{**choice, **speed}], usage=None)
            return
        choice = {"index": index, "delta": self.delta(index, piece)}
        if logprobs is not None:
            choice["logprobs"] = logprobs
        if piece.finish:
            choice["finish_reason"] = piece.finish
        yield self.chunk([{**choice, "stop_reason": piece.matched, **speed}])

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        """A named tool's pieces have no id, and the choice's index."""
        if self.tool is None:
            return {"content": piece.text, "reasoning_content": "", "tool_calls": None}
        function = {"name": self.tool, "arguments": piece.text}
        return {"tool_calls": [{"function": function, "index": index}]}

    def end(self) -> Iterator[bytes]:
        if self.body.get("stream_options") and self.usage_wanted():
            yield self.chunk([], usage=self.usage(prompt_tokens_details={"cached_tokens": 0}))
        yield from super().end()

    def usage_wanted(self) -> bool:
        return (self.body.get("stream_options") or {}).get("include_usage", True) is not False

    def whole(self, answers: Mapping[int, Sequence[Piece]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": [self.choice(index, said) for index, said in sorted(answers.items())],
            "usage": self.usage(prompt_tokens_details={"cached_tokens": 0}),
            "prompt_token_ids": None,
        }

    def choice(self, index: int, said: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in said)
        steps = [step for piece in said for step in piece.steps]
        tail = {
            "logprobs": self.logprobs(index, steps),
            "finish_reason": said[-1].finish,
            "stop_reason": said[-1].matched,
            "disaggregated_params": None,
            "avg_decoded_tokens_per_iter": 1.0,
        }
        if not self.chat:
            echo = detokenize(self.asks[index].prompt) if self.body.get("echo") else ""
            return {"index": index, "text": echo + text, "token_ids": None, **tail}
        message: dict[str, Any] = {"role": "assistant", "content": text}
        message |= {"reasoning_content": "", "reasoning": None, "tool_calls": []}
        if self.tool is not None:
            function = {"name": self.tool, "arguments": text}
            call = {"id": f"chatcmpl-tool-{self.server.number()}{self.server.number()}"}
            message |= {
                "content": "",
                "tool_calls": [{**call, "type": "function", "function": function}],
            }
        return {"index": index, "message": message, **tail}


class TrtLlm(OpenAIFake):
    writer = TrtLlmWriter
    routes: ClassVar[Mapping[str, str]] = {
        "GET /health": "health",
        "GET /version": "version",
        "GET /v1/models": "models",
        "GET /metrics": "iterations",
        "GET /prometheus/metrics": "metrics",
        "POST /v1/chat/completions": "chat",
        "POST /v1/completions": "complete",
    }

    def refuse(self, exchange: Exchange, refusal: Refusal) -> None:
        """A string for a body of the wrong form; else flat."""
        if refusal.kind == "form":
            reply(exchange, 400, {"error": refusal.message})
            return
        said = {"object": "error", "message": refusal.message, "type": "BadRequestError"}
        reply(exchange, refusal.status, {**said, "param": None, "code": refusal.status})

    def check(self, body: dict[str, Any], chat: bool) -> None:
        required = ("messages", "model") if chat else ("model", "prompt")
        found = mistakes(body, required, _CHAT if chat else _COMPLETION)
        if body.get("stream_options") and not body.get("stream"):
            said = "Value error, Stream options can only be defined when stream is true."
            found.append(value_error(said, body))
        if body.get("suffix"):
            found.append(value_error("Value error, suffix is not supported", body))
        if body.get("top_logprobs") and not body.get("logprobs"):
            said = "Value error, when using `top_logprobs`, `logprobs` must be set to true."
            found.append(value_error(said, body))
        if body.get("tool_choice") not in (None, "none") and not body.get("tools"):
            said = "Value error, When using `tool_choice`, `tools` must be set."
            found.append(value_error(said, body))
        kinds = ("text", "json", "json_schema", "json_object", "regex", "ebnf", "structural_tag")
        kind = (body.get("response_format") or {}).get("type", "text")
        if kind not in kinds:
            loc = ("body", "response_format", "type")
            found.append({"type": "literal_error", "loc": loc, "input": kind})
        if found:
            raise Refusal(400, str(found), "form")
        if body.get("tool_choice") == "required":
            raise Refusal(400, 'tool_choice="required" is not supported.')
        if isinstance(body.get("tool_choice"), dict) and named_tool(body) is None:
            raise Refusal(400, "The named tool is not among the tools.")
        self.check_sampling(body)

    def check_sampling(self, body: dict[str, Any]) -> None:
        """``SamplingParams._validate``, and of the executor what it checks itself."""
        temperature, top_p, n = body.get("temperature"), body.get("top_p"), body.get("n")
        if temperature is not None and temperature < 0:
            raise Refusal(400, f"require temperature >= 0, got temperature={temperature}")
        if top_p is not None and not 0 <= top_p <= 1:
            raise Refusal(400, f"require 0 <= top_p <= 1, got top_p={top_p}")
        if body.get("top_k") is not None and body["top_k"] < 0:
            raise Refusal(400, f"require top_k >= 0, got top_k={body['top_k']}")
        if n is not None and n < 1:
            raise Refusal(400, f"best_of ({n}) cannot be less than 1")
        for key in body.get("logit_bias") or ():
            if not key.lstrip("-").isdecimal():
                message = f"Invalid logit_bias key '{key}': must be a valid integer token ID"
                raise Refusal(400, message)
        wanted = body.get("max_completion_tokens") or body.get("max_tokens")
        if body.get("max_tokens") == 0 or (wanted is not None and wanted < 1):
            raise Refusal(400, "max_tokens must be greater than 0")

    def constraint(self, body: dict[str, Any]) -> str | None:
        format_ = body.get("response_format") or {}
        kind = format_.get("type", "text")
        try:
            if kind == "json_object":
                return '{"one": "two"}'
            if kind == "regex":
                return by_regex(format_["regex"])
            if kind == "ebnf":
                return by_grammar(format_["ebnf"])
            if kind == "json":
                return by_schema(format_["schema"])
            if kind == "json_schema":
                schema = format_["json_schema"]
                return by_schema(schema.get("schema", schema))
        except Impossible as why:
            raise Refusal(400, f"Grammar error: {why}") from None
        except KeyError as missing:
            said = f"response_format.{missing.args[0]} is required for response_format.type =="
            raise Refusal(400, f"{said} {kind!r}, but got None.") from None
        return None

    def called(self, body: dict[str, Any]) -> str | None:
        """Its default choice is `none`, and it has no parser for calls of the model's own."""
        return super().called(body) if isinstance(body.get("tool_choice"), dict) else None

    def fits(self, prompt: Sequence[int], body: Mapping[str, Any]) -> None:
        """The executor's own check; its sentence names the default of `max_seq_len`."""
        count = len(prompt)
        wanted = body.get("max_completion_tokens") or body.get("max_tokens") or 0
        if count + wanted > self.context:
            message = f"The sum of prompt length ({count}.0), query length (0) and max_tokens"
            raise Refusal(
                400, f"{message} ({wanted}) should not exceed max_seq_len ({self.context})"
            )

    def default_tokens(self, chat: bool, prompt_tokens: int) -> int:
        """Both routes go on to the end of the context."""
        return self.context - prompt_tokens

    async def health(self, exchange: Exchange) -> None:
        reply(exchange, 200)

    async def version(self, exchange: Exchange) -> None:
        reply(exchange, 200, {"version": "1.3.0"})

    async def models(self, exchange: Exchange) -> None:
        card = {"id": self.model, "object": "model", "created": self.now()}
        reply(exchange, 200, {"object": "list", "data": [{**card, "owned_by": "tensorrt_llm"}]})

    async def iterations(self, exchange: Exchange) -> None:
        """Reading takes them away."""
        served, self.served = self.served, 0
        active = {"numActiveRequests": self.running, "numQueuedRequests": self.waiting}
        reply(exchange, 200, [{"iter": number, **active} for number in range(served)])

    async def metrics(self, exchange: Exchange) -> None:
        labels = f'{{model_name="{self.model}"}}'
        page = (
            f"trtllm_num_requests_running{labels} {float(self.running)}\n"
            f"trtllm_num_requests_waiting{labels} {float(self.waiting)}\n"
            f"trtllm_kv_cache_utilization{labels} {self.running / 100}\n"
        )
        reply(exchange, 200, page.encode(), {"content-type": "text/plain; version=0.0.4"})


def value_error(said: str, body: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "value_error", "loc": ("body",), "msg": said, "input": dict(body)}
