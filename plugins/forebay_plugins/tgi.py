"""Adapter ``tgi``: Hugging Face's text-generation-inference (read at 3.3).

Completions go to its native routes, which have more to say than its OpenAI ones: error types, the
watermark, logprobs. Chat goes to `/v1/chat/completions`. Both answer in the typed lane: nearly
every chunk of its chat stream would have to be written anew (empty ids, a moving `created`, a role
in each delta, tool calls that repeat their id).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing, suppress
from typing import Any, ClassVar

import msgspec
from msgspec import Struct

from forebay.api import (
    AdapterKind,
    Attempt,
    BackendFailed,
    BackendRefused,
    Capabilities,
    Delta,
    Event,
    Finished,
    GenerateRequest,
    HttpBackendSettings,
    Load,
    Operation,
    Result,
    Started,
    StreamTruncated,
    Timings,
    TokenizeRequest,
    Tokens,
    Unsupported,
    UpstreamResponse,
    hookimpl,
)
from forebay_plugins.http_server import drain
from forebay_plugins.openai_events import typed_events
from forebay_plugins.openai_operations import chat_messages, extras
from forebay_plugins.openai_wire import OpenAIServer
from forebay_plugins.prometheus_text import samples
from forebay_plugins.stop_strings import StopStrings
from forebay_plugins.tgi_fields import Info, chat_fields, generate_body, refuse, refuse_unknown
from forebay_plugins.tgi_stream import (
    NativeStream,
    failure,
    kind_of,
    timings_of,
    trimmed,
    whole,
)

__all__ = ["TgiAdapter", "TgiSettings"]


class TgiSettings(HttpBackendSettings, kw_only=True, frozen=True):
    """Settings of `adapter: tgi`; `model` is the id of a LoRA adapter, or its model's own."""

    tools: bool = True
    """Its chat template takes tools; the server does not tell."""
    multimodal: bool = False
    """Its model takes images; the server does not tell."""


class SimpleToken(Struct):
    id: int
    text: str


class ChatTokens(Struct):
    tokenize_response: list[SimpleToken]


