"""Work that is no generation, from the client's socket to the adapter's ``perform`` and back."""

from __future__ import annotations

import asyncio
import json
import struct
from base64 import b64decode
from collections.abc import AsyncIterator, Awaitable, Callable

import openai
import pytest

from forebay.access import hash_of
from forebay.api import (
    Adapter,
    AdapterContext,
    AdapterKind,
    Attempt,
    BackendFailed,
    BackendRefused,
    BackendSettings,
    Capabilities,
    ConnectFailed,
    DetokenizeRequest,
    Embeddings,
    EmbedRequest,
    Event,
    GenerateRequest,
    Inference,
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
    Usage,
    hookimpl,
)
from forebay.config import Config, Key, Limits, Model

ALL = frozenset({"embeddings", "rerank", "score", "tokenize", "detokenize", "infer"})
#: Needs all bits of a 32-bit float, and not one more.
EXACT = struct.unpack("<3f", struct.pack("<3f", 0.1, -2.5e-7, 3.0))
Work = Callable[[Operation], Awaitable[Result]]


class Worker(Adapter):
    """Performs by ``work``; remembers what it was asked, and how much is under way."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.capabilities = Capabilities(endpoints=ALL)
        self.requests: list[Operation] = []
        self.attempts: list[Attempt] = []
        self.open = 0
        self.work: Work = default_work

    def stream(self, request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        raise AssertionError("nobody asked for text")

    async def perform(self, request: Operation, attempt: Attempt) -> Result:
        self.requests.append(request)
        self.attempts.append(attempt)
        self.open += 1
        try:
            return await self.work(request)
        finally:
            self.open -= 1

    async def probe(self) -> Capabilities:
        return self.capabilities


async def default_work(request: Operation) -> Result:
    match request:
        case EmbedRequest():
            return Embeddings((EXACT,) * len(request.inputs), Usage(7, 0))
        case RerankRequest():
            ranks = [Ranked(i, 1 / (i + 1)) for i in range(len(request.documents))]
            return Ranking(tuple(ranks), Usage(9, 0))
        case ScoreRequest():
            return Scores(tuple(float(len(a) + len(b)) for a, b in request.pairs), Usage(5, 0))
        case TokenizeRequest():
            return Tokens((2, 7), ("<bos>", "a"), 4096)
        case DetokenizeRequest():
            return Text("".join(map(chr, request.tokens)))
        case InferRequest():
            return Inference(b'{"outputs":[]}')


class Workers:
    """Offers adapter ``worker`` and remembers each one built, by backend name."""

    def __init__(self, prepare: Callable[[Worker], None] = lambda worker: None) -> None:
        self.built: dict[str, Worker] = {}
        self._prepare = prepare

    def _build(self, settings: BackendSettings, context: AdapterContext) -> Adapter:
        worker = self.built[context.name] = Worker(context.name)
        self._prepare(worker)
        return worker

    @hookimpl
    def adapters(self) -> list[AdapterKind]:
        return [AdapterKind(name="worker", settings=BackendSettings, build=self._build)]

    def __getitem__(self, name: str) -> Worker:
        return self.built[name]


def config(*backends: str, policy: str = "round_robin", **changes: object) -> Config:
    names = backends or ("a",)
    return Config(
        backends={name: BackendSettings(adapter="worker", max_in_flight=1) for name in names},
        models={"m": Model(backends=list(names), policy=policy)},
        **changes,
    )


@pytest.fixture
def workers() -> Workers:
    return Workers()


@pytest.fixture
def serve(serve_gateway, workers):
    async def start(settings: Config, plugin: Workers = workers):
        return await serve_gateway(settings, extra={"worker": plugin})

    return start


def sdk(gateway) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0)


async def test_embeddings_through_the_openai_client(serve, workers) -> None:
    gateway = await serve(config())
    async with sdk(gateway) as client:
        # The client asks for base64 unless it is told otherwise, and decodes what comes.
        silent = await client.embeddings.create(model="m", input=["x", "y"])
        plain = await client.embeddings.create(model="m", input="x", encoding_format="float")
        raw = await client.embeddings.create(
            model="m", input=[[1, 2], [3]], encoding_format="base64", dimensions=3, user="u"
        )
    assert [tuple(item.embedding) for item in silent.data] == [EXACT, EXACT]
    assert [item.index for item in silent.data] == [0, 1]
    assert tuple(plain.data[0].embedding) == EXACT
    assert struct.unpack("<3f", b64decode(raw.data[0].embedding)) == EXACT  # type: ignore[arg-type]
    assert (plain.object, plain.model, plain.data[0].object) == ("list", "m", "embedding")
    assert (plain.usage.prompt_tokens, plain.usage.total_tokens) == (7, 7)
    first, second, third = workers["a"].requests
    assert (first.inputs, second.inputs, third.inputs) == (("x", "y"), ("x",), ((1, 2), (3,)))
    assert (first.dimensions, third.dimensions, third.extra) == (None, 3, ())


async def test_embeddings_are_numbers_by_default_and_ids_one_input(serve, workers) -> None:
    gateway = await serve(config())
    async with gateway.client() as client:
        body = {"model": "m", "input": [5, 6], "truncate_prompt_tokens": 4}
        response = await client.post("/v1/embeddings", json=body)
    assert response.json()["data"] == [
        {"object": "embedding", "index": 0, "embedding": list(EXACT)}
    ]
    assert workers["a"].requests[0].inputs == ((5, 6),)
    assert workers["a"].requests[0].extra == ("truncate_prompt_tokens",)
    assert json.loads(workers["a"].requests[0].openai_body(model="n"))["model"] == "n"
    assert response.headers["x-forebay-backend"] == "a"
