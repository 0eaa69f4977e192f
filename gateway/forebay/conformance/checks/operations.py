"""Operations: embeddings, rerank, score, tokenize, detokenize, infer (``docs/operations.md``)."""

from __future__ import annotations

import math
import struct
from base64 import b64decode
from typing import Any, Literal

from msgspec import Struct

from forebay.conformance.answer import Answer, Broken, Lacking, shaped
from forebay.conformance.check import check
from forebay.conformance.talk import PROMPT, Talk

_TEXTS = ["a river in spring", "the price of bread"]
#: Of two vectors that are the same but for rounding and batching.
_ALIKE = 0.999


class Vector(Struct, frozen=True):
    object: Literal["embedding"]
    index: int
    embedding: list[float]


class Spent(Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class Vectors(Struct, frozen=True):
    object: Literal["list"]
    data: list[Vector]
    model: str
    usage: Spent


class Rank(Struct, frozen=True):
    index: int
    relevance_score: float


class Ranks(Struct, frozen=True):
    results: list[Rank]


class Score(Struct, frozen=True):
    index: int
    score: float


class Scores(Struct, frozen=True):
    data: list[Score]


class Tokens(Struct, frozen=True):
    count: int
    tokens: list[int]


class Prompt(Struct, frozen=True):
    prompt: str


@check("operations.embeddings", "A text has a vector, in OpenAI's shape", claim="embeddings")
async def embeddings(talk: Talk) -> None:
    (found,) = await _embed(talk, _TEXTS[0])
    if not any(found) or not all(map(math.isfinite, found)):
        raise Broken("it is zero, or has parts that are no numbers")


@check("operations.embeddings-batch", "Of several texts each has its own vector, in their order")
async def embeddings_batch(talk: Talk) -> None:
    both = await _embed(talk, _TEXTS)
    if len(both) != len(_TEXTS):
        raise Broken(f"{len(both)} vectors for {len(_TEXTS)} texts")
    for text, vector in zip(_TEXTS, both, strict=True):
        (alone,) = await _embed(talk, text)
        if _likeness(alone, vector) < _ALIKE:
            raise Broken(f"of {text!r} alone it is another one")


@check("operations.embeddings-base64", "`base64` is the same vector, as 32-bit floats")
async def embeddings_base64(talk: Talk) -> None:
    (plain,) = await _embed(talk, _TEXTS[0])
    answer = await _ask(talk, "/v1/embeddings", input=_TEXTS[0], encoding_format="base64")
    raw = b64decode(answer.expect("encoding_format").body["data"][0]["embedding"], validate=True)
    packed = struct.unpack(f"<{len(raw) // 4}f", raw)
    if len(packed) != len(plain) or _likeness(plain, packed) < _ALIKE:
        raise Broken("it is another one")


@check("operations.embeddings-dimensions", "`dimensions` is kept to, or refused by name")
async def embeddings_dimensions(talk: Talk) -> None:
    (found,) = await _embed(talk, _TEXTS[0], "dimensions", dimensions=16)
    if len(found) != 16:
        raise Broken(f"asked for 16, got {len(found)}")


@check("operations.embeddings-tokens", "Token ids have a vector, too, or are refused by name")
async def embeddings_tokens(talk: Talk) -> None:
    await _embed(talk, [100, 200, 300], "input", "token")


@check("operations.embeddings-empty", "No input is a 400 that names it")
async def embeddings_empty(talk: Talk) -> None:
    answer = await _ask(talk, "/v1/embeddings", input=[])
    answer.refused("input")


@check("operations.rerank", "All documents are ranked, best first", claim="rerank")
async def rerank(talk: Talk) -> None:
    ranks = await _rank(talk)
    scores = [rank.relevance_score for rank in ranks]
    if sorted(rank.index for rank in ranks) != [0, 1] or scores != sorted(scores, reverse=True):
        raise Broken(f"the ranks are {ranks}")


@check("operations.rerank-top", "`top_n` gives the best")
async def rerank_top(talk: Talk) -> None:
    first, top = (await _rank(talk))[0], await _rank(talk, top_n=1)
    if [rank.index for rank in top] != [first.index]:
        raise Broken(f"the best is {first}, the top {top}")


@check("operations.rerank-documents", "`return_documents` gives them back")
async def rerank_documents(talk: Talk) -> None:
    answer = await _ask(talk, "/v1/rerank", query="bread", documents=_TEXTS, return_documents=True)
    for result in answer.expect("return_documents").body["results"]:
        if result["document"]["text"] != _TEXTS[result["index"]]:
            raise Broken(f"it gives {result['document']}")


@check("operations.score", "Each pair of texts has a score", claim="score")
async def score(talk: Talk) -> None:
    answer = (await _ask(talk, "/v1/score", text_1="bread", text_2=_TEXTS)).expect()
    if [entry.index for entry in answer.read(Scores).data] != [0, 1]:
        raise Broken("they are not in order")


@check("operations.tokenize", "A text has tokens, and as many as are counted", claim="tokenize")
async def tokenize(talk: Talk) -> None:
    found = await _tokens(talk, prompt=PROMPT)
    if not found.tokens or found.count != len(found.tokens):
        raise Broken(f"{len(found.tokens)} tokens, count {found.count}")


@check("operations.tokenize-chat", "A chat has more tokens than its words")
async def tokenize_chat(talk: Talk) -> None:
    words = await _tokens(talk, prompt=PROMPT)
    messages = [{"role": "user", "content": PROMPT}]
    if (await _tokens(talk, "messages", messages=messages)).count <= words.count:
        raise Broken(f"it has no more than {words.count}")


@check("operations.detokenize", "Tokens of a text become the text again", claim="detokenize")
async def detokenize(talk: Talk) -> None:
    for text in (PROMPT, "Straße 東京 😀"):
        tokens = (await _tokens(talk, prompt=text)).tokens
        answer = (await _ask(talk, "/detokenize", tokens=tokens)).expect()
        # What begins a text has a spelling of its own.
        if not answer.read(Prompt).prompt.endswith(text):
            raise Broken(f"{text!r} becomes {answer.read(Prompt).prompt!r}")


@check("operations.infer", "KServe's infer is passed through", claim="infer")
async def infer(talk: Talk) -> None:
    inputs = await _signature(talk)
    answer = await talk.ask(f"/v2/models/{talk.model}/infer", {"inputs": inputs})
    if not answer.expect().body["outputs"]:
        raise Broken("the answer has no outputs")


@check("operations.infer-error", "A mistake in it is a 400 in KServe's shape")
async def infer_error(talk: Talk) -> None:
    body = {"inputs": [{"name": "no-such", "shape": [1], "datatype": "INT32", "data": [1]}]}
    answer = await talk.ask(f"/v2/models/{talk.model}/infer", body)
    if not isinstance(answer.body["error"], str) or answer.status != 400:
        raise Broken(f"{answer.told()}: {answer.raw[:80]!r}")
    if "infer" not in talk.claims.endpoints:
        raise Lacking(answer.body["error"])


async def _signature(talk: Talk) -> list[dict[str, Any]]:
    """Inputs as the model's own description wants them."""
    if "infer" not in talk.claims.endpoints:
        raise Lacking("it does not serve infer")
    backend = talk.backend or talk
    found = (await backend.ask(f"/v2/models/{backend.model}", method="GET")).expect().body
    inputs = []
    for tensor in found["inputs"]:
        shape = [size if size > 0 else 1 for size in tensor["shape"]]
        value = "hello" if tensor["datatype"] == "BYTES" else 1
        data = [value] * math.prod(shape)
        inputs.append(
            {"name": tensor["name"], "datatype": tensor["datatype"], "shape": shape, "data": data}
        )
    return inputs


async def _embed(talk: Talk, given: object, *needs: str, **fields: Any) -> list[list[float]]:
    answer = (await _ask(talk, "/v1/embeddings", input=given, **fields)).expect(*needs)
    found = answer.read(Vectors)
    if [entry.index for entry in found.data] != list(range(len(found.data))):
        raise Broken("they are not numbered in order")
    return [entry.embedding for entry in found.data]


async def _rank(talk: Talk, **fields: Any) -> list[Rank]:
    answer = await _ask(talk, "/v1/rerank", query="bread", documents=_TEXTS, **fields)
    return answer.expect().read(Ranks).results


async def _tokens(talk: Talk, *needs: str, **fields: Any) -> Tokens:
    answer = (await _ask(talk, "/tokenize", **fields)).expect(*needs)
    return shaped(answer.body, Tokens)


async def _ask(talk: Talk, path: str, **fields: Any) -> Answer:
    return await talk.ask(path, {"model": talk.model, **fields})


def _likeness(one: Any, other: Any) -> float:
    """Cosine of the angle between two vectors."""
    lengths = math.hypot(*one) * math.hypot(*other)
    return sum(a * b for a, b in zip(one, other, strict=True)) / lengths if lengths else 0.0
