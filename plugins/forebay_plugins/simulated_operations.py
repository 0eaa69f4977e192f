"""What the simulated backend answers to work that is no generation: made up, but always the same.

Texts are alike as far as they share words. Vectors come from a hash, so equal inputs have equal
vectors and all others have nothing in common. For the tokenizer a token is a byte of UTF-8, so that
any simulated backend can turn back what another has made.
"""

from __future__ import annotations

import math
import struct
from hashlib import shake_256

from forebay.api import (
    BackendRefused,
    DetokenizeRequest,
    Embeddings,
    EmbedRequest,
    Endpoint,
    InferRequest,
    Message,
    Operation,
    Ranked,
    Ranking,
    RerankRequest,
    Result,
    ScoreRequest,
    Scores,
    Text,
    TokenizeRequest,
    Tokens,
    Unsupported,
    Usage,
)

ENDPOINTS: frozenset[Endpoint] = frozenset(
    {"embeddings", "rerank", "score", "tokenize", "detokenize"}
)
#: Length of a vector whose client does not say.
DIMENSIONS = 64
LONGEST = 8192


def words(request: Operation) -> int:
    """How many words have to be read for it; an id counts as one."""
    match request:
        case EmbedRequest():
            return sum(_length(item) for item in request.inputs)
        case RerankRequest():
            query = _length(request.query)
            return sum(query + _length(document) for document in request.documents)
        case ScoreRequest():
            return sum(_length(first) + _length(second) for first, second in request.pairs)
    return 0


def perform(request: Operation) -> Result:
    """The result.

    :raises BackendRefused: vectors are too long, or the request names tokens that there are not.
    """
    usage = Usage(words(request), 0)
    match request:
        case EmbedRequest():
            length = request.dimensions or DIMENSIONS
            if length > LONGEST:
                raise BackendRefused(
                    f"the simulated backend's vectors have {LONGEST} parts at most",
                    param="dimensions",
                )
            return Embeddings(tuple(_vector(item, length) for item in request.inputs), usage)
        case RerankRequest():
            scores = [_likeness(request.query, document) for document in request.documents]
            order = sorted(range(len(scores)), key=lambda index: -scores[index])[: request.top_n]
            return Ranking(tuple(Ranked(index, scores[index]) for index in order), usage)
        case ScoreRequest():
            return Scores(tuple(_likeness(*pair) for pair in request.pairs), usage)
        case TokenizeRequest():
            text = _chat(request.chat) if request.text is None else request.text
            ids = tuple(text.encode())
            return Tokens(ids, tuple(map(_token_text, ids)) if request.with_texts else None)
        case DetokenizeRequest():
            return Text(_text(request.tokens))
        case InferRequest():
            raise Unsupported("the simulated backend has no models for infer")


def _length(item: str | tuple[int, ...]) -> int:
    return len(item.split()) if isinstance(item, str) else len(item)


def _vector(item: str | tuple[int, ...], length: int) -> tuple[float, ...]:
    """Of Euclidean length 1."""
    digest = shake_256(repr(item).encode()).digest(4 * length)
    # Odd, so that none is 0 and a vector of any length can be made one of length 1.
    parts = [number | 1 for number in struct.unpack(f"<{length}i", digest)]
    norm = math.hypot(*parts)
    return tuple(part / norm for part in parts)


def _likeness(first: str, second: str) -> float:
    """Share of the words of both that are words of each, 0 to 1."""
    one, other = (set(text.lower().split()) for text in (first, second))
    return len(one & other) / len(one | other) if one | other else 1.0


def _chat(messages: tuple[Message, ...]) -> str:
    lines = [f"{message.role}: {message.text()}\n" for message in messages]
    return "".join(lines) + "assistant:"


def _token_text(token: int) -> str:
    return chr(token) if token < 128 else f"<0x{token:02X}>"


def _text(tokens: tuple[int, ...]) -> str:
    if tokens and max(tokens) > 255:
        raise BackendRefused(
            f"the simulated backend has tokens 0 to 255, not {max(tokens)}", param="tokens"
        )
    return bytes(tokens).decode(errors="replace")
