"""From bytes to a valid operation: embeddings, rerank, score, tokenize, detokenize, infer.

Source of the fields: OpenAI's API reference for embeddings; Cohere's and Jina's for rerank; vLLM's
server for score, tokenize and detokenize; the KServe v2 protocol (Open Inference Protocol) for
infer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw, Struct

from forebay.api import (
    DetokenizeRequest,
    EmbedRequest,
    InferRequest,
    Message,
    RequestError,
    RerankRequest,
    ScoreRequest,
    TokenizeRequest,
)
from forebay.config import Limits
from forebay.http.decode import HARMLESS, extra_fields, parse
from forebay.http.reply import Arrival

# No vocabulary comes near the bound; beyond it a backend could do nothing but fail.
TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]

#: Says how many bytes of the body are JSON; tensors in binary follow (KServe binary extension).
JSON_LENGTH = "inference-header-content-length"
#: Of a KServe v2 request or answer: what is needed to read its body.
BODY_HEADERS = frozenset({"content-encoding", "content-type", JSON_LENGTH})


class _Body(Struct, kw_only=True):
    model: str


class EmbedBody(_Body, kw_only=True):
    # A text, texts, token ids, or lists of token ids; `_inputs` refuses a mixture.
    input: str | tuple[str | TokenId | tuple[TokenId, ...], ...]
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    encoding_format: Literal["float", "base64"] | None = None


class Document(Struct):
    text: str


class RerankBody(_Body, kw_only=True):
    query: str
    documents: tuple[str | Document, ...]
    top_n: Annotated[int, Meta(ge=0)] | None = None
    return_documents: bool | None = None


class ScoreBody(_Body, kw_only=True):
    """The two sides of the pairs, by any of the names that vLLM has for them."""

    text_1: str | tuple[str, ...] | None = None
    text_2: str | tuple[str, ...] | None = None
    data_1: str | tuple[str, ...] | None = None
    data_2: str | tuple[str, ...] | None = None
    queries: str | tuple[str, ...] | None = None
    documents: str | tuple[str, ...] | None = None
    items: str | tuple[str, ...] | None = None


#: Which of them belong together.
_SIDES = (
    ("text_1", "text_2"),
    ("data_1", "data_2"),
    ("queries", "documents"),
    ("queries", "items"),
)


class TokenizeBody(_Body, kw_only=True):
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(_Body, kw_only=True):
    tokens: tuple[TokenId, ...]


class InferBody(Struct):
    """Of its fields only their presence is checked: what they mean is the backend's to say."""

    inputs: tuple[Raw, ...]


def decode_embed(arrival: Arrival, limits: Limits) -> tuple[EmbedRequest, EmbedBody]:
    """Decode ``/v1/embeddings``.

    :raises RequestError: naming the field in ``param``; so all functions here.
    """
    parsed, common = _common(EmbedBody, arrival, limits)
    inputs = _inputs(parsed.input)
    if len(inputs) > limits.inputs:
        raise RequestError(f"at most {limits.inputs} inputs are allowed", param="input")
    return EmbedRequest(inputs=inputs, dimensions=parsed.dimensions, **common), parsed


def _inputs(given: Any) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(given, str):
        return (given,)
    if not given or () in given:
        raise RequestError("must not be an empty list", param="input")
    if len({type(item) for item in given}) > 1:
        raise RequestError("must not mix texts and token ids", param="input")
    return (given,) if isinstance(given[0], int) else given


def decode_rerank(arrival: Arrival, limits: Limits) -> tuple[RerankRequest, RerankBody]:
    """Decode ``/v1/rerank``; ``top_n`` 0 means all, as it does to vLLM."""
    parsed, common = _common(RerankBody, arrival, limits)
    documents = tuple(item if isinstance(item, str) else item.text for item in parsed.documents)
    if not documents:
        raise RequestError("must have at least one document", param="documents")
    if len(documents) > limits.documents:
        raise RequestError(f"at most {limits.documents} are allowed", param="documents")
    request = RerankRequest(
        query=parsed.query, documents=documents, top_n=parsed.top_n or None, **common
    )
    return request, parsed


