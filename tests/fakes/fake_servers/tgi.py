"""text-generation-inference 3.3.7: its native routes and those under ``/v1``.

Read at huggingface/text-generation-inference: ``router/src/validation.rs`` (bounds, and their
sentences), ``router/src/server.rs`` (routes, headers, statuses), ``router/src/lib.rs`` (shapes),
``router/src/chat.rs`` and ``router/src/infer/tool_grammar.rs`` (calls). axum writes ``data:``
without a blank. Of several prompts for ``/v1/completions`` only the first is played. Nobody drove
the real one here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from fake_servers.answer import Piece, pieces
from fake_servers.constraint import Impossible, by_regex, by_schema
from fake_servers.model import BOS, EOS, Ask, Step, piece_of, tokenize
from fake_servers.openai_fields import named_tool, stops_of
from fake_servers.serving import FakeServer, Refusal, calls_named, compact, reply
from forebay.testing import Exchange

__all__ = ["Tgi"]

_STATUSES = {"generation": 424, "overloaded": 429, "validation": 422, "tool_error": 422}
_FINISHES = {"length": "length", "stop": "eos_token"}
_FINGERPRINT = "3.3.7-native"


def event(content: object) -> bytes:
    return b"data:" + compact(content) + b"\n\n"


def token_of(step: Step | tuple[int, float]) -> dict[str, Any]:
    number, logprob = step[0], step[1]
    special = number in (BOS, EOS)
    text = {EOS: "<eos>", BOS: "<bos>"}.get(number) or piece_of(number).decode(errors="replace")
    return {"id": number, "text": text, "logprob": logprob, "special": special}


class Said:
    """One answer as it grows: the tokens' visible texts, and why it ended.

    A character of several tokens stands with the last of them; the others have no text.
    """

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.text = ""
        self.count = 0
        self.finish: str | None = None

    def take(self, piece: Piece) -> dict[str, Any]:
        """The token that this piece is."""
        self.count += 1
        self.text += piece.text
        if piece.finish:
            stopped = piece.matched is not None
            self.finish = "stop_sequence" if stopped else _FINISHES[piece.finish]
        (step,) = piece.steps
        token = token_of(step)
        return token if token["special"] else {**token, "text": piece.text}

    def details(self) -> dict[str, Any]:
        return {
            "finish_reason": self.finish,
            "generated_tokens": self.count,
            "seed": self.ask.seed,
        }


class Tgi(FakeServer):
    most_stops = 4
    most_concurrent = 128
    routes: ClassVar[Mapping[str, str]] = {
        "GET /health": "health",
        "GET /info": "info",
        "GET /metrics": "metrics",
        "GET /v1/models": "models",
        "POST /generate": "generate",
        "POST /generate_stream": "generate_stream",
        "POST /v1/chat/completions": "chat",
        "POST /v1/completions": "complete",
        "POST /tokenize": "tokenize",
        "POST /chat_tokenize": "chat_tokenize",
    }

    async def elsewhere(self, exchange: Exchange, path: str) -> None:
        """axum's own: no body."""
        served = any(route.endswith(f" {path}") for route in self.routes)
        exchange.answer(405 if served else 404)

    def refuse(self, exchange: Exchange, refusal: Refusal) -> None:
        """What is no request of the right form is axum's to refuse, as plain text."""
        if not refusal.kind:
            kind = {"content-type": "text/plain; charset=utf-8"}
            exchange.answer(refusal.status, refusal.message.encode(), kind)
            return
        said = {"error": refusal.message, "error_type": refusal.kind}
        reply(exchange, refusal.status, said)

    def body(self, exchange: Exchange) -> dict[str, Any]:
        try:
            content = exchange.json
        except ValueError as wrong:
            message = f"Failed to parse the request body as JSON: {wrong}"
            raise Refusal(400, message) from None
        return content if isinstance(content, dict) else {}

    def typed(self, body: Mapping[str, Any], kinds: Mapping[str, type], required: str) -> None:
        """serde's view of a body; ``float`` takes integers, too."""
        for name, kind in kinds.items():
            value = body.get(name)
            right = (int, float) if kind is float else kind
            if value is not None and (
                not isinstance(value, right)
                or (kind is int and isinstance(value, int) and value < 0)
            ):
                shown = f"{_serde(value)}, expected {_RUST[kind]}"
                raise malformed(f"{name}: invalid {shown} at line 1 column 1")
        if required not in body:
            raise malformed(f"missing field `{required}` at line 1 column {len(compact(body))}")

    # Native routes.

    def native_ask(self, body: Mapping[str, Any]) -> Ask:
        """
        :raises Refusal: a parameter is out of its bounds.
        """
        self.typed(body, {"inputs": str, "parameters": dict}, "inputs")
        said: Mapping[str, Any] = body.get("parameters") or {"do_sample": True}
        self.typed({**said, "_": 0}, _PARAMETERS, "_")
        return self.valid(body["inputs"], said)

    def valid(self, inputs: str, said: Mapping[str, Any]) -> Ask:
        for name, right, words in _BOUNDS:
            if said.get(name) is not None and not right(said[name]):
                raise invalid(f"`{name}` must be {words}")
        stop = said.get("stop") or ()
        if len(stop) > self.most_stops:
            most = f"up to {self.most_stops} stop sequences"
            raise invalid(f"`stop` supports {most}. Given: {len(stop)}")
        if (said.get("top_n_tokens") or 0) > 5:
            raise invalid(f"`top_n_tokens` must be >= 0 and <= 5. Given: {said['top_n_tokens']}")
        if not inputs:
            raise invalid("`inputs` cannot be empty")
        prompt = (BOS, *tokenize(inputs))
        given = said.get("max_new_tokens")
        wanted = self.context - len(prompt) if given is None else given
        if len(prompt) + max(wanted, 0) > self.context:
            message = f"`inputs` tokens + `max_new_tokens` must be <= {self.context}. Given:"
            message += f" {len(prompt)} `inputs` tokens and {wanted} `max_new_tokens`"
            raise invalid(message)
        if len(prompt) > self.context - 1:
            most = self.context - 1
            raise invalid(f"`inputs` must have less than {most} tokens. Given: {len(prompt)}")
        sampling = ("temperature", "top_k", "top_p", "typical_p")
        sampled = said.get("do_sample") or any(said.get(name) for name in sampling)
        return Ask(
            prompt=prompt,
            max_tokens=wanted,
            temperature=(said.get("temperature") or 1.0) if sampled else 0,
            top_p=said.get("top_p") or 1.0,
            top_k=said.get("top_k") or 0,
            frequency_penalty=said.get("frequency_penalty") or 0.0,
            repetition_penalty=said.get("repetition_penalty") or 1.0,
            seed=said.get("seed"),
            stop=tuple(stop),
            forced=self.grammar(said.get("grammar")),
        )

    def grammar(self, grammar: Any) -> str | None:
        if grammar is None:
            return None
        kind, value = grammar.get("type"), grammar.get("value")
        try:
            if kind == "regex":
                return by_regex(value)
            if kind == "json_schema":
                value = value.get("schema", value) if isinstance(value, dict) else value
            elif kind not in ("json", "json_object"):
                raise malformed(f"unknown variant `{kind}`, expected one of `json`, `regex`")
            if not isinstance(value, dict):
                raise malformed("missing field `value`")
            if "properties" not in value:
                raise Impossible("Grammar must have a 'properties' field")
            return by_schema(value)
        except Impossible as why:
            raise invalid(f"grammar is not valid: {why}") from None

    async def generate(self, exchange: Exchange) -> None:
        body = self.body(exchange)
        ask = self.native_ask(body)
        said, tokens = Said(ask), []
        async with self.permit():
            for place, piece in enumerate(pieces(ask, "ends")):
                await self.tick(place)
                tokens.append(said.take(piece))
        parameters = body.get("parameters") or {}
        content: dict[str, Any] = {"generated_text": said.text}
        if parameters.get("details"):
            content["details"] = {**said.details(), "prefill": [], "tokens": tokens}
            if parameters.get("top_n_tokens"):
                top = parameters["top_n_tokens"]
                steps = [s for p in pieces(ask, "ends") for s in p.steps]
                content["details"]["top_tokens"] = [
                    [token_of(pair) for pair in step.top[:top]] for step in steps
                ]
        reply(exchange, 200, content, headers_of(said))

    async def generate_stream(self, exchange: Exchange) -> None:
        """The status is 200, whatever comes."""
        body = self.body(exchange)
        try:
            ask = self.native_ask(body)
        except Refusal as refusal:
            if not refusal.kind:
                raise
            exchange.begin()
            exchange.send(event({"error": refusal.message, "error_type": refusal.kind}))
            return
        parameters = body.get("parameters") or {}
        top, said = parameters.get("top_n_tokens") or 0, Said(ask)
        async with self.permit():
            for place, piece in enumerate(pieces(ask, "ends")):
                await self.tick(place)
                if place == 0:
                    exchange.begin()
                content: dict[str, Any] = {"index": said.count + 1, "token": said.take(piece)}
                if top:
                    content["top_tokens"] = [token_of(pair) for pair in piece.steps[0].top[:top]]
                over = piece.finish is not None
                content["generated_text"] = said.text if over else None
                details = {**said.details(), "input_length": len(ask.prompt)}
                content["details"] = details if over and parameters.get("details") else None
                exchange.send(event(content))

    def permit(self) -> Any:
        """
        :raises Refusal: all are taken.
        """
        if self.running + self.waiting >= self.most_concurrent:
            raise Refusal(429, "Model is overloaded", "overloaded")
        return self.slot()

    # OpenAI's routes.

    def openai_ask(self, body: Mapping[str, Any], chat: bool) -> tuple[Ask, str | None]:
        """What is asked, and the tool that is called."""
        kinds = {"messages": list, "stop": list, "logit_bias": list} if chat else {"stop": list}
        self.typed(body, {**_OPENAI, **kinds}, "messages" if chat else "prompt")
        presence = body.get("presence_penalty")
        temperature = body.get("temperature")
        said = {
            "do_sample": temperature != 0,
            "temperature": temperature or None,
            "top_p": body.get("top_p"),
            "frequency_penalty": body.get("frequency_penalty"),
            "repetition_penalty": None if presence is None else presence + 2.0,
            "max_new_tokens": body.get("max_tokens") or body.get("max_completion_tokens"),
            "seed": body.get("seed"),
            "stop": list(stops_of(body)),
            "top_n_tokens": body.get("top_logprobs") if chat else None,
            "grammar": body.get("response_format"),
        }
        if not chat:
            prompts = [body["prompt"]] if isinstance(body["prompt"], str) else body["prompt"]
            if not 1 <= len(prompts) <= 4:
                message = "Number of prompts exceeds the maximum allowed batch size of 4"
                raise Refusal(422, message, "validation")
            return self.valid(str(prompts[0]), said), None
        tool, arguments = self.call(body)
        if not body["messages"]:
            raise Refusal(422, "Template error: no messages", "template_error")
        if tool and said["grammar"]:
            raise invalid("Grammar and tools are mutually exclusive")
        ask = self.valid("x", {**said, "max_new_tokens": 1})
        prompt = self.chat_prompt(body["messages"])
        wanted = said["max_new_tokens"]
        rest = self.context - len(prompt)
        if (wanted or 1) > rest:
            message = f"`inputs` tokens + `max_new_tokens` must be <= {self.context}. Given:"
            message += f" {len(prompt)} `inputs` tokens and {wanted or 0} `max_new_tokens`"
            raise invalid(message)
        forced = arguments if tool else ask.forced
        return replace(ask, prompt=prompt, max_tokens=wanted or rest, forced=forced), tool

    def call(self, body: Mapping[str, Any]) -> tuple[str | None, str]:
        tools, choice = body.get("tools") or [], body.get("tool_choice")
        if not tools or choice == "none":
            return None, ""
        for tool in tools:
            if not (tool.get("function") or {}).get("name"):
                raise malformed("tools[0].function: missing field `name`")
        function = named_tool(dict(body))
        if isinstance(choice, dict) and function is None:
            raise Refusal(422, f"Tool error: Tool with name {choice} not found", "tool_error")
        if function is None:
            named = [tool["function"] for tool in tools]
            called = [one for one in named if calls_named(body["messages"], one["name"])]
            if not called:
                return None, ""
            function = called[0]
        return function["name"], by_schema(function.get("parameters") or {"type": "object"})

    async def chat(self, exchange: Exchange) -> None:
        await self.openai(exchange, chat=True)

    async def complete(self, exchange: Exchange) -> None:
        await self.openai(exchange, chat=False)

    async def openai(self, exchange: Exchange, chat: bool) -> None:
        body = self.body(exchange)
        streams = bool(body.get("stream"))
        try:
            ask, tool = self.openai_ask(body, chat)
        except Refusal as refusal:
            if not (streams and refusal.kind):
                raise
            exchange.begin()
            error = {"message": refusal.message, "http_status_code": 422}
            exchange.send(event({"error": error}) + event_done())
            return
        said, taken = Said(ask), []
        async with self.permit():
            for place, piece in enumerate(pieces(ask, "ends")):
                await self.tick(place)
                if streams and place == 0:
                    exchange.begin()
                token = said.take(piece)
                taken.append((token, piece))
                if streams:
                    for chunk in self.chunks(body, chat, tool, said, token, piece):
                        exchange.send(event(chunk))
        if streams:
            exchange.send(event_done())
        else:
            reply(exchange, 200, self.whole(body, chat, tool, said, taken), headers_of(said))

    def head(self, body: Mapping[str, Any], kind: str) -> dict[str, Any]:
        """An empty id, and the clock's time."""
        head = {"object": kind, "id": "", "created": self.now()}
        return {**head, "model": body.get("model", ""), "system_fingerprint": _FINGERPRINT}

    def usage(self, said: Said) -> dict[str, int]:
        prompt, count = len(said.ask.prompt), said.count
        counts = {"prompt_tokens": prompt, "completion_tokens": count}
        return {**counts, "total_tokens": prompt + count}

    def chunks(
        self,
        body: Mapping[str, Any],
        chat: bool,
        tool: str | None,
        said: Said,
        token: Mapping[str, Any],
        piece: Piece,
    ) -> Iterator[dict[str, Any]]:
        text = "" if token["special"] else str(token["text"])
        usage = self.usage(said)
        if not chat:
            choice = {"index": 0, "text": text, "logprobs": None}
            head = {**self.head(body, "text_completion"), "choices": []}
            over = piece.finish is not None
            head["choices"] = [{**choice, "finish_reason": said.finish if over else ""}]
            yield {**head, "usage": usage} if over else head
            return
        finish = _openai_finish(said.finish) if piece.finish else None
        delta: dict[str, Any] = {"role": "assistant", "content": text}
        if tool is not None:
            first = said.count == 1
            function = {"name": tool if first else None, "arguments": text}
            call = {"index": 0, "id": "0", "type": "function", "function": function}
            delta = {"role": "assistant", "tool_calls": [call]}
        choice = {"index": 0, "delta": delta, "logprobs": self.logprobs(body, [(token, piece)])}
        head = self.head(body, "chat.completion.chunk")
        yield {**head, "choices": [{**choice, "finish_reason": finish}], "usage": None}
        if finish and (body.get("stream_options") or {}).get("include_usage"):
            yield {**head, "choices": [], "usage": usage}

    def logprobs(
        self, body: Mapping[str, Any], taken: Sequence[tuple[Mapping[str, Any], Piece]]
    ) -> dict[str, Any] | None:
        if not body.get("logprobs"):
            return None
        top = body.get("top_logprobs") or 0
        return {
            "content": [
                {
                    "token": token["text"],
                    "logprob": token["logprob"],
                    "top_logprobs": [
                        {"token": other["text"], "logprob": other["logprob"]}
                        for other in map(token_of, piece.steps[0].top[:top])
                    ],
                }
                for token, piece in taken
            ]
        }

    def whole(
        self,
        body: Mapping[str, Any],
        chat: bool,
        tool: str | None,
        said: Said,
        taken: Sequence[tuple[Mapping[str, Any], Piece]],
    ) -> dict[str, Any]:
        finish = _openai_finish(said.finish)
        tail = {"logprobs": self.logprobs(body, taken) if chat else None, "finish_reason": finish}
        if not chat:
            choices = [{"index": 0, "text": said.text, **tail}]
            return {
                **self.head(body, "text_completion"),
                "choices": choices,
                "usage": self.usage(said),
            }
        message: dict[str, Any] = {"role": "assistant", "content": said.text}
        if tool is not None:
            function = {"description": None, "name": tool, "arguments": said.text}
            message = {
                "role": "assistant",
                "tool_calls": [{"id": "0", "type": "function", "function": function}],
            }
        choices = [{"index": 0, "message": message, **tail}]
        return {**self.head(body, "chat.completion"), "choices": choices, "usage": self.usage(said)}

    # What it tells.

    async def health(self, exchange: Exchange) -> None:
        exchange.answer(200)

    async def info(self, exchange: Exchange) -> None:
        info = {
            "model_id": self.model,
            "model_sha": None,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": self.most_concurrent,
            "max_best_of": 2,
            "max_stop_sequences": self.most_stops,
            "max_input_tokens": self.context - 1,
            "max_total_tokens": self.context,
            "validation_workers": 2,
            "max_client_batch_size": 4,
            "router": "text-generation-router",
            "version": "3.3.7",
            "sha": None,
            "docker_label": None,
        }
        reply(exchange, 200, info)

    async def models(self, exchange: Exchange) -> None:
        card = {"id": self.model, "object": "model", "created": 0, "owned_by": self.model}
        reply(exchange, 200, {"object": "list", "data": [card]})

    async def metrics(self, exchange: Exchange) -> None:
        page = ""
        for name, value in (
            ("queue_size", self.waiting),
            ("batch_current_size", self.running),
            ("batch_current_max_tokens", self.running * 64),
            ("batch_max_total_tokens", self.context),
        ):
            page += f"# TYPE tgi_{name} gauge\ntgi_{name} {value}\n\n"
        exchange.answer(200, page.encode(), {"content-type": "text/plain; charset=utf-8"})

    async def tokenize(self, exchange: Exchange) -> None:
        """Special tokens are always added."""
        body = self.body(exchange)
        self.typed(body, {"inputs": str}, "inputs")
        reply(exchange, 200, spans([BOS, *tokenize(body["inputs"])]))

    async def chat_tokenize(self, exchange: Exchange) -> None:
        body = self.body(exchange)
        self.typed(body, {"messages": list}, "messages")
        tokens = list(self.chat_prompt(body["messages"]))
        templated = "".join(token_of((token, 0.0))["text"] for token in tokens)
        said = {"tokenize_response": spans(tokens), "templated_text": templated}
        reply(exchange, 200, said)


