"""What a vLLM server serves, and the work of it that is no generation (read at 0.32).

Newer servers mount only the routes of their model's task; older ones mount all and refuse, so a
route is believed only after it has answered a small question.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from forebay.api import (
    Attempt,
    BackendError,
    DetokenizeRequest,
    EmbedRequest,
    Endpoint,
    Operation,
    RerankRequest,
    Result,
    ScoreRequest,
    Text,
    TokenizeRequest,
    Tokens,
    Unsupported,
)
from forebay_plugins.openai_operations import chat_messages, embed, extras, rerank, score
from forebay_plugins.openai_wire import OpenAIServer

__all__ = ["perform", "served"]

_ROUTES: Mapping[Endpoint, str] = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "tokenize": "/tokenize",
    "detokenize": "/detokenize",
    "embeddings": "/v1/embeddings",
    "rerank": "/v1/rerank",
    "score": "/score",
}
#: One token's worth of work for each route of a pooling model.
_QUESTIONS: Mapping[Endpoint, Mapping[str, object]] = {
    "embeddings": {"input": "a"},
    "rerank": {"query": "a", "documents": ["a"]},
    "score": {"text_1": "a", "text_2": "a"},
}


class Paths(Struct):
    """Of an OpenAPI description."""

    paths: dict[str, Any]


class Tokenized(Struct):
    tokens: tuple[int, ...]
    max_model_len: int = 0
    token_strs: tuple[str, ...] | None = None


class Detokenized(Struct):
    prompt: str


async def served(server: OpenAIServer, model: str) -> frozenset[Endpoint]:
    """The endpoints that work for this model; asks every route, so once for each version.

    :raises BackendError: the server cannot tell now.
    """
    routes = await _routes(server)
    pooling = {
        name
        for name, question in _QUESTIONS.items()
        if name in routes
        and await server.status("POST", _ROUTES[name], {"model": model, **question}) == 200
    }
    # A server either pools or generates; older ones mount the routes of both.
    absent = {"chat", "completions"} if pooling else set()
    return frozenset(routes - absent - (_QUESTIONS.keys() - pooling))


async def _routes(server: OpenAIServer) -> set[Endpoint]:
    """Those that are mounted, as the server describes itself, or, if it does not, as it answers."""
    try:
        paths = (await server.get_json("/openapi.json", Paths)).paths
    except BackendError:  # --disable-fastapi-docs
        # All take POST alone: 405 for a GET of what is there, 404 of what is not.
        return {name for name, path in _ROUTES.items() if await server.status("GET", path) == 405}
    return {name for name, path in _ROUTES.items() if path in paths}


async def perform(server: OpenAIServer, request: Operation, attempt: Attempt) -> Result:
    """As :meth:`forebay.api.Adapter.perform`."""
    match request:
        case EmbedRequest():
            return await embed(server, request, attempt)
        case RerankRequest():
            return await rerank(server, request, attempt)
        case ScoreRequest():
            return await score(server, request, attempt)
        case TokenizeRequest():
            return await _tokenize(server, request, attempt)
        case DetokenizeRequest():
            model = server.settings.model or request.model
            body = {**extras(request.fields, request.extra), "model": model}
            body["tokens"] = request.tokens
            said = await server.post_json("/detokenize", body, Detokenized, attempt)
            return Text(said.prompt)
    raise Unsupported(f"vLLM cannot serve {request.endpoint}")


async def _tokenize(server: OpenAIServer, request: TokenizeRequest, attempt: Attempt) -> Tokens:
    body = {
        **extras(request.fields, request.extra),
        "model": server.settings.model or request.model,
        "add_special_tokens": request.add_special_tokens,
    }
    if request.text is None:
        body["messages"] = chat_messages(request.chat)
    else:
        body["prompt"] = request.text
    if request.with_texts:
        body["return_token_strs"] = True
    said: Tokenized = await server.post_json("/tokenize", body, Tokenized, attempt)
    return Tokens(said.tokens, said.token_strs, said.max_model_len)
