"""Finding out what a backend can do: small questions, asked in the typed lane of its adapter.

Some servers answer 200 to a field that they do not know and ignore it, so an answer proves nothing
unless it had to differ. Each question is therefore put so that a backend which ignores it is seen
to: the schema allows one word alone, drawn by lot, while the prompt asks for another; the stop
string is taken from the middle of what the backend said a moment ago; and so on.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from contextlib import aclosing
from typing import Any, TypeVar, cast

import msgspec
from msgspec import Raw

from forebay.api import (
    Adapter,
    Attempt,
    BackendError,
    BackendFailed,
    BackendGarbage,
    BackendRefused,
    Capabilities,
    Delta,
    Endpoint,
    Event,
    Finished,
    GenerateRequest,
    Message,
    Sampling,
    StaleConnection,
    TokenLogprob,
    Unsupported,
    Usage,
)
from forebay.examination import Finding, Question

__all__ = ["examine"]

#: Seconds for one question; a server that is slower is not judged.
PATIENCE = 20.0
#: Seconds within which a backend must have noticed that its client left.
LEAVING = 4.0
#: Tokens: of the plain answer, of one bound by a schema, of one that is broken off.
PLAIN, BOUND, LONG = 16, 48, 1024

_PROMPT = "Count from one to ten in words."
_ENDLESS = "Count from one to a thousand in words."
#: Read as JSON already begun, it keeps small models from answering with blanks for ever.
_CONTRADICTED = '{"word": "yes"}'


_Found = TypeVar("_Found")


async def examine(
    adapter: Adapter,
    claims: Capabilities,
    model: str,
    asked: Collection[Question],
    others: Callable[[], int],
) -> AsyncGenerator[tuple[Question, Finding], None]:
    """Ask these questions, one after the other; yields each answer as it is found.

    The first request is plain: without it being served, a refusal of another would prove nothing.
    ``model``: under which name the gateway serves the backend. ``others``: how many requests of
    clients it works on. Raises nothing.
    """
    examinee = _Examinee(adapter, claims, model, others)
    refused = await _contained(examinee.begin)
    for question in asked:
        ask: Callable[[], Awaitable[Finding]] = getattr(examinee, question)
        yield question, await _contained(ask) if refused is None else refused


async def _contained(ask: Callable[[], Awaitable[_Found]]) -> _Found | Finding:
    """What it finds; and whatever goes wrong in asking is a finding, too."""
    try:
        async with asyncio.timeout(PATIENCE):
            return await ask()
    except TimeoutError:
        return Finding("unknown", f"no answer within {PATIENCE:g} s", again=True)
    except (BackendRefused, Unsupported) as refusal:
        return Finding("fails", f"refused: {refusal.message}")
    except (BackendFailed, BackendGarbage) as failure:
        return Finding("fails", f"failed: {failure.message}", again=True)
    except BackendError as error:
        return Finding("unknown", error.message, again=True)
    except Exception as error:  # noqa: BLE001 - a plugin's bug is no reason to examine no more
        return Finding("unknown", f"the adapter raised {error!r}")


class _Answer:
    """One answer, put together."""

    def __init__(self) -> None:
        self.text = ""
        self.finish: str | None = None
        self.logprobs: list[TokenLogprob] = []
        #: Name and arguments of the first tool call.
        self.called: str | None = None
        self.arguments = ""
        self.usage: Usage | None = None

    def add(self, event: Event) -> None:
        if isinstance(event, Finished):
            self.usage = event.usage
        elif isinstance(event, Delta):
            self.text += event.text
            self.finish = event.finish_reason or self.finish
            self.logprobs += event.logprobs
            for call in event.tool_calls:
                if call.index == 0:
                    self.called = call.name or self.called
                    self.arguments += call.arguments


class _Examinee:
    """A backend under examination: a method for each question, named like it."""

    def __init__(
        self, adapter: Adapter, claims: Capabilities, model: str, others: Callable[[], int]
    ) -> None:
        self._adapter = adapter
        self._model = model
        self._others = others
        self._endpoint: Endpoint = "chat" if "chat" in claims.endpoints else "completions"
        self._room = claims.max_context // 2 or LONG
        self._plain = _Answer()

    async def begin(self) -> Finding | None:
        """Ask for plain text; a finding if not even that is to be had."""
        try:
            self._plain = await self._ask(_PROMPT, Sampling(max_tokens=PLAIN, temperature=0))
        except (BackendError, Unsupported) as error:
            again = not isinstance(error, BackendRefused | Unsupported)
            return Finding("unknown", f"a plain request failed: {error.message}", again)
        return None

    async def usage(self) -> Finding:
        """Does a stream end with the counts?"""
        usage = self._plain.usage
        if usage is None or usage.source != "reported":
            return Finding("fails", "a stream ended without token counts")
        if usage.prompt_tokens < 1 or usage.completion_tokens < 1:
            return Finding("fails", "a stream ended with token counts of 0")
        return Finding("holds")

    async def stop(self) -> Finding:
        """Does an answer end before a string that it is known to contain?"""
        text = self._plain.text
        at, string = _piece(text)
        if not string:
            return Finding("unknown", f"its plain answer was too short: {text!r}")
        sampling = Sampling(max_tokens=PLAIN, temperature=0, stop=(string,))
        answer = await self._ask(_PROMPT, sampling, stop=[string])
        if string in answer.text:
            return Finding("fails", f"the stop string {string!r} came in the answer")
        if answer.text.rstrip() != text[:at].rstrip():
            return Finding("unknown", "it gave another answer to the same question", again=True)
        if answer.finish != "stop":
            return Finding("fails", f"stopped, but said {answer.finish!r}")
        return Finding("holds")

    async def schema(self) -> Finding:
        """Does a JSON schema bind that contradicts the prompt?"""
        return await self._schema("chat")

    async def completions_schema(self) -> Finding:
        return await self._schema("completions")

    async def _schema(self, endpoint: Endpoint) -> Finding:
        word, schema = _one_word()
        answer = await self._ask(
            _CONTRADICTED,
            Sampling(max_tokens=BOUND, temperature=0),
            endpoint=endpoint,
            needs_schema=True,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "answer", "strict": True, "schema": schema},
            },
        )
        return _bound(answer.text, word, answer.finish)

    async def tools(self) -> Finding:
        """Are tools taken, and is a call made that the client insists on?"""
        word, schema = _one_word()
        function = {"name": "report", "description": "Report a word.", "parameters": schema}
        tools = {"tools": [{"type": "function", "function": function}]}
        short, long = (Sampling(max_tokens=limit, temperature=0) for limit in (1, BOUND))
        await self._ask(_CONTRADICTED, short, needs_tools=True, **tools)
        named = {"type": "function", "function": {"name": "report"}}
        for choice in (named, "required"):
            try:
                answer = await self._ask(
                    _CONTRADICTED, long, needs_tools=True, tool_choice=choice, **tools
                )
            except (BackendRefused, Unsupported):
                continue
            if answer.called is None:
                return Finding("fails", f"no call of a tool, but {answer.text[:60]!r}")
            if answer.called != "report":
                return Finding("fails", f"called {answer.called!r}, which is no tool")
            return _bound(answer.arguments, word, answer.finish)
        return Finding("unknown", "takes tools, but cannot be made to call one")

    async def logprobs(self) -> Finding:
        """Do log probabilities come, and are they some?"""
        field = True if self._endpoint == "chat" else 0
        sampling = Sampling(max_tokens=4, temperature=0, logprobs=0)
        answer = await self._ask(_PROMPT, sampling, logprobs=field)
        if not answer.logprobs:
            return Finding("fails" if answer.text else "unknown", "none came")
        known = [found.logprob for found in answer.logprobs if found.logprob is not None]
        if len(known) == len(answer.logprobs) and all(map(math.isfinite, known)):
            return Finding("holds")
        return Finding("fails", "they are not all finite")

    async def cancel(self) -> Finding:
        """Does the backend stop working once its client has left? Only it can tell."""
        before = await self._working()
        if before is None:
            return Finding("unknown", "it does not say what it is working on")
        if before:
            return Finding("unknown", "it was working on other requests", again=True)
        sampling = Sampling(max_tokens=min(LONG, self._room), temperature=0)
        async with aclosing(self._events(_ENDLESS, sampling)) as events:
            seen = 0
            async for event in events:
                seen += isinstance(event, Delta)
                if seen == 2:
                    break
            if not await self._working():
                return Finding("unknown", "it did not show the request that it was working on")
        left = time.monotonic()
        while await self._working():
            if self._others():
                return Finding("unknown", "other requests came meanwhile", again=True)
            if time.monotonic() - left > LEAVING:
                return Finding("fails", f"still at work {LEAVING:g} s after the client had left")
            await asyncio.sleep(0.1)
        return Finding("holds")

    async def _working(self) -> int | None:
        """Requests that the backend says it has; None: it does not say."""
        load = await self._adapter.load()
        if load is None or load.running is None:
            return None
        return load.running + (load.waiting or 0)

    async def _ask(self, text: str, sampling: Sampling, **fields: Any) -> _Answer:
        answer = _Answer()
        async with aclosing(self._events(text, sampling, **fields)) as events:
            async for event in events:
                answer.add(event)
        return answer

    async def _events(
        self, text: str, sampling: Sampling, **fields: Any
    ) -> AsyncGenerator[Event, None]:
        try:
            async with aclosing(self._once(text, sampling, **fields)) as events:
                async for event in events:
                    yield event
        except StaleConnection:  # says nothing of the server: again on a new one, as for clients
            async with aclosing(self._once(text, sampling, **fields)) as events:
                async for event in events:
                    yield event

    async def _once(
        self, text: str, sampling: Sampling, **fields: Any
    ) -> AsyncGenerator[Event, None]:
        request = self._request(text, sampling, **fields)
        # Not sampled: it is nobody's request, and should leave no trace of its own.
        traceparent = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"
        headers = {"x-request-id": request.id, "traceparent": traceparent}
        events = self._adapter.stream(request, Attempt(headers=headers))
        async with aclosing(cast("AsyncGenerator[Event, None]", events)):
            async for event in events:
                yield event

    def _request(
        self,
        text: str,
        sampling: Sampling,
        endpoint: Endpoint | None = None,
        needs_schema: bool = False,
        needs_tools: bool = False,
        **fields: Any,
    ) -> GenerateRequest:
        """As the gateway would read it from a client's body."""
        endpoint = endpoint or self._endpoint
        chat = endpoint == "chat"
        body = {
            "model": self._model,
            **({"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}),
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            **fields,
        }
        return GenerateRequest(
            id=f"examination-{secrets.token_hex(8)}",
            endpoint=endpoint,
            model=self._model,
            created=int(time.time()),
            messages=(Message(role="user", content=text),) if chat else (),
            prompts=() if chat else (text,),
            sampling=sampling,
            stream=True,
            include_usage=True,
            typed=True,
            needs_schema=needs_schema,
            needs_tools=needs_tools,
            fields={name: Raw(msgspec.json.encode(value)) for name, value in body.items()},
        )


def _one_word() -> tuple[str, Mapping[str, Any]]:
    """A word that nobody can guess, and a schema that allows no other."""
    word = f"w{secrets.token_hex(2)}"
    return word, {
        "type": "object",
        "properties": {"word": {"type": "string", "enum": [word]}},
        "required": ["word"],
        "additionalProperties": False,
    }


def _bound(text: str, word: str, finish: str | None) -> Finding:
    """Whether the text is what the schema of :func:`_one_word` allows, as far as it goes."""
    whole = f'{{"word":"{word}"}}'
    packed = "".join(text.split())
    if packed == whole:
        return Finding("holds")
    if finish == "length" and whole.startswith(packed):
        return Finding("unknown", f"cut off before it could be told: {text[:60]!r}")
    return Finding("fails", f"the schema did not bind: {text[:60]!r}")


def _piece(text: str) -> tuple[int, str]:
    """A string of the middle of the text that does not come earlier in it, and where it stands.

    Within a word if possible: a model that sees words as tokens may know no string across them.
    """
    middle = len(text) // 2
    pieces = [(at, text[at : at + 4]) for at in range(1, len(text) - 2)]
    for at, string in sorted(pieces, key=lambda p: (len(p[1].split()) > 1, abs(p[0] - middle))):
        if string == string.strip() and "\ufffd" not in string and text.find(string) == at:
            return at, string
    return 0, ""
