"""Work that is no generation, from the client's socket to the adapter's ``perform`` and back."""

from __future__ import annotations

import asyncio
import json
import struct
from base64 import b64decode
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
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
from forebay.config import Config, Key, Limits, Model, Tracing
from forebay_plugins.simulated import SimulatedSettings

ALL = frozenset({"embeddings", "rerank", "score", "tokenize", "detokenize", "infer"})
#: Numbers that a 32-bit float holds exactly.
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
            return Embeddings((EXACT,) * len(request.inputs), Usage(7, 0), model="embedder")
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


async def test_rerank_ranks_and_shows_documents_if_asked(serve, workers) -> None:
    gateway = await serve(config())
    body = {"model": "m", "query": "q", "documents": ["x", {"text": "y"}, "z"], "top_n": 2}
    async with gateway.client() as client:
        bare = await client.post("/v1/rerank", json=body)
        full = await client.post("/rerank", json={**body, "return_documents": True, "top_n": 0})
        cohere = await client.post("/v2/rerank", json=body)
    assert bare.json() == {
        "id": f"rerank-{bare.headers['x-request-id']}",
        "object": "list",
        "model": "m",
        "results": [
            {"index": 0, "relevance_score": 1.0},
            {"index": 1, "relevance_score": 0.5},
        ],
        "usage": {"prompt_tokens": 9, "total_tokens": 9},
    }
    shown = [result["document"] for result in full.json()["results"]]
    assert shown == [{"text": "x"}, {"text": "y"}, {"text": "z"}]
    assert cohere.json()["results"] == bare.json()["results"]
    first, second, _ = workers["a"].requests
    assert (first.query, first.documents, first.top_n) == ("q", ("x", "y", "z"), 2)
    assert second.top_n is None


@pytest.mark.parametrize(
    ("first", "second", "pairs"),
    [
        ("a", "bb", [("a", "bb")]),
        ("a", ["b", "c"], [("a", "b"), ("a", "c")]),
        (["a"], ["b", "c"], [("a", "b"), ("a", "c")]),
        (["a", "b"], ["c", "d"], [("a", "c"), ("b", "d")]),
    ],
)
async def test_scores_are_of_pairs(serve, workers, first, second, pairs) -> None:
    gateway = await serve(config())
    async with gateway.client() as client:
        body = {"model": "m", "text_1": first, "text_2": second}
        answers = [await client.post(path, json=body) for path in ("/v1/score", "/score")]
        for one, other in (("queries", "documents"), ("queries", "items"), ("data_1", "data_2")):
            body = {"model": "m", one: first, other: second}
            answers.append(await client.post("/v1/score", json=body))
    assert [list(request.pairs) for request in workers["a"].requests] == [pairs] * 5
    for answer in answers:
        assert answer.json()["data"] == [
            {"index": index, "object": "score", "score": len(a) + len(b)}
            for index, (a, b) in enumerate(pairs)
        ]
        assert answer.json()["usage"] == {"prompt_tokens": 5, "total_tokens": 5}


async def test_tokens_of_texts_and_chats_and_back(serve, workers) -> None:
    gateway = await serve(config())
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    async with gateway.client() as client:
        plain = await client.post("/tokenize", json={"model": "m", "prompt": "a"})
        named = await client.post(
            "/v1/tokenize",
            json={"model": "m", "messages": messages, "return_token_strs": True},
        )
        text = await client.post("/detokenize", json={"model": "m", "tokens": [72, 105]})
        empty = await client.post("/v1/detokenize", json={"model": "m", "tokens": []})
    assert plain.json() == {"count": 2, "max_model_len": 4096, "tokens": [2, 7]}
    assert named.json()["token_strs"] == ["<bos>", "a"]
    assert (text.json(), empty.json()) == ({"prompt": "Hi"}, {"prompt": ""})
    first, second, *_ = workers["a"].requests
    assert (first.text, first.chat, first.add_special_tokens, first.with_texts) == (
        "a", (), True, False,
    )  # fmt: skip
    assert (second.text, second.add_special_tokens, second.with_texts) == (None, False, True)
    assert [Message.text(message) for message in second.chat] == ["hi"]


