"""Embeddings, ranking and scores in the shapes that OpenAI-like servers share.

``/v1/embeddings`` is OpenAI's, ``/v1/rerank`` follows Jina's and Cohere's, ``/score`` is vLLM's
own. Bodies are built from typed fields; the fields Forebay does not know pass as they came.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from msgspec import Raw, Struct

from forebay.api import (
    Attempt,
    BackendGarbage,
    BackendRefused,
    Embeddings,
    EmbedRequest,
    Message,
    Ranked,
    Ranking,
    RerankRequest,
    ScoreRequest,
    Scores,
    Usage,
)
from forebay_plugins.openai_shape import ReportedUsage
from forebay_plugins.openai_wire import OpenAIServer

__all__ = ["chat_messages", "embed", "extras", "rerank", "score"]


class Vector(Struct):
    embedding: tuple[float, ...]
    index: int


class Vectors(Struct):
    data: list[Vector]
    usage: ReportedUsage | None = None
    model: str | None = None


class Rank(Struct):
    index: int
    relevance_score: float


class Ranks(Struct):
    results: list[Rank]
    usage: ReportedUsage | None = None
    model: str | None = None


class Mark(Struct):
    index: int
    score: float


class Marks(Struct):
    data: list[Mark]
    usage: ReportedUsage | None = None
    model: str | None = None


def extras(fields: Mapping[str, Raw], names: Sequence[str]) -> dict[str, object]:
    """The client's fields of these names, as they came."""
    return {name: fields[name] for name in names}


def chat_messages(messages: Sequence[Message]) -> list[dict[str, object]]:
    """Messages as JSON objects that have no nulls, at which strict servers balk."""
    return [
        {
            name: value
            for name, value in msgspec.structs.asdict(message).items()
            if value is not None
        }
        for message in messages
    ]


async def embed(server: OpenAIServer, request: EmbedRequest, attempt: Attempt) -> Embeddings:
    """``POST /v1/embeddings``.

    :raises BackendError: among others: there is not one vector for each input.
    """
    inputs = request.inputs
    body: dict[str, object] = {
        **extras(request.fields, request.extra),
        "model": server.settings.model or request.model,
        "input": inputs if len(inputs) > 1 else inputs[0],
        "encoding_format": "float",
    }
    if request.dimensions is not None:
        body["dimensions"] = request.dimensions
    answer: Vectors = await server.post_json("/v1/embeddings", body, Vectors, attempt)
    found = {vector.index: vector.embedding for vector in answer.data}
    _complete(found, len(inputs), "vectors")
    if request.dimensions not in (None, len(found[0])):
        raise BackendRefused(
            f"this backend gives vectors of {len(found[0])} dimensions", param="dimensions"
        )
    return Embeddings(
        tuple(found[index] for index in range(len(inputs))),
        _usage(answer.usage),
        answer.model or "",
    )


async def rerank(server: OpenAIServer, request: RerankRequest, attempt: Attempt) -> Ranking:
    """``POST /v1/rerank``."""
    body: dict[str, object] = {
        **extras(request.fields, request.extra),
        "model": server.settings.model or request.model,
        "query": request.query,
        "documents": request.documents,
    }
    if request.top_n is not None:
        body["top_n"] = request.top_n
    answer: Ranks = await server.post_json("/v1/rerank", body, Ranks, attempt)
    ranked = [Ranked(rank.index, rank.relevance_score) for rank in answer.results]
    if not all(0 <= rank.index < len(request.documents) for rank in ranked):
        raise BackendGarbage("the backend ranked a document that it was not given")
    best = sorted(ranked, key=lambda rank: -rank.score)
    return Ranking(tuple(best[: request.top_n]), _usage(answer.usage), answer.model or "")


async def score(server: OpenAIServer, request: ScoreRequest, attempt: Attempt) -> Scores:
    """``POST /score``."""
    body = {
        **extras(request.fields, request.extra),
        "model": server.settings.model or request.model,
        "text_1": [first for first, _ in request.pairs],
        "text_2": [second for _, second in request.pairs],
    }
    answer: Marks = await server.post_json("/score", body, Marks, attempt)
    found = {mark.index: mark.score for mark in answer.data}
    _complete(found, len(request.pairs), "scores")
    return Scores(
        tuple(found[index] for index in range(len(found))), _usage(answer.usage), answer.model or ""
    )


def _complete(found: Mapping[int, object], expected: int, what: str) -> None:
    if set(found) != set(range(expected)):
        raise BackendGarbage(f"the backend gave {len(found)} {what} where {expected} were asked")


def _usage(reported: ReportedUsage | None) -> Usage | None:
    return reported.usage() if reported else None
