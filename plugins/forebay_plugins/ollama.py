"""Adapter ``ollama``: Ollama's own API (read at its state of August 2026).

It needs Ollama 0.12.6 or later. Not its ``/v1``: there a failure in mid-stream looks like an empty
chunk and an end, the context length can't be set, and a prompt that is too long is cut without a
word.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any

import msgspec
from msgspec import Struct

from forebay.api import (
    AdapterKind,
    Attempt,
    BackendError,
    BackendFailed,
    BackendGarbage,
    Capabilities,
    Embeddings,
    EmbedRequest,
    Endpoint,
    Event,
    Finished,
    GenerateRequest,
    HttpBackendSettings,
    Operation,
    Result,
    Started,
    StreamTruncated,
    Timings,
    Unsupported,
    Usage,
    hookimpl,
)
from forebay_plugins.http_server import HttpServer, drain
from forebay_plugins.ollama_shape import Line, Reader, body_of, embed_body
from forebay_plugins.openai_errors import error_of

__all__ = ["OllamaAdapter", "OllamaSettings"]

#: Bytes of the longest line.
MAX_LINE = 1 << 20
_PATHS = {"chat": "/api/chat", "completions": "/api/generate"}


class OllamaSettings(HttpBackendSettings, kw_only=True, frozen=True):
    """Settings of `adapter: ollama`."""

    num_ctx: int = 0
    """Context length with which the model is loaded; 0: the server's own default. A prompt that
    is longer is refused."""
    keep_alive: str = ""
    """How long the model stays loaded after a request, e.g. `30m`; empty: the server's default."""
    slots: int = 1
    """Its `OLLAMA_NUM_PARALLEL`, which it does not tell; 0: not known."""


class Version(Struct):
    version: str


class Wrapped(Struct):
    error: str


class Details(Struct):
    context_length: int = 0


class Tag(Struct):
    name: str
    context_length: int = 0
    details: Details = msgspec.field(default_factory=Details)
    #: None: an older server does not say.
    capabilities: list[str] | None = None


class Tags(Struct):
    models: list[Tag] | None = None


class Vectors(Struct):
    embeddings: list[tuple[float, ...]]
    prompt_eval_count: int = 0
    model: str = ""


class OllamaAdapter(HttpServer):
    """One server, of which one model is used."""

    settings: OllamaSettings

    async def probe(self) -> Capabilities:
        version: Version = await self.get_json("/api/version", Version)
        if _cuts_prompts(version.version):
            raise BackendFailed(
                f"Ollama {version.version} cuts long prompts without a word: update to 0.12.6"
            )
        tags: Tags = await self.get_json("/api/tags", Tags)
        models = {tag.name: tag for tag in tags.models or ()}
        wanted = self.settings.model
        tag = models.get(wanted) or models.get(f"{wanted}:latest")
        if wanted and tag is None:
            raise BackendFailed(f"the backend has no `model: {wanted}`, but {tuple(models)}")
        able = tag.capabilities if tag else None
        return Capabilities(
            endpoints=_endpoints(able),
            tools=able is None or "tools" in able,
            schema=True,
            logprobs=True,
            # Images for a model without would be passed over in silence.
            multimodal=able is not None and "vision" in able,
            extra_fields=False,
            max_choices=1,
            max_context=self.settings.num_ctx or await self._loaded_context(tag),
            slots=self.settings.slots,
            version=version.version,
            models=tuple(models),
        )

    async def _loaded_context(self, tag: Tag | None) -> int:
        """Tokens of the model's context if it is loaded, else 0: the default is not known."""
        if tag is None:
            return 0
        loaded: Tags = await self.get_json("/api/ps", Tags)
        return next((m.context_length for m in loaded.models or () if m.name == tag.name), 0)

    def error(self, status: int, headers: Mapping[str, str], body: bytes) -> BackendError:
        """What its runner, a llama-server, says stands in it as JSON within a text."""
        with suppress(msgspec.DecodeError, UnicodeDecodeError):
            inner = msgspec.json.decode(body, type=Wrapped).error.encode()
            msgspec.json.decode(inner, type=dict[str, Any])
            body = inner
        return error_of(status, headers, body)

    async def stream(
        self, request: GenerateRequest, attempt: Attempt
    ) -> AsyncGenerator[Event, None]:
        body = body_of(
            request,
            model=self.settings.model or request.model,
            num_ctx=self.settings.num_ctx,
            keep_alive=self.settings.keep_alive,
            neutral=self.settings.neutral_sampling,
        )
        response = await self.post(_PATHS[request.endpoint], msgspec.json.encode(body), attempt)
        try:
            await self._check(response, "application/x-ndjson")
            yield Started()
            reader, chunks = Reader(request), response.chunks()
            async with aclosing(_lines(chunks)) as lines:
                async for text in lines:
                    line = reader.line(text)
                    for delta in reader.deltas(line):
                        yield delta
                    if line.done:
                        await drain(chunks)
                        yield _finished(line)
                        return
            # So ends, too, an answer whose last 30 tokens were the same.
            raise StreamTruncated("the backend's stream ended without saying why")
        finally:
            await response.aclose()

    async def perform(self, request: Operation, attempt: Attempt) -> Result:
        if not isinstance(request, EmbedRequest):
            raise Unsupported(f"Ollama cannot serve {request.endpoint}")
        body = embed_body(
            request,
            model=self.settings.model or request.model,
            num_ctx=self.settings.num_ctx,
            keep_alive=self.settings.keep_alive,
        )
        answer: Vectors = await self.post_json("/api/embed", body, Vectors, attempt)
        if len(answer.embeddings) != len(request.inputs):
            raise BackendGarbage("the backend gave not one vector for each input")
        usage = Usage(answer.prompt_eval_count, 0)
        return Embeddings(tuple(answer.embeddings), usage, answer.model)


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The lines that are not empty; a connection that breaks ends them, as any end does."""
    rest = b""
    with suppress(StreamTruncated):
        async for chunk in chunks:
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > MAX_LINE:
                raise BackendGarbage(f"a line is longer than {MAX_LINE} bytes")
            for line in filter(None, lines):
                yield line


def _cuts_prompts(version: str) -> bool:
    """It does not know `truncate: false` yet; builds from source call themselves 0.0.0."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return found is not None and (0, 0, 0) < tuple(map(int, found.groups())) < (0, 12, 6)


def _endpoints(able: Sequence[str] | None) -> frozenset[Endpoint]:
    """What a model with these capabilities serves; everything if the server does not say."""
    found: set[Endpoint] = set()
    if able is None or "completion" in able:
        found |= {"chat", "completions"}
    if able is None or "embedding" in able:
        found.add("embeddings")
    return frozenset(found)


def _finished(line: Line) -> Finished:
    usage = None
    if line.eval_count or line.prompt_eval_count:
        usage = Usage(line.prompt_eval_count, line.eval_count)
    timings = Timings(
        queue=line.load_duration / 1e9,  # until the model is loaded, the request waits
        prefill=line.prompt_eval_duration / 1e9,
        decode=line.eval_duration / 1e9,
        source="ollama.durations",
    )
    return Finished(usage, timings, model=line.model)


@hookimpl
def adapters() -> Iterable[AdapterKind]:
    return [
        AdapterKind(
            name="ollama",
            settings=OllamaSettings,
            build=OllamaAdapter,
            summary="Ollama's own API: context length, durations, embeddings.",
            provider="ollama",
        )
    ]
