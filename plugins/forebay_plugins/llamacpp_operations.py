"""The work of `llama-server` that is no generation, whose fields are its own (tag b11434)."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from forebay.api import (
    Attempt,
    BackendRefused,
    DetokenizeRequest,
    EmbedRequest,
    Endpoint,
    Operation,
    RerankRequest,
    Result,
    Text,
    TokenizeRequest,
    Tokens,
    Unsupported,
)
from forebay_plugins.openai_operations import chat_messages, embed, extras, rerank
from forebay_plugins.openai_wire import OpenAIServer

__all__ = ["perform", "served"]

_ALWAYS: frozenset[Endpoint] = frozenset({"chat", "completions", "tokenize", "detokenize"})
#: Routes that work only if the server was started for them; it then refuses an empty question.
_OPTIONAL: Mapping[Endpoint, str] = {"rerank": "/v1/rerank", "embeddings": "/v1/embeddings"}


class Piece(Struct):
    id: int
    #: Bytes, if they are no UTF-8 by themselves.
    piece: str | list[int]

    def text(self) -> str:
        if isinstance(self.piece, str):
            return self.piece
        return bytes(self.piece).decode(errors="replace")


class Tokenized(Struct):
    tokens: list[Piece]


class Detokenized(Struct):
    content: str


class Template(Struct):
    prompt: str


async def served(server: OpenAIServer) -> frozenset[Endpoint]:
    """What the server was started for: it answers 501, or 404 if it is old, to the rest.

    :raises BackendError: it cannot tell now.
    """
    for name, path in _OPTIONAL.items():
        if await server.status("POST", path, {}) not in (404, 405, 501):
            # A server for reranking answers embeddings too, which are all zeros.
            return _ALWAYS | {name}
    return _ALWAYS


async def perform(
    server: OpenAIServer, request: Operation, attempt: Attempt, context_size: int
) -> Result:
    """As :meth:`forebay.api.Adapter.perform`; ``context_size`` in tokens, 0: not known."""
    match request:
        case EmbedRequest(dimensions=None):
            return await embed(server, request, attempt)
        case EmbedRequest():
            raise BackendRefused(
                "the llama.cpp backend cannot shorten its vectors", param="dimensions"
            )
        case RerankRequest():
            return await rerank(server, request, attempt)
        case TokenizeRequest():
            return await _tokenize(server, request, attempt, context_size)
        case DetokenizeRequest():
            body = {**extras(request.fields, request.extra), "tokens": request.tokens}
            said: Detokenized = await server.post_json("/detokenize", body, Detokenized, attempt)
            return Text(said.content)
    raise Unsupported(f"llama.cpp cannot serve {request.endpoint}")


async def _tokenize(
    server: OpenAIServer, request: TokenizeRequest, attempt: Attempt, context_size: int
) -> Tokens:
    more = extras(request.fields, request.extra)
    text, special = request.text, request.add_special_tokens
    if text is None:
        chat = {**more, "messages": chat_messages(request.chat)}
        templated: Template = await server.post_json("/apply-template", chat, Template, attempt)
        # The server has cut the first token off, which it adds again to every prompt.
        text, special, more = templated.prompt, True, {}
    body = {**more, "content": text, "add_special": special, "with_pieces": True}
    said: Tokenized = await server.post_json("/tokenize", body, Tokenized, attempt)
    return Tokens(
        ids=tuple(piece.id for piece in said.tokens),
        texts=tuple(piece.text() for piece in said.tokens) if request.with_texts else None,
        max_model_len=context_size,
    )