async def test_infer_passes_json_and_tensors_through(serve, workers) -> None:
    gateway = await serve(config())
    head = b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","parameters":{}}]}'
    answer = Inference(
        b'{"outputs":[]}\x00\xff',
        "application/octet-stream",
        {"inference-header-content-length": "14", "x-private": "1", "content-type": "no"},
    )

    async def work(request: Operation) -> Result:
        return answer

    async with gateway.client() as client:
        plain = await client.post("/v2/models/m/infer", content=head)
        workers["a"].work = work
        binary = await client.post(
            "/v2/models/m/versions/3/infer",
            content=head + b"\x00\x01\xff[[[",
            headers={
                "inference-header-content-length": str(len(head)),
                "content-type": "application/octet-stream",
                "authorization": "Bearer secret",
            },
        )
    assert (plain.content, plain.headers["content-type"]) == (b'{"outputs":[]}', "application/json")
    assert binary.content == answer.body
    assert binary.headers["content-type"] == "application/octet-stream"
    assert binary.headers["inference-header-content-length"] == "14"
    assert "x-private" not in binary.headers
    first, second = workers["a"].requests
    assert (first.body, first.version, first.model) == (head, "", "m")
    assert (second.body[-4:], second.version) == (b"\xff[[[", "3")
    assert second.headers == {
        "inference-header-content-length": str(len(head)),
        "content-type": "application/octet-stream",
    }


async def test_infer_with_names_that_have_a_slash(serve, workers) -> None:
    plain = config()
    gateway = await serve(
        msgspec.structs.replace(plain, models={"google/gemma": plain.models["m"]})
    )
    async with gateway.client() as client:
        for path in ("google/gemma/infer", "google/gemma/versions/3/infer", "google%2Fgemma/infer"):
            answer = await client.post(f"/v2/models/{path}", json={"inputs": []})
            assert answer.status_code == 200
        unknown = await client.post("/v2/models/google/none/infer", json={"inputs": []})
    assert unknown.status_code == 404
    asked = [(request.model, request.version) for request in workers["a"].requests]
    assert asked == [("google/gemma", ""), ("google/gemma", "3"), ("google/gemma", "")]


REFUSALS = (
    ("/v1/embeddings", {}, "input", "missing"),
    ("/v1/embeddings", {"input": []}, "input", "empty"),
    ("/v1/embeddings", {"input": [[]]}, "input", "empty"),
    ("/v1/embeddings", {"input": ["a", 1]}, "input", "mix"),
    ("/v1/embeddings", {"input": ["a", [1]]}, "input", "mix"),
    ("/v1/embeddings", {"input": [-1]}, "input[0]", ">= 0"),
    ("/v1/embeddings", {"input": ["x"] * 5}, "input", "at most 4"),
    ("/v1/embeddings", {"input": "x", "dimensions": 0}, "dimensions", ">= 1"),
    ("/v1/embeddings", {"input": "x", "encoding_format": "hex"}, "encoding_format", "hex"),
    ("/v1/rerank", {"documents": ["a"]}, "query", "missing"),
    ("/v1/rerank", {"query": "q", "documents": []}, "documents", "at least one"),
    ("/v1/rerank", {"query": "q", "documents": ["a"] * 4}, "documents", "at most 3"),
    ("/v1/rerank", {"query": "q", "documents": [{}]}, "documents[0].text", "missing"),
    ("/v1/rerank", {"query": "q", "documents": ["a"], "top_n": -1}, "top_n", ">= 0"),
    ("/v1/score", {"text_1": [], "text_2": "a"}, "text_1", "empty"),
    ("/v1/score", {"text_1": "a", "text_2": []}, "text_2", "empty"),
    ("/v1/score", {"text_1": "a", "text_2": ["b"] * 4}, "text_2", "at most 3"),
    ("/v1/score", {"text_1": ["a", "b"], "text_2": "c"}, "text_1", "as many"),
    ("/v1/score", {}, "text_1", "give one of"),
    ("/v1/score", {"text_1": "a", "documents": "b"}, "documents", "give one of"),
    ("/v1/score", {"queries": "a", "documents": "b", "items": "c"}, "documents", "give one of"),
    ("/tokenize", {}, "prompt", "either"),
    ("/tokenize", {"prompt": "a", "messages": []}, "prompt", "either"),
    ("/tokenize", {"messages": []}, "messages", "at least one"),
    (
        "/tokenize",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages",
        "`text`",
    ),
    ("/detokenize", {"tokens": ["a"]}, "tokens[0]", "int"),
    ("/detokenize", {"tokens": [1, 2**70]}, "tokens[1]", "int"),
)


