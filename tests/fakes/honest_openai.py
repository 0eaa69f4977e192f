"""An OpenAI server that keeps its promises, but for the faults it is told to have.

Loaded by tests of the conformance kit: each fault must be found, and without one nothing.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any

from forebay.testing import Exchange

WORDS = ("eins", "zwei", "drei", "vier", "fünf", "東京", "京都", "sieben", "acht", "neun")
MODEL = "honest"


def server(faults: set[str]) -> Any:
    """A script for ScriptedServer. ``faults`` may change between requests."""

    async def script(exchange: Exchange) -> None:
        if exchange.path == "/v1/models":
            exchange.answer(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        elif exchange.path.endswith("completions"):
            Answering(exchange, frozenset(faults)).answer()
        else:
            refuse(exchange, 404, "there is no such route", None)

    return script


def refuse(exchange: Exchange, status: int, message: str, param: str | None) -> None:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
    exchange.answer(status, {"error": error})


class Answering:
    """One request being answered."""

    def __init__(self, exchange: Exchange, faults: frozenset[str]) -> None:
        self.exchange = exchange
        self.faults = faults
        self.asked: dict[str, Any] = exchange.json
        self.chat = "chat" in exchange.path
        self.chunks = 0
        self.n = 1 if "one choice" in faults else self.asked.get("n") or 1

    def answer(self) -> None:
        if self.asked["model"] != MODEL:
            refuse(self.exchange, 404, "unknown model", "model")
        elif "schema" in str(self.asked.get("response_format")) and "refused" in self.faults:
            refuse(self.exchange, 400, "response_format is not supported", "response_format")
        elif self.asked.get("stream"):
            self.stream()
        else:
            self.whole()

    def says(self, index: int) -> tuple[list[str], str]:
        """The tokens of a choice, and how it ends."""
        asked, faults = self.asked, self.faults
        format_ = asked.get("response_format") or {}
        if format_.get("type") == "json_schema" and "unguided" not in faults:
            return ['{"animal":', ' "zebra"', "}"], "stop"
        hot = (asked.get("temperature") or 0) > 0 and (asked.get("top_k") != 1 or "top_k" in faults)
        random = Random(f"{asked.get('seed')} {index}" if hot else 0)
        limit = asked.get("max_tokens") or asked.get("max_completion_tokens") or 16
        words = [f" {random.choice(WORDS)}" for _ in range(limit + 3 * ("limit" in faults))]
        stops = asked.get("stop") or []
        text = "".join(words)
        ends = [text.find(stop) for stop in stops if stop in text]
        if not ends:
            return words, "length"
        end = min(ends) + 99 * ("stop" in faults)
        kept = [words[i][: max(0, end - len("".join(words[:i])))] for i in range(len(words))]
        return [word for word in kept if word], "stop"

    def usage(self) -> dict[str, int]:
        content = self.asked.get("prompt") or self.asked["messages"]
        prompt = len(str(content).split())
        said = sum(len(self.says(index)[0]) for index in range(self.n))
        total = prompt + said + ("sum" in self.faults)
        return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": total}

    def head(self, kind: str) -> dict[str, Any]:
        self.chunks += 1
        return {
            "id": f"id-{self.chunks}" if "ids" in self.faults else f"id-{id(self)}",
            "object": kind,
            "created": 1_795_000_000 + self.chunks * ("created" in self.faults),
            "model": "weights.bin" if "model" in self.faults else MODEL,
        }

    def whole(self) -> None:
        choices = []
        for index in range(self.n):
            words, finish = self.says(index)
            text = "".join(words)
            said = {"message": {"role": "assistant", "content": text}, "logprobs": None}
            finish = "eos" if "finish" in self.faults else finish
            body = said if self.chat else {"text": text}
            choices.append({"index": index, "finish_reason": finish, **body})
        kind = "chat.completion" if self.chat else "text_completion"
        self.exchange.answer(200, {**self.head(kind), "choices": choices, "usage": self.usage()})

    def stream(self) -> None:
        faults = self.faults
        self.exchange.begin()
        for index in range(self.n):
            self.choice(index)
        options = self.asked.get("stream_options") or {}
        if options.get("include_usage") or "usage unasked" in faults:
            choices = [self.part(0, {})] if "usage with choices" in faults else []
            self.send(choices, usage=self.usage())
        for _ in range(0 if "no done" in faults else 2 if "two dones" in faults else 1):
            self.exchange.send(b"data: [DONE]\n\n")

    def choice(self, index: int) -> None:
        words, finish = self.says(index)
        if "one piece" in self.faults:
            words = ["".join(words)]
        roles = 0 if "no role" in self.faults else 2 if "two roles" in self.faults else 1
        for _ in range(roles * self.chat):
            self.send([self.part(index, {"role": "assistant", "content": ""})])
        for number, word in enumerate(words):
            if "cut characters" in self.faults:
                word = word.replace("東", "\ufffd")
            if "comments" in self.faults and number == 1:
                self.exchange.send(b": keep-alive\n\n")
            self.send([self.part(index, {"content": word})])
        self.send([self.part(index, {}, finish)])

    def part(self, index: int, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        said = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        return {"index": index, **said, "logprobs": None, "finish_reason": finish}

    def send(self, choices: list[dict[str, Any]], **more: Any) -> None:
        if "usage everywhere" in self.faults:
            more = {"usage": self.usage(), **more}
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        content = json.dumps({**self.head(kind), "choices": choices, **more})
        self.exchange.send(f"data: {content}\n\n".encode())