def decode_score(arrival: Arrival, limits: Limits) -> tuple[ScoreRequest, ScoreBody]:
    """Decode ``/v1/score``: one first text for all second ones, or as many of the one as of the
    other."""
    parsed, common = _common(ScoreBody, arrival, limits)
    names = _sides(parsed)
    first, second = (
        (text,) if isinstance(text, str) else text
        for text in (getattr(parsed, name) for name in names)
    )
    for name, texts in zip(names, (first, second), strict=True):
        if not texts:
            raise RequestError("must not be an empty list", param=name)
        if len(texts) > limits.documents:
            raise RequestError(f"at most {limits.documents} texts are allowed", param=name)
    if len(first) == 1:
        first *= len(second)
    if len(first) != len(second):
        raise RequestError(
            f"has {len(first)} texts and {names[1]} {len(second)}: must have one, or as many",
            param=names[0],
        )
    return ScoreRequest(pairs=tuple(zip(first, second, strict=True)), **common), parsed


def _sides(body: ScoreBody) -> tuple[str, str]:
    """The names by which this client gives its pairs."""
    given = {name for side in _SIDES for name in side if getattr(body, name) is not None}
    for names in _SIDES:
        if given == set(names):
            return names
    choices = ", ".join(f"`{first}` and `{second}`" for first, second in _SIDES)
    raise RequestError(f"give one of: {choices}", param=min(given, default="text_1"))


def decode_tokenize(arrival: Arrival, limits: Limits) -> tuple[TokenizeRequest, TokenizeBody]:
    """Decode ``/tokenize``. Special tokens are added to a text, but by a chat template itself."""
    parsed, common = _common(TokenizeBody, arrival, limits)
    if (parsed.prompt is None) == (parsed.messages is None):
        raise RequestError("give either `prompt` or `messages`", param="prompt")
    messages = parsed.messages or ()
    if parsed.messages is not None and not messages:
        raise RequestError("must have at least one message", param="messages")
    for message in messages:
        if isinstance(message.content, tuple) and any(p.type != "text" for p in message.content):
            raise RequestError("only parts of type `text` can be tokenized", param="messages")
    special = parsed.add_special_tokens
    request = TokenizeRequest(
        text=parsed.prompt,
        chat=messages,
        add_special_tokens=not messages if special is None else special,
        with_texts=bool(parsed.return_token_strs),
        **common,
    )
    return request, parsed


def decode_detokenize(arrival: Arrival, limits: Limits) -> tuple[DetokenizeRequest, DetokenizeBody]:
    """Decode ``/detokenize``."""
    parsed, common = _common(DetokenizeBody, arrival, limits)
    return DetokenizeRequest(tokens=parsed.tokens, **common), parsed


def decode_infer(arrival: Arrival, limits: Limits) -> InferRequest:
    """Decode ``/v2/models/{model}/infer``: the JSON is checked to be some, the rest passed on."""
    headers = {name: value for name, value in arrival.headers.items() if name in BODY_HEADERS}
    fields: Mapping[str, Raw] = {}
    if "content-encoding" not in headers:
        text = arrival.body[: _json_length(headers, arrival.body)]
        _, fields = parse(_DECODERS[InferBody], text, limits)
    path = arrival.parameters
    return InferRequest(
        id=arrival.request_id,
        model="/".join(path[part] for part in ("model", "rest") if part in path),
        version=path.get("version", ""),
        created=arrival.created,
        identity=arrival.identity,
        body=arrival.body,
        headers=headers,
        fields=fields,
    )


def _json_length(headers: Mapping[str, str], body: bytes) -> int:
    length = headers.get(JSON_LENGTH)
    if length is None:
        return len(body)
    if not length.isascii() or not length.isdigit() or int(length) > len(body):
        raise RequestError(
            f"must be a number of bytes, at most the {len(body)} of the body", param=JSON_LENGTH
        )
    return int(length)


_DECODERS: Mapping[type, Any] = {
    kind: msgspec.json.Decoder(kind)
    for kind in (EmbedBody, RerankBody, ScoreBody, TokenizeBody, DetokenizeBody, InferBody)
}


def _common(kind: type[Any], arrival: Arrival, limits: Limits) -> tuple[Any, dict[str, Any]]:
    """The body as this kind, and what every request has."""
    parsed, fields = parse(_DECODERS[kind], arrival.body, limits)
    return parsed, {
        "id": arrival.request_id,
        "model": parsed.model,
        "created": arrival.created,
        "identity": arrival.identity,
        "fields": fields,
        "extra": extra_fields(fields, frozenset(kind.__struct_fields__) | HARMLESS),
    }
