"""vLLM 0.32's OpenAI server, started with a tool parser and per-request metrics.

Shapes, order of keys and sentences were recorded from the real server (0.32.0, CPU) and are
compared with it by ``tests/e2e/test_fakes_are_true.py``. Read in its wheel, as the recorded server
had no tool parser and no pooling model: calls (``entrypoints/openai/chat_completion``),
embeddings, ranking and scores (``entrypoints/pooling``), the 503 of a full queue.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from fake_servers.answer import Piece
from fake_servers.constraint import Impossible, by_grammar, by_regex, by_schema
from fake_servers.model import BOS, EOS, detokenize, piece_of
from fake_servers.openai_fields import mistakes, named_tool, stops_of
from fake_servers.openai_like import OpenAIFake, Writer
from fake_servers.serving import Refusal, event, likeness, reply, vector
from forebay.testing import Exchange

__all__ = ["Vllm", "VllmPooling"]

_FINGERPRINT = "vllm-0.32.0-6fba852c"
_METRICS = {"time_to_first_token_ms": 1.5, "generation_time_ms": 4.5, "queue_time_ms": 0.25}
_METRICS |= {"mean_itl_ms": 0.5, "tokens_per_second": 900.0}
_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


#: Field, what it may be, how that is said, and whether the refusal has the field as its `param`.
_BOUNDS: tuple[tuple[str, Callable[[Any], bool], str, bool], ...] = (
    ("n", lambda n: n >= 1, "at least 1", False),
    ("presence_penalty", lambda value: -2 <= value <= 2, "in [-2, 2]", False),
    ("frequency_penalty", lambda value: -2 <= value <= 2, "in [-2, 2]", False),
    ("repetition_penalty", lambda value: value > 0, "greater than zero", False),
    ("temperature", lambda value: value >= 0, "non-negative", True),
    ("top_p", lambda value: 0 < value <= 1, "in (0, 1]", True),
    ("top_k", lambda value: value >= -1, "0 (disable), or at least 1", False),
    ("min_p", lambda value: 0 <= value <= 1, "in [0, 1]", False),
)


class VllmWriter(Writer):
    def chunk(self, choices: list[Any], **more: Any) -> bytes:
        return event(
            {
                "id": self.id,
                "object": self.object,
                "created": self.created,
                "model": self.model,
                "choices": choices,
                **more,
            }
        )

    def begin(self) -> Iterator[bytes]:
        if self.chat:
            for index in range(len(self.asks)):
                delta = {"role": "assistant", "content": ""}
                choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
                yield self.chunk([choice], prompt_token_ids=None, prompt_text=None)

    def piece(self, index: int, piece: Piece) -> Iterator[bytes]:
        logprobs = self.logprobs(index, piece.steps)
        finish = self.finish(piece)
        more: dict[str, Any] = {}
        if finish and self.chat and not self.option("include_usage"):
            more = {"system_fingerprint": _FINGERPRINT}
        tail = {"logprobs": logprobs, "finish_reason": finish}
        if not self.chat:
            choice = {"index": index, "text": piece.text, **tail, "stop_reason": piece.matched}
            yield self.chunk([{**choice, "prompt_token_ids": None, "token_ids": None}])
            return
        if finish:
            tail["stop_reason"] = piece.matched
        delta = self.delta(index, piece)
        yield self.chunk([{"index": index, "delta": delta, **tail, "token_ids": None}], **more)

    def finish(self, piece: Piece) -> str | None:
        """A tool that was named ends with `stop`, one that was chosen with `tool_calls`."""
        chosen = self.tool is not None and not isinstance(self.body.get("tool_choice"), dict)
        return "tool_calls" if piece.finish == "stop" and chosen else piece.finish

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        if self.tool is None:
            return {"content": piece.text}
        call: dict[str, Any] = {"index": 0, "function": {"arguments": piece.text}}
        if index not in self.said:
            call |= {"id": f"chatcmpl-tool-{self.server.number()}", "type": "function"}
            call["function"] = {"name": self.tool, "arguments": piece.text}
        return {"tool_calls": [call]}

    def end(self) -> Iterator[bytes]:
        if self.option("include_usage"):
            cached = {"cached_tokens": 0}
            if self.chat:
                cached["created_cache_tokens"] = 0
            usage = self.usage(prompt_tokens_details=cached)
            more = {"metrics": _METRICS} if len(self.asks) == 1 else {}
            yield self.chunk([], usage=usage, system_fingerprint=_FINGERPRINT, **more)
        yield from super().end()

    def whole(self, answers: Mapping[int, Sequence[Piece]]) -> dict[str, Any]:
        details = {"cached_tokens": 0, "created_cache_tokens": 0 if self.chat else None}
        usage = self.usage(
            prompt_tokens_details={**details, "multimodal_tokens": None},
            completion_tokens_details=None,
        )
        metrics = {**_METRICS, "speculative_decoding": None} if len(self.asks) == 1 else None
        tail: dict[str, Any] = {"kv_transfer_params": None, "ec_transfer_params": None}
        if self.chat:
            prompt = dict.fromkeys(("prompt_logprobs", "prompt_token_ids", "prompt_text"))
            tail = {**prompt, **tail}
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": [self.choice(index, said) for index, said in sorted(answers.items())],
            "service_tier": None,
            "system_fingerprint": _FINGERPRINT,
            "usage": usage,
            **tail,
            "metrics": metrics,
        }

    def choice(self, index: int, said: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in said)
        steps = [step for piece in said for step in piece.steps]
        tail = {
            "logprobs": self.logprobs(index, steps),
            "finish_reason": self.finish(said[-1]),
            "stop_reason": said[-1].matched,
            "token_ids": None,
        }
        if not self.chat:
            if self.body.get("echo"):
                text = detokenize(self.asks[index].prompt) + text
            rest = dict.fromkeys(("prompt_logprobs", "prompt_token_ids", "routed_experts"))
            return {"index": index, "text": text, **tail, **rest}
        nothing = dict.fromkeys(("refusal", "annotations", "audio", "function_call"))
        message = {"role": "assistant", "content": text, **nothing}
        if self.tool is not None:
            function = {"name": self.tool, "arguments": text}
            call = {"id": f"chatcmpl-tool-{self.server.number()}", "type": "function"}
            message |= {"content": "", "tool_calls": [{**call, "function": function}]}
        message["reasoning"] = None
        return {"index": index, "message": message, **tail, "routed_experts": None}


class Vllm(OpenAIFake):
    writer = VllmWriter
    routes: ClassVar[Mapping[str, str]] = {
        "GET /health": "health",
        "GET /version": "version",
        "GET /v1/models": "models",
        "GET /metrics": "metrics",
        "GET /load": "load",
        "GET /openapi.json": "openapi",
        "POST /tokenize": "tokenize",
        "POST /detokenize": "detokenize",
        "POST /v1/chat/completions": "chat",
        "POST /v1/completions": "complete",
    }

    def refuse(self, exchange: Exchange, refusal: Refusal) -> None:
        kinds = {404: "NotFoundError", 500: "InternalServerError", 503: "ServiceUnavailableError"}
        kind = refusal.kind or kinds.get(refusal.status, "BadRequestError")
        error = {"message": refusal.message, "type": kind, "param": refusal.param}
        reply(exchange, refusal.status, {"error": {**error, "code": refusal.status}})

    # What it refuses.

    def check(self, body: dict[str, Any], chat: bool) -> None:
        self.check_shape(body, ("messages",) if chat else ())
        name = body.get("model")
        if name not in (None, self.model):
            message = f"The model `{name}` does not exist. Valid aliases: {self.model}."
            raise Refusal(404, message, param="model")
        if chat and not body["messages"]:
            message = "Cannot apply chat template to an empty conversation."
            raise Refusal(400, f"{message} Provide at least one message.")
        if not chat and body.get("prompt") in (None, "", []):
            if body.get("prompt") == []:
                raise Refusal(400, "You must pass at least one prompt")
            raise wrong("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
        if body.get("suffix"):
            message = "suffix is only supported for models with FIM completion rendering"
            raise Refusal(400, message, param="suffix")
        self.check_sampling(body)
        self.check_logprobs(body, chat)

    def check_shape(self, body: dict[str, Any], required: tuple[str, ...]) -> None:
        found = mistakes(body, required)
        kind = (body.get("response_format") or {}).get("type", "text")
        if kind not in ("text", "json_object", "json_schema", "structural_tag"):
            said = "Input should be 'text', 'json_object' or 'json_schema'"
            loc = ("body", "response_format", "type")
            found.append({"type": "literal_error", "loc": loc, "msg": said, "input": kind})
        if found:
            raise validation(found)
        if body.get("stream_options") and not body.get("stream"):
            raise wrong("Stream options can only be defined when `stream=True`.", "stream_options")
        if body.get("top_logprobs") and not body.get("logprobs"):
            raise wrong(
                "when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs"
            )
        tools, choice = body.get("tools"), body.get("tool_choice")
        if tools == []:
            message = "`tools` must not be an empty array. Either provide at least one tool or"
            raise wrong(f"{message} omit the field entirely.", "tools")
        if choice not in (None, "none") and not tools:
            raise wrong("When using `tool_choice`, `tools` must be set.", "tool_choice")
        if isinstance(choice, dict) and named_tool(body) is None:
            message = "The tool specified in `tool_choice` does not match any of the specified"
            raise wrong(f"{message} `tools`", "tool_choice")
        kinds = [kind for kind in _KINDS if (body.get("structured_outputs") or {}).get(kind)]
        if len(kinds) > 1:
            message = "You can only use one kind of constraints for structured outputs"
            raise wrong(f"{message} ('json', 'regex' or 'choice').", "structured_outputs")

    def check_sampling(self, body: dict[str, Any]) -> None:
        for name, right, said, listed in _BOUNDS:
            value = body.get(name)
            if value is not None and not right(value):
                value = value if isinstance(value, int) and name in ("n", "top_k") else float(value)
                message = f"{name} must be {said}, got {value}."
                raise wrong(message, name, value) if listed else Refusal(400, message)
        if "" in stops_of(body):
            raise Refusal(400, "stop cannot contain an empty string.")
        keys = [key for key in body.get("logit_bias") or () if not re.fullmatch(r"-?\d+", key)]
        if keys:
            message = "logit_bias contains key(s) that cannot be converted to integer token IDs:"
            raise wrong(f"{message} {keys}", "logit_bias", keys)
        for name in ("max_completion_tokens", "max_tokens"):
            if body.get(name) is not None and body[name] < 1:
                message = f"max_tokens must be at least 1, got {body[name]}."
                raise wrong(message, "max_tokens", body[name])

    def check_logprobs(self, body: dict[str, Any], chat: bool) -> None:
        asked = body.get("top_logprobs") if chat else body.get("logprobs")
        if asked is not None and asked > 20:
            message = f"Requested sample logprobs of {asked}, which is greater than max allowed: 20"
            raise wrong(message, "logprobs", asked)

    def fits(self, prompt: Sequence[int], body: Mapping[str, Any]) -> None:
        context, count = self.context, len(prompt)
        limit = f"This model's maximum context length is {context} tokens. However,"
        wanted = body.get("max_completion_tokens") or body.get("max_tokens") or 0
        if wanted > context:
            message = f"max_tokens={wanted} cannot be greater than max_model_len={context}."
            raise wrong(f"{message} Please request fewer output tokens.", "max_tokens", wanted)
        if count > context:
            least = context + 1
            message = f"{limit} your prompt contains at least {least} input tokens, which exceeds"
            message += " this limit even without any output tokens. Please reduce the length of the"
            raise wrong(f"{message} input prompt.", "input_tokens", least)
        if count + wanted > context:
            message = f"{limit} you requested {wanted} output tokens and your prompt contains"
            message += f" {count} input tokens, for a total of {count + wanted} tokens. Please"
            message += " reduce the length of the input prompt or the number of requested output"
            raise wrong(f"{message} tokens.", "input_tokens", count)

    def constraint(self, body: dict[str, Any]) -> str | None:
        format_ = body.get("response_format") or {}
        outputs = body.get("structured_outputs") or {}
        try:
            if format_.get("type") == "json_schema":
                return by_schema((format_.get("json_schema") or {}).get("schema") or {})
            if format_.get("type") == "json_object" or outputs.get("json_object"):
                return '{"one": "two"}'
            if outputs.get("json"):
                return by_schema(outputs["json"])
            if outputs.get("regex"):
                return by_regex(outputs["regex"])
            if outputs.get("grammar"):
                return by_grammar(outputs["grammar"])
        except Impossible as why:
            raise Refusal(400, f"Grammar error: {why}") from None
        choice = outputs.get("choice")
        return str(choice[0]) if choice else None

    # What it tells.

    async def health(self, exchange: Exchange) -> None:
        reply(exchange, 200)

    async def version(self, exchange: Exchange) -> None:
        reply(exchange, 200, {"version": "0.32.0"})

    async def load(self, exchange: Exchange) -> None:
        reply(exchange, 200, {"server_load": 0})

    async def models(self, exchange: Exchange) -> None:
        now = self.now()
        permission = {
            "id": f"modelperm-{self.number()}",
            "object": "model_permission",
            "created": now,
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": False,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
        card = {"id": self.model, "object": "model", "created": now, "owned_by": "vllm"}
        card |= {"root": f"/models/{self.model}", "parent": None, "max_model_len": self.context}
        reply(exchange, 200, {"object": "list", "data": [{**card, "permission": [permission]}]})

    async def metrics(self, exchange: Exchange) -> None:
        """The recorded page, with the figures of now."""
        page = Path(__file__).parents[1].joinpath("vllm_metrics.txt").read_text()
        for name, value in (
            ("num_requests_running", self.running),
            ("num_requests_waiting", self.waiting),
            ("kv_cache_usage_perc", self.running / 100),
        ):
            page = re.sub(rf"(?m)^(vllm:{name}\{{.*\}}) .*$", rf"\1 {float(value)}", page)
        reply(exchange, 200, page.encode(), {"content-type": "text/plain; version=0.0.4"})

    async def openapi(self, exchange: Exchange) -> None:
        """The routes that it has, and the fields that it knows."""
        posts = [route.split()[1] for route in self.routes if route.startswith("POST")]
        fields = json.loads(Path(__file__).parents[1].joinpath("vllm_fields.json").read_text())
        schemas = {
            name: {"type": "object", "properties": {field: {} for field in names}}
            for name, names in fields.items()
        }
        paths: dict[str, Any] = {path: {"post": {}} for path in posts}
        content = {"openapi": "3.1.0", "paths": paths, "components": {"schemas": schemas}}
        reply(exchange, 200, content)

    async def tokenize(self, exchange: Exchange) -> None:
        body = self.body(exchange)
        if "messages" in body:
            tokens = list(self.chat_prompt(body["messages"]))
        elif "prompt" in body:
            tokens = self.text_tokens(body["prompt"], body.get("add_special_tokens", True))
        else:
            raise validation(mistakes(body, ("prompt",)))
        texts = None
        if body.get("return_token_strs"):
            named = {BOS: "<bos>", EOS: "<eos>"}
            texts = [named.get(one) or piece_of(one).decode(errors="replace") for one in tokens]
            texts = [text.replace(" ", "▁") for text in texts]
        counts = {"count": len(tokens), "max_model_len": self.context}
        reply(exchange, 200, {**counts, "tokens": tokens, "token_strs": texts})

    async def detokenize(self, exchange: Exchange) -> None:
        body = self.body(exchange)
        if "tokens" not in body:
            raise validation(mistakes(body, ("tokens",)))
        begin = "<bos>" if body["tokens"][:1] == [BOS] else ""
        reply(exchange, 200, {"prompt": begin + detokenize(body["tokens"])})


class VllmPooling(Vllm):
    """With a model that embeds; it ranks and scores by the cosine of embeddings."""

    routes: ClassVar[Mapping[str, str]] = {
        **{route: to for route, to in Vllm.routes.items() if not route.endswith("completions")},
        "POST /v1/embeddings": "embed",
        "POST /v1/rerank": "rerank",
        "POST /score": "score",
    }

    def counted(self, texts: Sequence[str]) -> dict[str, Any]:
        count = sum(len(self.text_tokens(text, special=True)) for text in texts)
        counts = {"prompt_tokens": count, "total_tokens": count, "completion_tokens": 0}
        return {**counts, "prompt_tokens_details": None}

    async def embed(self, exchange: Exchange) -> None:
        body = self.body(exchange)
        if "input" not in body:
            raise validation(mistakes(body, ("input",)))
        given = body["input"] if isinstance(body["input"], list) else [body["input"]]
        if given and isinstance(given[0], int):
            given = [given]
        texts = [text if isinstance(text, str) else detokenize(text) for text in given]
        if body.get("dimensions") is not None:
            message = f'Model "{self.model}" does not support matryoshka representation,'
            raise Refusal(400, f"{message} changing output dimensions will lead to poor results.")
        data = [
            {"index": index, "object": "embedding", "embedding": vector(text)}
            for index, text in enumerate(texts)
        ]
        head = {"id": f"embd-{self.number()}", "object": "list", "created": self.now()}
        reply(
            exchange, 200, {**head, "model": self.model, "data": data, "usage": self.counted(texts)}
        )

    async def rerank(self, exchange: Exchange) -> None:
        body = self.body(exchange)
        found = mistakes(body, ("query", "documents"))
        if found:
            raise validation(found)
        documents = body["documents"]
        results = [
            {
                "index": index,
                "document": {"text": text, "multi_modal": None},
                "relevance_score": likeness(body["query"], text),
            }
            for index, text in enumerate(documents)
        ]
        results.sort(key=lambda result: -result["relevance_score"])
        count = self.counted([body["query"], *documents])
        usage = {name: count[name] for name in ("prompt_tokens", "total_tokens")}
        top = body.get("top_n") or len(documents)
        head = {"id": f"rerank-{self.number()}", "model": self.model, "usage": usage}
        reply(exchange, 200, {**head, "results": results[:top]})

    async def score(self, exchange: Exchange) -> None:
        body = self.body(exchange)
        first, second = (
            [body[name]] if isinstance(body[name], str) else body[name]
            for name in ("text_1", "text_2")
        )
        first = first * len(second) if len(first) == 1 else first
        data = [
            {"index": index, "object": "score", "score": likeness(*pair)}
            for index, pair in enumerate(zip(first, second, strict=True))
        ]
        head = {"id": f"score-{self.number()}", "object": "list", "created": self.now()}
        usage = self.counted([*first, *second])
        reply(exchange, 200, {**head, "model": self.model, "data": data, "usage": usage})


def wrong(message: str, param: str, value: object = None) -> Refusal:
    shown = f"parameter={param}" + (f", value={value}" if value is not None else "")
    return Refusal(400, f"{message} ({shown})", param=param)


def validation(found: Sequence[Mapping[str, Any]]) -> Refusal:
    """Mistakes as its handler of pydantic's errors lists them."""
    lines, places = [], []
    for mistake in found:
        places.append(".".join(map(str, mistake["loc"])))
        value = mistake["input"]
        shown = f"<dict of {len(value)} items>" if isinstance(value, dict) else value
        lines.append(f"  { {**mistake, 'loc': places[-1], 'input': shown} }")
    plural = "s" if len(found) > 1 else ""
    message = "\n".join([f"{len(found)} validation error{plural}:", *lines])
    return Refusal(400, message, "Bad Request", places[0])