class TgiAdapter(OpenAIServer):
    """One text-generation-inference server."""

    settings: TgiSettings
    # What is not said changes nothing there.
    neutral: ClassVar[Mapping[str, object]] = {}
    _info: Info | None = None

    async def probe(self) -> Capabilities:
        await self.get("/health")
        self._info = info = await self.get_json("/info", Info)
        return Capabilities(
            endpoints=frozenset({"chat", "completions", "tokenize"}),
            tools=self.settings.tools,
            schema=True,
            logprobs=True,
            multimodal=self.settings.multimodal,
            max_choices=1,
            max_context=info.max_total_tokens,
            # Beyond these it answers 429.
            slots=info.max_concurrent_requests,
            version=info.version,
            models=(info.model_id,),
        )

    async def load(self) -> Load | None:
        """``kv_usage``: of the tokens that a batch may hold, the share promised to requests."""
        page = await self.get("/metrics")
        running = samples(page, "tgi_batch_current_size")
        waiting = samples(page, "tgi_queue_size")
        promised = samples(page, "tgi_batch_current_max_tokens")
        room = samples(page, "tgi_batch_max_total_tokens")
        return Load(
            running=int(sum(running)) if running else None,
            waiting=int(sum(waiting)) if waiting else None,
            kv_usage=min(1.0, sum(promised) / sum(room)) if promised and sum(room) else None,
        )

    async def perform(self, request: Operation, attempt: Attempt) -> Result:
        if not isinstance(request, TokenizeRequest):
            raise Unsupported(f"a tgi backend cannot serve {request.endpoint}")
        if request.text is None:
            found = await self._chat_tokens(request, attempt)
        else:
            refuse_unknown(request.extra)
            if not request.add_special_tokens:
                raise refuse("add_special_tokens", "it always adds them to a text")
            body = {"inputs": request.text}
            found = await self.post_json("/tokenize", body, list[SimpleToken], attempt)
        return Tokens(
            ids=tuple(token.id for token in found),
            texts=tuple(token.text for token in found),
            max_model_len=self._info.max_total_tokens if self._info else 0,
        )

    async def _chat_tokens(self, request: TokenizeRequest, attempt: Attempt) -> list[SimpleToken]:
        refuse_unknown(request.extra, frozenset({"tools"}))
        if request.add_special_tokens:
            raise refuse("add_special_tokens", "a chat has those of its template")
        body = {
            **extras(request.fields, request.extra),
            "model": "tgi",
            "messages": chat_messages(request.chat),
        }
        answer: ChatTokens = await self.post_json("/chat_tokenize", body, ChatTokens, attempt)
        return answer.tokenize_response

    async def stream(
        self, request: GenerateRequest, attempt: Attempt
    ) -> AsyncGenerator[Event, None]:
        attempt = msgspec.structs.replace(attempt, headers=_sampled(attempt.headers))
        serve = self._chat if request.endpoint == "chat" else self._generate
        stops = StopStrings(request.sampling.stop)
        async with aclosing(serve(request, attempt)) as events:
            async for event in events:
                yield trimmed(event, stops) if isinstance(event, Delta) else event
                if isinstance(event, Started) and request.echo:
                    yield Delta(text=str(request.prompts[0]))

    async def _generate(
        self, request: GenerateRequest, attempt: Attempt
    ) -> AsyncGenerator[Event, None]:
        response = await self._upstream.send(
            "POST",
            "/generate_stream" if request.stream else "/generate",
            body=generate_body(request, self._adapter, self._info, self.settings.neutral_sampling),
            headers={**attempt.headers, **self._headers},
            connect_timeout=attempt.timeouts.connect,
        )
        try:
            await self._check(
                response, "text/event-stream" if request.stream else "application/json"
            )
            yield Started()
            logprobs = request.sampling.logprobs is not None
            if not request.stream:
                delta, usage = whole(await response.read(), logprobs, response.headers)
                yield delta
                yield Finished(usage, timings_of(response.headers), model=self._model)
                return
            native, chunks = NativeStream(logprobs), response.chunks()
            with suppress(StreamTruncated):  # a cut may be the end: the last event tells
                async for chunk in chunks:
                    for delta in native.feed(chunk):
                        yield delta
                    if native.ended:
                        await drain(chunks)
                        break
            yield Finished(native.end(), model=self._model)
        finally:
            await response.aclose()

    async def _chat(
        self, request: GenerateRequest, attempt: Attempt
    ) -> AsyncGenerator[Event, None]:
        try:
            async with aclosing(typed_events(request, self._relay(request, attempt))) as events:
                async for event in events:
                    yield event
        except BackendFailed as failed:
            # Its chat streams say 422 of every error: only the text tells them apart.
            kind = kind_of(failed.message)
            raise failure(failed.message, kind) if kind else failed from None

    def timings(self, closing: Mapping[str, Any], headers: Mapping[str, str]) -> Timings | None:
        return timings_of(headers)

    async def changes(self, request: GenerateRequest) -> dict[str, object]:
        return chat_fields(request, self._adapter, self._info)

    async def _check(self, response: UpstreamResponse, content_type: str) -> None:
        try:
            await super()._check(response, content_type)
        except BackendRefused as refused:
            if refused.status != 424:  # its way to say that the model server failed
                raise
            raise BackendFailed(refused.message) from None

    @property
    def _adapter(self) -> str:
        """The LoRA adapter to use; what is no name of one must not be sent as one."""
        model = self.settings.model
        return "" if model in ("tgi", self._base) else model

    @property
    def _base(self) -> str:
        return self._info.model_id if self._info else ""

    @property
    def _model(self) -> str:
        """Whose answer it is: native ones do not say."""
        return self._adapter or self._base


def _sampled(headers: Mapping[str, str]) -> Mapping[str, str]:
    """Without the trace context of unsampled requests: TGI exports spans whatever its flags say."""
    parent = headers.get("traceparent")
    if parent is None or int(parent[-2:], 16) & 1:
        return headers
    return {k: v for k, v in headers.items() if k not in ("traceparent", "tracestate")}


@hookimpl
def adapters() -> Iterable[AdapterKind]:
    return [
        AdapterKind(
            name="tgi",
            settings=TgiSettings,
            build=TgiAdapter,
            summary="Hugging Face's text-generation-inference, by its native routes.",
            provider="tgi",
        )
    ]