async def test_each_refusal_names_its_field(serve, workers) -> None:
    gateway = await serve(config(limits=Limits(inputs=4, documents=3)))
    async with gateway.client() as client:
        for path, body, param, says in REFUSALS:
            response = await client.post(path, json={"model": "m", **body})
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, param), (path, body)
            assert says in error["message"]
        nameless = await client.post("/v1/embeddings", json={"input": "x"})
    assert (nameless.status_code, nameless.json()["error"]["param"]) == (400, "model")
    assert workers["a"].requests == []


async def test_infer_refuses_in_the_shape_of_kserve(serve, workers) -> None:
    keys = {"team": Key(hash=hash_of("secret"))}
    gateway = await serve(config(keys=keys))
    path, key = "/v2/models/m/infer", {"authorization": "Bearer secret"}
    too_long = {**key, "inference-header-content-length": "99"}
    async with gateway.client(headers=key) as client:
        answers = [
            await client.post("/v2/models/none/infer", json={"inputs": []}),
            await client.post(path, json={}),
            await client.post(path, content=b"\x00"),
            await client.post(path, content=b"{}", headers=too_long),
            await client.get(path),
            await client.post(path, json={}, headers={"authorization": "Bearer wrong"}),
        ]
    assert [answer.status_code for answer in answers] == [404, 400, 400, 400, 405, 401]
    for answer in answers:
        assert answer.json().keys() == {"error"}
        assert isinstance(answer.json()["error"], str)
    assert "inputs" in answers[1].json()["error"]
    assert answers[3].json()["error"].startswith("inference-header-content-length: ")
    assert "/v2/models/{model}/infer takes POST" in answers[4].json()["error"]
    assert workers["a"].requests == []


async def test_another_backend_answers_if_the_first_fails(serve, workers) -> None:
    gateway = await serve(config("a", "b"))

    async def broken(request: Operation) -> Result:
        raise ConnectFailed("nobody listens")

    workers["a"].work = broken
    async with sdk(gateway) as client:
        for _ in range(2):
            answer = await client.embeddings.with_raw_response.create(model="m", input="x")
            assert answer.headers["x-forebay-backend"] == "b"
            assert tuple(answer.parse().data[0].embedding) == EXACT
    assert [attempt.number for attempt in workers["a"].attempts] == [1]
    assert sorted(attempt.number for attempt in workers["b"].attempts) == [1, 2]