def spans(tokens: Sequence[int]) -> list[dict[str, Any]]:
    found, start = [], 0
    for number in tokens:
        text = token_of((number, 0.0))["text"]
        stop = start + (0 if number == BOS else len(text))
        found.append({"id": number, "text": text, "start": start, "stop": stop})
        start = stop
    return found


def invalid(message: str) -> Refusal:
    return Refusal(422, f"Input validation error: {message}", "validation")


def malformed(message: str) -> Refusal:
    return Refusal(422, f"Failed to deserialize the JSON body into the target type: {message}")


def event_done() -> bytes:
    """Of axum, too: no blank."""
    return b"data:[DONE]\n\n"


def _openai_finish(reason: str | None) -> str | None:
    return "stop" if reason == "eos_token" else reason


def headers_of(said: Said) -> dict[str, str]:
    """Of an answer that does not stream; milliseconds, but for the first time."""
    return {
        "x-compute-type": "gpu+optimized",
        "x-compute-time": "0.045",
        "x-compute-characters": "12",
        "x-total-time": "45",
        "x-validation-time": "1",
        "x-queue-time": "2",
        "x-inference-time": "42",
        "x-time-per-token": "2",
        "x-prompt-tokens": str(len(said.ask.prompt)),
        "x-generated-tokens": str(said.count),
    }


