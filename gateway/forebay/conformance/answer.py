"""An answer as a client sees it: status, headers, the very bytes, and what they say.

Read leniently: a check that is not about shapes must not fail for an odd one. The checks of area
``shapes`` read the same bytes strictly.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

__all__ = ["Answer", "Broken", "Choice", "Chunk", "Event", "Lacking", "Usage", "events_of"]

T = TypeVar("T")

DONE = "[DONE]"
#: Characters of a message that a report quotes.
_QUOTED = 200


class Finding(Exception):
    """Why a promise does not hold, in a sentence."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Lacking(Finding):
    """It is refused, clearly; or there is no way to see it."""


class Broken(Finding):
    """It does not hold, and the client is not told."""


class Usage(Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class Function(Struct, frozen=True):
    name: str | None = None
    arguments: str | None = None


class Call(Struct, frozen=True):
    """A tool call, or a piece of one."""

    index: int = 0
    id: str | None = None
    function: Function = Function()


class Message(Struct, frozen=True):
    """A whole message, or a piece of one."""

    role: str | None = None
    content: str | None = None
    tool_calls: list[Call] | None = None


class Part(Struct, frozen=True):
    """A choice in a body or in a chunk."""

    index: int = 0
    message: Message | None = None
    delta: Message | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None

    @property
    def said(self) -> Message:
        return self.delta or self.message or Message(content=self.text)


class Chunk(Struct, frozen=True):
    """A whole body, or a chunk of a stream."""

    id: str | None = None
    object: str | None = None
    created: float | None = None
    model: str | None = None
    choices: list[Part] = []
    usage: Usage | None = None


class Event(Struct, frozen=True):
    """One SSE event. ``name``: of its ``event`` field, empty without one."""

    name: str
    data: str

    @property
    def json(self) -> Any:
        try:
            return msgspec.json.decode(self.data)
        except msgspec.DecodeError:
            raise Broken(f"an event is not JSON: {self.data[:_QUOTED]}") from None


class Choice:
    """One choice, whole or put together from its chunks."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self.pieces = [part.said.content for part in parts if part.said.content]
        self.text = "".join(self.pieces)
        self.roles = [part.said.role for part in parts if part.said.role]
        self.finishes = [part.finish_reason for part in parts if part.finish_reason]

    @property
    def finish(self) -> str:
        if len(self.finishes) != 1:
            raise Broken(f"a choice has {len(self.finishes)} finish reasons: {self.finishes}")
        return self.finishes[0]

    @property
    def calls(self) -> list[list[Call]]:
        """The pieces of each tool call, by its index."""
        found: dict[int, list[Call]] = {}
        for part in self.parts:
            for place, call in enumerate(part.said.tool_calls or ()):
                # A whole message lists its calls, without numbers.
                found.setdefault(place if part.message else call.index, []).append(call)
        return [found[index] for index in sorted(found)]

    def logprobs(self, key: str) -> list[Any]:
        """All entries of one list of the choice's ``logprobs``."""
        return [entry for part in self.parts for entry in (part.logprobs or {}).get(key) or []]


class Answer:
    """One exchange. ``broke``: why the connection ended before the answer did; empty if not."""

    def __init__(
        self, status: int, headers: Mapping[str, str], raw: bytes, broke: str = ""
    ) -> None:
        self.status = status
        #: Lower-case names.
        self.headers = headers
        self.raw = raw
        self.broke = broke

    @property
    def streamed(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @cached_property
    def body(self) -> Any:
        """The whole body. :raises Broken: it is not JSON."""
        try:
            return msgspec.json.decode(self.raw)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise Broken(f"HTTP {self.status} with a body that is not JSON") from None

    @cached_property
    def events(self) -> list[Event]:
        """Those of a stream. :raises Broken: it is not UTF-8."""
        return events_of(self.raw)

    @cached_property
    def chunks(self) -> list[Any]:
        """Of an OpenAI stream, as plain data."""
        return [event.json for event in self.events if event.data != DONE]

    @property
    def error(self) -> dict[str, Any]:
        """The error object, of a body or of an event; empty without one."""
        for content in self.chunks if self.streamed else [self._body_or_none()]:
            if isinstance(content, dict) and content.get("error"):
                error = content["error"]
                return error if isinstance(error, dict) else {"message": error}
        return {}

    def _body_or_none(self) -> Any:
        try:
            return self.body
        except Broken:
            return None

    def refuses(self, *fields: str) -> bool:
        """It says no, and clearly: no backend can, or it names one of the fields."""
        if not 400 <= self.status < 500:
            return False
        said = f"{self.error.get('param') or ''} {self.error.get('message') or ''}"
        return self.error.get("code") == "unsupported" or any(field in said for field in fields)

    def told(self) -> str:
        """Status and message, for people."""
        message = str(self.error.get("message") or "").strip() or "no message"
        return f"HTTP {self.status}: {message[:_QUOTED]}"

    def expect(self, *fields: str) -> Answer:
        """Itself, if it is an answer; ``fields``: what the request asks for that others lack.

        :raises Lacking: it refuses one of the fields by name, or as something nobody can do.
        :raises Broken: it failed in any other way.
        """
        if self.refuses(*fields):
            raise Lacking(self.told())
        if self.status != 200:
            raise Broken(self.told())
        if self.broke:
            raise Broken(f"the answer broke off: {self.broke}")
        if self.error:
            raise Broken(f"the answer is an error: {self.error.get('message')}")
        return self

    def refused(self, *fields: str, status: int = 400) -> None:
        """:raises Broken: it is not refused with this status, naming one of the fields if any."""
        if self.status != status:
            raise Broken(f"expected HTTP {status}, got {self.told()}")
        if fields and not self.refuses(*fields):
            raise Broken(f"does not name {' or '.join(fields)}: {self.told()}")

    def read(self, kind: type[T]) -> T:
        """The body as this type. :raises Broken: it is not of that shape, saying where."""
        return shaped(self.body, kind)

    @cached_property
    def parts(self) -> list[Chunk]:
        """The body, or the chunks."""
        if self.streamed:
            return [shaped(chunk, Chunk) for chunk in self.chunks]
        return [self.read(Chunk)]

    @property
    def choices(self) -> dict[int, Choice]:
        found: dict[int, list[Part]] = {}
        for chunk in self.parts:
            for part in chunk.choices:
                found.setdefault(part.index, []).append(part)
        return {index: Choice(found[index]) for index in sorted(found)}

    @property
    def choice(self) -> Choice:
        """The first. :raises Broken: there is none."""
        choices = self.choices
        if 0 not in choices:
            raise Broken("the answer has no choice with index 0")
        return choices[0]

    @property
    def text(self) -> str:
        return self.choice.text

    @property
    def usage(self) -> Usage:
        """:raises Broken: there is none."""
        for chunk in self.parts:
            if chunk.usage is not None:
                return chunk.usage
        raise Broken("the answer has no usage")


def shaped(content: Any, kind: type[T]) -> T:
    """Plain data as this type.

    :raises Broken: it is not of that shape, saying where.
    """
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as wrong:
        raise Broken(f"the answer's shape: {wrong}") from None


def events_of(raw: bytes) -> list[Event]:
    """The events of a stream (WHATWG HTML, section 9.2.6); comments are left out.

    :raises Broken: it is not UTF-8.
    """
    try:
        text = raw.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise Broken(f"the stream is not UTF-8 at byte {error.start}") from None
    events = []
    for block in text.split("\n\n"):
        fields = [line.partition(":") for line in block.split("\n") if line[:1] not in ("", ":")]
        lines = [value.removeprefix(" ") for name, _, value in fields if name == "data"]
        names = [value.strip() for name, _, value in fields if name == "event"]
        if lines:
            events.append(Event("".join(names[-1:]), "\n".join(lines)))
    return events