@pytest.mark.parametrize(
    ("error", "status", "attempts"),
    [
        (BackendRefused("too many", status=422, param="dimensions"), 422, 1),
        (BackendFailed("broken"), 502, 2),
        (ValueError("a bug"), 502, 2),
    ],
)
async def test_errors_reach_the_client(serve, workers, error, status, attempts) -> None:
    gateway = await serve(config("a", "b"))

    async def work(request: Operation) -> Result:
        raise error

    workers["a"].work = workers["b"].work = work
    async with gateway.client() as client:
        response = await client.post("/v1/embeddings", json={"model": "m", "input": "x"})
        kserve = await client.post("/v2/models/m/infer", json={"inputs": []})
    assert (response.status_code, kserve.status_code) == (status, status)
    assert response.headers["x-forebay-attempts"] == str(attempts)
    assert response.json()["error"]["param"] == ("dimensions" if status == 422 else None)
    assert isinstance(kserve.json()["error"], str)


@pytest.mark.parametrize(
    ("path", "body", "result"),
    [
        ("/v1/embeddings", {"input": ["a", "b"]}, Embeddings((EXACT,))),
        ("/v1/embeddings", {"input": "a"}, Embeddings(((1.0, float("nan")),))),
        ("/v1/embeddings", {"input": "a", "encoding_format": "base64"}, Embeddings(((1e39,),))),
        ("/v1/embeddings", {"input": "a"}, Text("no vector")),
        ("/v1/rerank", {"query": "q", "documents": ["a"]}, Ranking((Ranked(1, 0.5),))),
        ("/v1/score", {"text_1": "a", "text_2": "b"}, Scores(())),
        ("/v2/models/m/infer", {"inputs": []}, Text("no inference")),
    ],
)
async def test_an_answer_that_does_not_fit_is_garbage(serve, workers, path, body, result) -> None:
    gateway = await serve(config())

    async def work(request: Operation) -> Result:
        return result

    workers["a"].work = work
    async with gateway.client() as client:
        response = await client.post(path, json={"model": "m", **body})
        after = gateway.app.fleet.backends["a"]
    assert response.status_code == 502
    assert (after.failures, after.in_flight) == (1, 0)


async def test_requests_wait_for_their_turn_and_leave_with_their_client(serve, workers) -> None:
    gateway = await serve(config())
    go = asyncio.Event()

    async def slow(request: Operation) -> Result:
        await go.wait()
        return await default_work(request)

    workers["a"].work = slow
    body = {"model": "m", "input": "x"}
    async with gateway.client() as client, gateway.client() as leaver:
        left = asyncio.create_task(leaver.post("/v1/embeddings", json=body))
        while workers["a"].open == 0:
            await asyncio.sleep(0.001)
        waiting = asyncio.create_task(client.post("/v1/embeddings", json=body))
        while gateway.app.admission.gate("m").depth == 0:
            await asyncio.sleep(0.001)
        assert workers["a"].open == 1, "one at a time"
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        while len(workers["a"].requests) < 2:
            await asyncio.sleep(0.001)
        assert workers["a"].open == 1, "the first was cancelled at once"
        go.set()
        assert (await waiting).status_code == 200
    outcomes = {decision.outcome.result for decision in gateway.app.decisions.recent(10)}
    assert outcomes == {"ok", "client_disconnect"}


async def test_only_those_are_asked_that_can_do_it(serve) -> None:
    def prepare(worker: Worker) -> None:
        able = {"a": {"embeddings"}, "b": {"rerank", "embeddings"}, "c": {"chat"}}[worker.name]
        worker.capabilities = Capabilities(endpoints=able, extra_fields=worker.name == "b")

    workers = Workers(prepare)
    gateway = await serve(config("a", "b", "c"), workers)
    async with gateway.client() as client:
        for _ in range(3):
            body = {"model": "m", "query": "q", "documents": ["x"]}
            answer = await client.post("/v1/rerank", json=body)
            assert answer.headers["x-forebay-backend"] == "b"
            body = {"model": "m", "input": "x", "novel": 1}
            answer = await client.post("/v1/embeddings", json=body)
            assert answer.headers["x-forebay-backend"] == "b"
        nobody = await client.post("/tokenize", json={"model": "m", "prompt": "x"})
        kserve = await client.post("/v2/models/m/infer", json={"inputs": []})
    assert workers["a"].requests == workers["c"].requests == []
    assert nobody.status_code == kserve.status_code == 400
    assert nobody.json()["error"]["code"] == "unsupported"
    assert "c does not serve tokenize" in nobody.json()["error"]["message"]
    assert "a does not serve infer" in kserve.json()["error"]