def _serde(value: object) -> str:
    kinds = {
        str: "string",
        bool: "boolean",
        int: "integer",
        float: "floating point",
        list: "sequence",
    }
    return f"type: {kinds.get(type(value), 'map')} `{value}`"


_RUST = {str: "a string", int: "u32", float: "f32", list: "a sequence", bool: "a boolean"}
_RUST[dict] = "struct GenerateParameters"
_PARAMETERS: Mapping[str, type] = {
    **dict.fromkeys(("temperature", "top_p", "typical_p", "repetition_penalty"), float),
    **dict.fromkeys(("max_new_tokens", "seed", "top_n_tokens"), int),
    "frequency_penalty": float,
    "stop": list,
    "do_sample": bool,
}
_OPENAI: Mapping[str, type] = {
    **dict.fromkeys(("temperature", "top_p", "presence_penalty", "frequency_penalty"), float),
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "seed", "n"), int),
    "stream": bool,
    "model": str,
}
_BOUNDS: tuple[tuple[str, Any, str], ...] = (
    ("temperature", lambda value: value > 0, "strictly positive"),
    ("repetition_penalty", lambda value: value > 0, "strictly positive"),
    ("frequency_penalty", lambda value: -2 <= value <= 2, ">= -2.0 and <= 2.0"),
    ("top_p", lambda value: 0 < value < 1, "> 0.0 and < 1.0"),
    ("typical_p", lambda value: 0 < value < 1, "> 0.0 and < 1.0"),
    ("top_k", lambda value: value > 0, "strictly positive"),
    ("max_new_tokens", lambda value: value > 0, "strictly positive"),
)
