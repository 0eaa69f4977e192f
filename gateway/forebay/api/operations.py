"""Work that is no generation of text: one question, one answer, nothing streamed.

Each request type has an ``endpoint`` of the same name in ``Capabilities.endpoints``, and one result
type. An adapter serves them in :meth:`forebay.api.Adapter.perform`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import msgspec
from msgspec import Raw, Struct

from forebay.api.messages import Endpoint, GenerateRequest, Identity, Message, Sampling, Usage

__all__ = [
    "DetokenizeRequest",
    "EmbedRequest",
    "Embeddings",
    "InferRequest",
    "Inference",
    "Operation",
    "Ranked",
    "Ranking",
    "Request",
    "RerankRequest",
    "Result",
    "ScoreRequest",
    "Scores",
    "Text",
    "TokenizeRequest",
    "Tokens",
]


class _Request(Struct, frozen=True, kw_only=True):
    """What dispatch reads of any request; named as in :class:`forebay.api.GenerateRequest`."""

    id: str
    model: str
    #: Unix seconds.
    created: int
    fields: Mapping[str, Raw] = {}
    extra: tuple[str, ...] = ()
    identity: Identity = Identity()

    stream: ClassVar[bool] = False
    needs_tools: ClassVar[bool] = False
    needs_schema: ClassVar[bool] = False
    needs_multimodal: ClassVar[bool] = False
    sampling: ClassVar[Sampling] = Sampling()
    messages: ClassVar[tuple[Message, ...]] = ()
    prompts: ClassVar[tuple[str | tuple[int, ...], ...]] = ()
    choices: ClassVar[int] = 1

    def openai_body(self, **changes: object) -> bytes:
        """The client's JSON body with some fields replaced; ``None`` removes a field."""
        body: dict[str, object] = {**self.fields, **changes}
        return msgspec.json.encode({k: v for k, v in body.items() if v is not None})


class EmbedRequest(_Request, frozen=True, kw_only=True):
    endpoint: ClassVar[Endpoint] = "embeddings"

    inputs: tuple[str | tuple[int, ...], ...]
    #: Length of the vectors; None: the model's own.
    dimensions: int | None = None


class RerankRequest(_Request, frozen=True, kw_only=True):
    endpoint: ClassVar[Endpoint] = "rerank"

    query: str
    documents: tuple[str, ...]
    #: How many to return, best first; None: all.
    top_n: int | None = None


class ScoreRequest(_Request, frozen=True, kw_only=True):
    """Pairs of texts to be scored by a cross-encoder."""

    endpoint: ClassVar[Endpoint] = "score"

    pairs: tuple[tuple[str, str], ...]


class TokenizeRequest(_Request, frozen=True, kw_only=True):
    """``text``, or, if that is None, ``chat`` under the model's chat template."""

    endpoint: ClassVar[Endpoint] = "tokenize"

    text: str | None = None
    chat: tuple[Message, ...] = ()
    add_special_tokens: bool = True
    #: The texts of the tokens are asked for as well.
    with_texts: bool = False


class DetokenizeRequest(_Request, frozen=True, kw_only=True):
    endpoint: ClassVar[Endpoint] = "detokenize"

    tokens: tuple[int, ...]


class InferRequest(_Request, frozen=True, kw_only=True):
    """A KServe v2 inference request, passed through: ``POST /v2/models/{model}/infer``."""

    endpoint: ClassVar[Endpoint] = "infer"

    #: The body as it came, JSON with or without binary tensors behind it.
    body: bytes
    version: str = ""
    #: ``inference-header-content-length`` and the like; lower case.
    headers: Mapping[str, str] = {}


Operation = (
    EmbedRequest | RerankRequest | ScoreRequest | TokenizeRequest | DetokenizeRequest | InferRequest
)


class Embeddings(Struct, frozen=True):
    """One vector for each input, in order."""

    vectors: tuple[tuple[float, ...], ...]
    usage: Usage | None = None
    #: As in :class:`forebay.api.Finished`.
    model: str = ""


class Ranked(Struct, frozen=True):
    #: Into ``RerankRequest.documents``.
    index: int
    score: float


class Ranking(Struct, frozen=True):
    """Best first."""

    results: tuple[Ranked, ...]
    usage: Usage | None = None
    #: As in :class:`forebay.api.Finished`.
    model: str = ""


class Scores(Struct, frozen=True):
    """One for each pair, in order."""

    values: tuple[float, ...]
    usage: Usage | None = None
    #: As in :class:`forebay.api.Finished`.
    model: str = ""


class Tokens(Struct, frozen=True):
    ids: tuple[int, ...]
    #: The tokens as texts; None: the backend does not say.
    texts: tuple[str, ...] | None = None
    #: The model's context; 0: not known.
    max_model_len: int = 0
    usage: Literal[None] = None
    model: str = ""


class Text(Struct, frozen=True):
    text: str
    usage: Literal[None] = None
    model: str = ""


class Inference(Struct, frozen=True):
    """The answer of a KServe v2 server, as it came."""

    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = {}
    usage: Literal[None] = None
    model: str = ""


Request = GenerateRequest | Operation
Result = Embeddings | Ranking | Scores | Tokens | Text | Inference
