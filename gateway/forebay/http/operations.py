"""The data port's routes for work that is no generation: how each is answered.

Shapes: OpenAI's for embeddings, Cohere's and Jina's for rerank, vLLM's for score, tokenize and
detokenize, KServe v2 for infer.
"""

from __future__ import annotations

import math
import struct
from abc import abstractmethod
from base64 import b64encode
from collections.abc import Callable
from typing import Any

import msgspec

from forebay.api import (
    BackendGarbage,
    Embeddings,
    Endpoint,
    Finished,
    ForebayError,
    Inference,
    Ranking,
    Request,
    Result,
    Scores,
    Text,
    Tokens,
    Usage,
)
from forebay.attempt import Answered, FlightEvent
from forebay.config import Limits
from forebay.http.operations_decode import (
    BODY_HEADERS,
    decode_detokenize,
    decode_embed,
    decode_infer,
    decode_rerank,
    decode_score,
    decode_tokenize,
)
from forebay.http.reply import Arrival, Dialect, Reply, openai_error, public_message


class OneAnswer(Reply):
    """To an operation: one result, nothing streamed."""

    def __init__(self, kind: type[Result]) -> None:
        self._kind = kind
        self._body = b""

    @abstractmethod
    def take(self, result: Any) -> bytes:
        """The body for the result, which is of the kind.

        :raises BackendGarbage: it does not fit the request.
        """

    def add(self, event: FlightEvent) -> None:
        result = event.result if isinstance(event, Answered) else event
        if not isinstance(result, self._kind):
            raise BackendGarbage(
                f"the adapter gave {type(result).__name__} instead of {self._kind.__name__}"
            )
        self._body = self.take(result)

    def body(self, finished: Finished) -> bytes:
        return self._body

    def chunk(self, event: FlightEvent) -> bytes:
        raise TypeError(f"{event!r} is no part of a stream")

    def failure(self, error: ForebayError) -> bytes:
        raise TypeError("there is no stream to break off") from error


class JsonReply(OneAnswer):
    """``encode`` makes the JSON object of the result."""

    def __init__(self, kind: type[Result], encode: Callable[[Any], dict[str, Any]]) -> None:
        super().__init__(kind)
        self._encode = encode

    def take(self, result: Any) -> bytes:
        return msgspec.json.encode(self._encode(result))


class InferReply(OneAnswer):
    """The backend's own bytes, and the headers without which they can't be read."""

    def __init__(self) -> None:
        super().__init__(Inference)

    def take(self, result: Inference) -> bytes:
        self.content_type = result.content_type.encode("latin-1")
        self.headers = [
            (name.encode("latin-1"), value.encode("latin-1"))
            for name, value in result.headers.items()
            if name in BODY_HEADERS and name != "content-type"
        ]
        return result.body


def answer_embed(arrival: Arrival, limits: Limits) -> tuple[Request, Reply]:
    """Vectors as numbers, or in base64 as little-endian 32-bit floats, as was asked for."""
    request, parsed = decode_embed(arrival, limits)
    form = _base64 if parsed.encoding_format == "base64" else tuple

    def encode(result: Embeddings) -> dict[str, Any]:
        _expect(len(result.vectors), len(request.inputs), "vectors", "inputs")
        # A sum is finite if all its parts are, and takes a tenth of the time of looking at each.
        if not all(math.isfinite(sum(vector)) for vector in result.vectors):
            raise BackendGarbage("a vector of the backend's answer has parts that are no numbers")
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": form(vector)}
                for index, vector in enumerate(result.vectors)
            ],
            "model": request.model,
            "usage": _usage(result.usage),
        }

    return request, JsonReply(Embeddings, encode)


def _base64(vector: tuple[float, ...]) -> str:
    try:
        return b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    except OverflowError:
        raise BackendGarbage("a vector's part is too large for a 32-bit float") from None


