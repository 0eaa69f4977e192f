"""Servers with OpenAI's routes: from the request to the pieces of its choices, written by each."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from fake_servers.answer import Holding, Piece, pieces, seeded
from fake_servers.constraint import by_schema
from fake_servers.model import BOS, EOS, Ask, Step, piece_of, tokenize
from fake_servers.openai_fields import ask_of, named_tool, prompts_of
from fake_servers.serving import FakeServer, calls_named, reply
from forebay.testing import Exchange

__all__ = ["OpenAIFake", "Writer", "completion_logprobs", "entries", "token_texts"]


class Writer:
    """One answer in the words of one server; a subclass says how."""

    def __init__(self, server: OpenAIFake, body: Mapping[str, Any], chat: bool) -> None:
        self.server = server
        self.body = body
        self.chat = chat
        self.created = server.now()
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{server.number()}"
        self.asks: list[Ask] = []
        self.tool: str | None = None
        self.tokens = 0
        #: Of each choice: what it has said, and its decoder.
        self.said: dict[int, str] = {}
        self.decoders: dict[int, Any] = {}

    @property
    def object(self) -> str:
        chunk = ".chunk" if self.body.get("stream") else ""
        return f"chat.completion{chunk}" if self.chat else "text_completion"

    @property
    def model(self) -> str:
        return str(self.body.get("model") or self.server.model)

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts; each counts once, however many choices it has."""
        return sum(len(ask.prompt) for ask in self.asks[:: self.body.get("n") or 1])

    def option(self, name: str) -> bool:
        return bool((self.body.get("stream_options") or {}).get(name))

    def usage(self, **more: object) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.tokens,
            "completion_tokens": self.tokens,
            **more,
        }

    def count(self, piece: Piece) -> None:
        self.tokens += len(piece.steps)

    def logprobs(self, index: int, steps: Sequence[Step]) -> dict[str, Any] | None:
        """None if they were not asked for."""
        if self.chat:
            if not self.body.get("logprobs"):
                return None
            texts = self.texts(index, steps)
            return {"content": entries(steps, texts, self.body.get("top_logprobs") or 0)}
        if self.body.get("logprobs") is None:
            return None
        offset = len(self.said.get(index, ""))
        return completion_logprobs(steps, self.texts(index, steps), self.body["logprobs"], offset)

    def texts(self, index: int, steps: Sequence[Step]) -> list[str]:
        """What each token says; a character stands with the token that completes it."""
        decoder = self.decoders.setdefault(index, codecs.getincrementaldecoder("utf-8")("replace"))
        return [decoder.decode(piece_of(step.token)) for step in steps]

    def begin(self) -> Iterator[bytes]:
        yield from ()

    def piece(self, index: int, piece: Piece) -> Iterator[bytes]:
        raise NotImplementedError

    def end(self) -> Iterator[bytes]:
        yield b"data: [DONE]\n\n"

    def whole(self, answers: Mapping[int, Sequence[Piece]]) -> dict[str, Any]:
        raise NotImplementedError


def token_texts(steps: Sequence[Step]) -> list[str]:
    """Each by itself, whole character or not."""
    return [piece_of(step.token).decode(errors="replace") for step in steps]


