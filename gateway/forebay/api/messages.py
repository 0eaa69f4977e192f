"""Requests and events: the one model of things into which every dialect is translated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Raw, Struct

__all__ = [
    "Attempt",
    "ContentPart",
    "Delta",
    "Endpoint",
    "Event",
    "FinishReason",
    "Finished",
    "GenerateRequest",
    "Identity",
    "ImageUrl",
    "Message",
    "PromptLogprob",
    "Relayed",
    "Sampling",
    "Started",
    "Timeouts",
    "Timings",
    "TokenLogprob",
    "ToolCallDelta",
    "Usage",
]

Endpoint = Literal[
    "chat",
    "completions",
    "embeddings",
    "rerank",
    "score",
    "tokenize",
    "detokenize",
    "infer",
]
FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]


class Identity(Struct, frozen=True):
    """Who asks. ``key`` is the configured name of the API key, never the key itself."""

    key: str = "anonymous"
    tenant: str = "default"


class ImageUrl(Struct, frozen=True, omit_defaults=True):
    """An image: at a URL, or within one (``data:image/png;base64,…``)."""

    url: str
    detail: str | None = None


class ContentPart(Struct, frozen=True, omit_defaults=True):
    """One part of a multi-part message; ``text`` parts carry ``text``, ``image_url`` parts an
    image, and of others nothing but the type is seen."""

    type: str
    text: str | None = None
    image_url: ImageUrl | None = None


class Message(Struct, frozen=True, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | tuple[ContentPart, ...] | None = None
    name: str | None = None
    #: Each call as the client sent it.
    tool_calls: tuple[Raw, ...] | None = None
    tool_call_id: str | None = None
    #: What the assistant thought, by this name or ``reasoning``.
    reasoning_content: str | None = None

    def text(self) -> str:
        """The text of the message, its text parts joined; other parts are not represented."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text or "" for part in self.content)


class Sampling(Struct, frozen=True, kw_only=True):
    """What the client asked for. ``None`` means: not said, the backend's default applies."""

    #: 0: the prompt alone is wanted; only with ``echo``, of backends with ``scoring``.
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    #: None: no logprobs; N: those of the chosen token and of the N likeliest (0: chosen alone).
    logprobs: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False


class GenerateRequest(Struct, frozen=True, kw_only=True):
    """A valid request for text, from either OpenAI endpoint.

    ``fields`` holds every top-level JSON field just as the client sent it, unknown ones too:
    adapters for OpenAI-shaped servers build their body from it with :meth:`openai_body`, so that
    a field Forebay has never heard of still reaches a backend that knows it.
    """

    id: str
    endpoint: Endpoint
    model: str
    #: Unix seconds; the ``created`` of every chunk of the answer.
    created: int
    messages: tuple[Message, ...] = ()
    #: For ``completions``: texts or token ids. Choice ``i`` belongs to prompt ``i // n``.
    prompts: tuple[str | tuple[int, ...], ...] = ()
    sampling: Sampling = Sampling()
    n: int = 1
    stream: bool = False
    #: The client wants the usage chunk (``stream_options.include_usage``).
    include_usage: bool = False
    echo: bool = False
    #: The client does not speak OpenAI's chat or completions dialect: no :class:`Relayed` for it.
    typed: bool = False
    #: The request needs tool calls / a structured answer (``response_format`` beyond text).
    needs_tools: bool = False
    needs_schema: bool = False
    #: Some message has a part that is not text.
    needs_multimodal: bool = False
    fields: Mapping[str, Raw] = {}
    #: Names in ``fields`` that have no counterpart above and may change the answer; only backends
    #: that take them (``Capabilities.extra_fields`` and ``fields``) are asked to.
    extra: tuple[str, ...] = ()
    identity: Identity = Identity()

    @property
    def choices(self) -> int:
        """Number of choices in the answer."""
        return self.n * max(1, len(self.prompts))

    @property
    def return_token_ids(self) -> bool:
        """The client wants the answer's token ids beside its text (vLLM's field of that name)."""
        return self.fields.get("return_token_ids") == Raw(b"true")

    @property
    def media(self) -> str:
        """The type of the first part that is not text (``image_url``); empty if there is none."""
        contents = (message.content for message in self.messages)
        parts = (part for content in contents if isinstance(content, tuple) for part in content)
        return next((part.type for part in parts if part.type != "text"), "")

    def openai_body(self, **changes: object) -> bytes:
        """The client's JSON body with some fields replaced; ``None`` removes a field."""
        body: dict[str, object] = {**self.fields, **changes}
        for name in [name for name, value in changes.items() if value is None]:
            del body[name]
        return msgspec.json.encode(body)