def answer_rerank(arrival: Arrival, limits: Limits) -> tuple[Request, Reply]:
    """The documents' indexes, best first; the documents themselves if they are asked for."""
    request, parsed = decode_rerank(arrival, limits)

    def encode(result: Ranking) -> dict[str, Any]:
        texts = request.documents
        if any(not 0 <= ranked.index < len(texts) for ranked in result.results):
            raise BackendGarbage(f"the backend ranked a document beyond the {len(texts)} given")
        ranks: list[dict[str, Any]] = [
            {"index": ranked.index, "relevance_score": ranked.score}
            for ranked in result.results[: request.top_n]
        ]
        if parsed.return_documents:
            for rank in ranks:
                rank["document"] = {"text": texts[rank["index"]]}
        return {
            "id": f"rerank-{request.id}",
            "object": "list",
            "model": request.model,
            "results": ranks,
            "usage": _usage(result.usage),
        }

    return request, JsonReply(Ranking, encode)


def answer_score(arrival: Arrival, limits: Limits) -> tuple[Request, Reply]:
    """A score for each pair."""
    request, _ = decode_score(arrival, limits)

    def encode(result: Scores) -> dict[str, Any]:
        _expect(len(result.values), len(request.pairs), "scores", "pairs")
        return {
            "id": f"score-{request.id}",
            "object": "list",
            "created": request.created,
            "model": request.model,
            "data": [
                {"index": index, "object": "score", "score": score}
                for index, score in enumerate(result.values)
            ],
            "usage": _usage(result.usage),
        }

    return request, JsonReply(Scores, encode)


def answer_tokenize(arrival: Arrival, limits: Limits) -> tuple[Request, Reply]:
    """Token ids; their texts if they are asked for, null if the backend does not tell them."""
    request, _ = decode_tokenize(arrival, limits)

    def encode(result: Tokens) -> dict[str, Any]:
        answer: dict[str, Any] = {
            "count": len(result.ids),
            "max_model_len": result.max_model_len or None,
            "tokens": result.ids,
        }
        if request.with_texts:
            answer["token_strs"] = result.texts
        return answer

    return request, JsonReply(Tokens, encode)


def answer_detokenize(arrival: Arrival, limits: Limits) -> tuple[Request, Reply]:
    request, _ = decode_detokenize(arrival, limits)
    return request, JsonReply(Text, lambda result: {"prompt": result.text})


def answer_infer(arrival: Arrival, limits: Limits) -> tuple[Request, Reply]:
    return decode_infer(arrival, limits), InferReply()


def kserve_error(error: ForebayError) -> bytes:
    """KServe v2 knows a message and nothing else."""
    message = public_message(error)
    return msgspec.json.encode({"error": message})


def _expect(found: int, wanted: int, things: str, of: str) -> None:
    if found != wanted:
        raise BackendGarbage(f"the backend answered {found} {things} for {wanted} {of}")


def _usage(usage: Usage | None) -> dict[str, int]:
    """OpenAI's two figures; nothing is generated, so they are the same."""
    tokens = usage.prompt_tokens if usage else 0
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _dialects(
    endpoint: Endpoint,
    decode: Callable[[Arrival, Limits], tuple[Request, Reply]],
    error_body: Callable[[ForebayError], bytes],
    *routes: str,
) -> list[Dialect]:
    return [Dialect(endpoint, route, decode, error_body) for route in routes]


OPERATIONS: tuple[Dialect, ...] = (
    *_dialects("embeddings", answer_embed, openai_error, "/v1/embeddings"),
    *_dialects("rerank", answer_rerank, openai_error, "/v1/rerank", "/rerank", "/v2/rerank"),
    *_dialects("score", answer_score, openai_error, "/v1/score", "/score"),
    *_dialects("tokenize", answer_tokenize, openai_error, "/tokenize", "/v1/tokenize"),
    *_dialects("detokenize", answer_detokenize, openai_error, "/detokenize", "/v1/detokenize"),
    *_dialects(
        "infer",
        answer_infer,
        kserve_error,
        "/v2/models/{model:str}/infer",
        "/v2/models/{model:str}/versions/{version:str}/infer",
        # Of names with a slash, as in `google/gemma-3-270m`.
        "/v2/models/{model:str}/{rest:str}/infer",
        "/v2/models/{model:str}/{rest:str}/versions/{version:str}/infer",
    ),
)