async def test_the_policy_that_follows_prompts_serves_them_too(serve, workers) -> None:
    gateway = await serve(config("a", "b", policy="prefix_affinity"))
    async with sdk(gateway) as client:
        for _ in range(4):
            await client.embeddings.create(model="m", input="x")
    assert sum(len(workers[name].requests) for name in "ab") == 4


async def test_traces_and_metrics_name_the_operation(serve, workers, collector) -> None:
    gateway = await serve(config(tracing=Tracing(otlp_endpoint=collector.endpoint)))
    body = {"model": "m", "input": "tell-nobody", "dimensions": 3}
    async with gateway.client() as client, gateway.admin() as admin:
        done = await client.post("/v1/embeddings", json=body)
        await client.post("/v1/embeddings", json={"model": "m"})
        await client.post("/v2/models/m/versions/1/infer", json={"inputs": []})
        metrics = (await admin.get("/metrics")).text
        decision = (await admin.get(f"/decisions/{done.headers['x-request-id']}")).json()
    spans = await collector.spans_of(gateway.app.aclose)
    labels = 'endpoint="embeddings",model="m",outcome="ok",stream="false"'
    assert f"forebay_requests_total{{{labels}}} 1.0" in metrics
    refused = 'forebay_refused_total{endpoint="embeddings",error="invalid_request"} 1.0'
    assert refused in metrics
    assert (decision["endpoint"], decision["outcome"]["usage"]["prompt_tokens"]) == (
        "embeddings", 7,
    )  # fmt: skip
    attempt = collector.attributes(collector.by_name(spans, "embeddings m"))
    assert attempt["gen_ai.operation.name"] == "embeddings"
    assert attempt["gen_ai.embeddings.dimension.count"] == 3
    assert attempt["gen_ai.usage.input_tokens"] == 7
    assert attempt["gen_ai.response.model"] == "embedder"
    assert "gen_ai.response.time_to_first_chunk" not in attempt  # nothing is streamed
    assert "gen_ai.request.stream" not in attempt
    assert collector.attributes(collector.by_name(spans, "infer m"))["forebay.backend"] == "a"
    server = collector.by_name(spans, "POST /v2/models/{model}/versions/{version}/infer")
    assert collector.attributes(server)["http.response.status_code"] == 200
    assert "tell-nobody" not in str(spans)


async def test_simulated_backends_serve_all_but_infer(serve_gateway) -> None:
    gateway = await serve_gateway(
        Config(
            backends={"s": SimulatedSettings(adapter="simulated", prefill_rate=0)},
            models={"m": Model(backends=["s"])},
        )
    )
    async with sdk(gateway) as client, gateway.client() as http:
        coded = (await client.embeddings.create(model="m", input="a b")).data[0].embedding
        plain = await client.embeddings.create(model="m", input="a b", encoding_format="float")
        rank = {"model": "m", "query": "wheel", "documents": ["a stone", "the wheel"], "top_n": 1}
        ranked = (await http.post("/v1/rerank", json=rank)).json()["results"]
        tokens = (await http.post("/tokenize", json={"model": "m", "prompt": "Grüße"})).json()
        text = await http.post("/detokenize", json={"model": "m", "tokens": tokens["tokens"]})
    assert coded == pytest.approx(plain.data[0].embedding, abs=1e-7)
    assert plain.usage.total_tokens == 2
    assert ranked == [{"index": 1, "relevance_score": 0.5}]
    assert (tokens["count"], text.json()) == (7, {"prompt": "Grüße"})
    assert tokens["max_model_len"] is None