class Timeouts(Struct, frozen=True):
    """Seconds; 0 switches one off (except ``connect``)."""

    connect: Annotated[float, Meta(gt=0)] = 1.0
    """Seconds to open the connection."""
    first_token: Annotated[float, Meta(ge=0)] = 60.0
    """Seconds from sending the request to the first token."""
    inter_token: Annotated[float, Meta(ge=0)] = 15.0
    """Seconds between two tokens."""
    total: Annotated[float, Meta(ge=0)] = 600.0
    """Seconds of the whole attempt."""


class Attempt(Struct, frozen=True, kw_only=True):
    """One try of one request on one backend."""

    #: 1 for the first try.
    number: int = 1
    #: To be sent upstream: ``traceparent``, ``tracestate``, ``x-request-id``. Lower case.
    headers: Mapping[str, str] = {}
    #: The dispatcher enforces all but ``connect``, which the adapter hands to its transport.
    timeouts: Timeouts = Timeouts()


class Usage(Struct, frozen=True):
    """Token counts of the whole answer (all choices). ``cached``: prompt tokens read from cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None
    #: ``counted`` when the backend did not report and Forebay counted.
    source: Literal["reported", "counted"] = "reported"


class Timings(Struct, frozen=True):
    """Seconds a backend says it spent. ``None``: not reported."""

    queue: float | None = None
    prefill: float | None = None
    decode: float | None = None
    #: Where the figures come from, e.g. ``llamacpp.timings``.
    source: str = ""
    #: Prefill and decode together, of a backend that does not tell them apart.
    inference: float | None = None


class TokenLogprob(Struct, frozen=True):
    token: str
    #: None: of a prompt's first token, as ``echo`` repeats it.
    logprob: float | None
    #: The likeliest tokens at this place with their logprobs, best first.
    top: tuple[tuple[str, float], ...] = ()
    #: Where it begins in the choice's text, in characters; None: behind the token before it.
    offset: int | None = None


class PromptLogprob(Struct, frozen=True):
    """A token at a place of the prompt; ``rank`` 1: the likeliest there."""

    token_id: int
    token: str
    logprob: float
    rank: int


class ToolCallDelta(Struct, frozen=True):
    """``id`` and ``name`` come once, with the first piece of a call; ``arguments`` in pieces."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class Started(Struct, frozen=True):
    """The backend has accepted the request. Typed lane only; always first there."""


class Delta(Struct, frozen=True):
    """A piece of choice ``index``. The last piece of a choice carries its ``finish_reason``."""

    index: int = 0
    text: str = ""
    finish_reason: FinishReason | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    #: With the first piece, if asked for (vLLM's ``prompt_logprobs``): of each token of the prompt
    #: but the first, that token, and the likeliest ones.
    prompt_logprobs: tuple[tuple[PromptLogprob, ...], ...] = ()


class Relayed(Struct, frozen=True):
    """Bytes that are already in the client's dialect: the pass-through lane.

    For a stream: one or more whole SSE events, without ``[DONE]`` (the gateway writes that itself
    once ``Finished`` has come). Otherwise: the whole JSON body. ``events`` counts the SSE events.
    """

    data: bytes
    events: int = 1


class Finished(Struct, frozen=True):
    """The answer is complete. Exactly one, always last, in both lanes."""

    usage: Usage | None = None
    timings: Timings | None = None
    #: Of each choice in order; needed on the pass-through lane only.
    finish_reasons: tuple[str, ...] = ()
    #: The model that answered, by the backend's own name for it; empty: it did not say.
    model: str = ""


Event = Started | Delta | Relayed | Finished