def entries(steps: Sequence[Step], texts: Sequence[str], top: int) -> list[dict[str, Any]]:
    """``logprobs.content`` of chat."""

    def entry(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return [
        {
            **entry(text, step.logprob),
            "top_logprobs": [
                entry(piece_of(token).decode(errors="replace"), logprob)
                for token, logprob in step.top[:top]
            ],
        }
        for step, text in zip(steps, texts, strict=True)
        if step.token != EOS
    ]


def completion_logprobs(
    steps: Sequence[Step], texts: Sequence[str], top: int, offset: int
) -> dict[str, Any]:
    """``logprobs`` of a completions choice whose text so far is ``offset`` characters long."""
    visible = [(step, text) for step, text in zip(steps, texts, strict=True) if step.token != EOS]
    offsets = []
    for _, text in visible:
        offsets.append(offset)
        offset += len(text)
    likeliest = [
        {piece_of(token).decode(errors="replace"): logprob for token, logprob in step.top[:top]}
        for step, _ in visible
    ]
    return {
        "text_offset": offsets,
        "token_logprobs": [step.logprob for step, _ in visible],
        "tokens": [text for _, text in visible],
        "top_logprobs": likeliest,
    }


class OpenAIFake(FakeServer):
    """``writer``: how it answers. A subclass checks requests and finds their constraints."""

    writer: ClassVar[type[Writer]]
    holding: ClassVar[Holding] = "longest"
    content_type: ClassVar[str] = "text/event-stream; charset=utf-8"

    def check(self, body: dict[str, Any], chat: bool) -> None:
        """
        :raises Refusal: the server would not take it.
        """
        raise NotImplementedError

    def constraint(self, body: dict[str, Any]) -> str | None:
        """The text that the answer has to be; None: the model is free.

        :raises Refusal: nothing keeps to it.
        """
        raise NotImplementedError

    def fits(self, prompt: Sequence[int], body: Mapping[str, Any]) -> None:
        """
        :raises Refusal: the prompt, or the answer after it, is longer than the context.
        """
        raise NotImplementedError

    async def chat(self, exchange: Exchange) -> None:
        await self.generate(exchange, chat=True)

    async def complete(self, exchange: Exchange) -> None:
        await self.generate(exchange, chat=False)

    async def generate(self, exchange: Exchange, chat: bool) -> None:
        body = self.body(exchange)
        self.check(body, chat)
        writer = self.writer(self, body, chat)
        forced = self.constraint(body)
        writer.tool = self.called(body)
        if writer.tool is not None:
            forced = self.arguments(body, writer.tool)
        writer.asks = self.asks(body, chat, forced)
        async with self.slot():
            if body.get("stream"):
                await self.stream(exchange, writer)
            else:
                await self.answer(exchange, writer)

    def called(self, body: dict[str, Any]) -> str | None:
        """The tool that the answer calls, because it must or because the user says so."""
        if not body.get("tools") or body.get("tool_choice") == "none":
            return None
        named = named_tool(body)
        if named is not None:
            return str(named["name"])
        names = [tool["function"]["name"] for tool in body["tools"]]
        return next((name for name in names if calls_named(body["messages"], name)), None)

    def arguments(self, body: dict[str, Any], tool: str) -> str:
        functions = {one["function"]["name"]: one["function"] for one in body["tools"]}
        return by_schema(functions[tool].get("parameters") or {"type": "object"})

    def asks(self, body: dict[str, Any], chat: bool, forced: str | None) -> list[Ask]:
        """One for each choice."""
        if chat:
            prompts = [self.chat_prompt(body["messages"])]
        else:
            prompts = prompts_of(body["prompt"], (BOS,))
        found = []
        for prompt in prompts:
            self.fits(prompt, body)
            rest = self.default_tokens(chat, len(prompt))
            ask = ask_of(body, prompt, rest, forced)
            found += [seeded(ask, index) for index in range(body.get("n") or 1)]
        return found

    def default_tokens(self, chat: bool, prompt_tokens: int) -> int:
        return self.context - prompt_tokens if chat else 16

    async def interleaved(self, asks: Sequence[Ask]) -> AsyncIterator[tuple[int, Piece]]:
        """All choices at once, a token of each in turn."""
        going = {index: pieces(ask, self.holding) for index, ask in enumerate(asks)}
        for place in itertools.count():
            if not going:
                return
            await self.tick(place)
            for index, choice in list(going.items()):
                piece = next(choice, None)
                if piece is None:
                    del going[index]
                else:
                    yield index, piece

    async def stream(self, exchange: Exchange, writer: Writer) -> None:
        begun = False
        async for index, piece in self.interleaved(writer.asks):
            if not begun:
                exchange.begin(self.content_type)
                for data in writer.begin():
                    exchange.send(data)
                begun = True
            writer.count(piece)
            for data in writer.piece(index, piece):
                exchange.send(data)
            writer.said[index] = writer.said.get(index, "") + piece.text
        for data in writer.end():
            exchange.send(data)

    async def answer(self, exchange: Exchange, writer: Writer) -> None:
        answers: dict[int, list[Piece]] = {}
        async for index, piece in self.interleaved(writer.asks):
            writer.count(piece)
            answers.setdefault(index, []).append(piece)
        reply(exchange, 200, writer.whole(answers), self.headers(writer))

    def headers(self, writer: Writer) -> Mapping[str, str]:
        return {}

    def text_tokens(self, text: str, special: bool) -> list[int]:
        return [BOS, *tokenize(text)] if special else tokenize(text)
