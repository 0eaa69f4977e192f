"""vLLM beyond generation: what it serves, its other work, and the names of its constraints."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from msgspec import Raw

from forebay.api import (
    Attempt,
    BackendBusy,
    BackendGarbage,
    BackendRefused,
    DetokenizeRequest,
    Embeddings,
    EmbedRequest,
    InferRequest,
    Load,
    Message,
    Operation,
    Ranked,
    Ranking,
    RerankRequest,
    ScoreRequest,
    Scores,
    Text,
    TokenizeRequest,
    Tokens,
    Unsupported,
    Usage,
)
from forebay.testing import Exchange, ScriptedServer, adapter_context, chat_request
from forebay.testing.adapter import collect
from forebay_plugins.orca import load_in
from forebay_plugins.vllm import VllmAdapter, VllmSettings

GENERATES = {"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"}
POOLS = {"/v1/embeddings", "/v1/rerank", "/score", "/tokenize", "/detokenize"}
USAGE = {"prompt_tokens": 4, "total_tokens": 4}
ANSWERS: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {
        "data": [{"index": 1, "embedding": [3, 4]}, {"index": 0, "embedding": [1, 2]}],
        "usage": USAGE,
    },
    "/v1/rerank": {
        "results": [
            {"index": 0, "relevance_score": 0.1, "document": {"text": "b"}},
            {"index": 1, "relevance_score": 0.9, "document": {"text": "c"}},
        ],
        "usage": USAGE,
    },
    "/score": {"data": [{"index": 0, "object": "score", "score": 0.5}], "usage": USAGE},
    "/tokenize": {"count": 2, "max_model_len": 4096, "tokens": [2, 5], "token_strs": ["<s>", "a"]},
    "/detokenize": {"prompt": "a"},
}


class Server:
    """A vLLM of some version; ``described``: it has an `/openapi.json`."""

    def __init__(self, routes: set[str], version: str = "0.32.0", described: bool = True) -> None:
        self.routes = routes
        #: Routes that are there and refuse, as all did up to 0.11.
        self.refused: set[str] = set()
        self.version = version
        self.described = described
        self.models = ["base", "lora"]
        #: The field that it knows for constraints.
        self.knows = ""
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answers = dict(ANSWERS)
        self.busy = False
        self.page = b""
        #: Further fields of its answers.
        self.further: dict[str, Any] = {}
        #: The header of whole answers that tells its load, for whoever asks.
        self.load_header = ""
        self.load_asked: list[bool] = []
        self.gets: list[str] = []

    async def __call__(self, exchange: Exchange) -> None:
        path = exchange.path
        if exchange.method == "GET":
            self._get(exchange)
            return
        asked = exchange.json
        self.asked.append((path, asked))
        if self.busy:
            exchange.answer(503, {"error": "scaling"})
        elif path not in self.routes:
            exchange.answer(404, {"detail": "Not Found"})
        elif path in self.refused or len(self._kinds(asked)) > 1:
            exchange.answer(400, {"error": {"message": "no", "param": None, "code": 400}})
        elif path == "/v1/completions":
            choice = {"index": 0, "text": "x", "finish_reason": "stop"}
            answer = {"id": "c", "created": 1, "choices": [choice], "usage": USAGE}
            exchange.answer(200, {**answer, **self.further}, self._load(exchange))
        else:
            exchange.answer(200, self.answers[path])

    def _kinds(self, asked: dict[str, Any]) -> list[str]:
        """The constraints that it heeds."""
        if self.knows == "structured_outputs":
            return list(asked.get("structured_outputs") or ())
        return [
            name
            for name in asked
            if self.knows and name.startswith(self.knows) and not name.endswith("_pattern")
        ]

    def _load(self, exchange: Exchange) -> dict[str, str]:
        asked = exchange.headers.get("endpoint-load-metrics-format") == "TEXT"
        self.load_asked.append(asked)
        return {"endpoint-load-metrics": self.load_header} if asked else {}

    def _get(self, exchange: Exchange) -> None:
        self.gets.append(exchange.path)
        if exchange.path == "/v1/models":
            data = [{"id": name, "max_model_len": 4096, "parent": None} for name in self.models]
            exchange.answer(200, {"data": data})
        elif exchange.path == "/version":
            exchange.answer(200, {"version": self.version})
        elif exchange.path == "/metrics":
            exchange.answer(200, self.page)
        elif exchange.path == "/openapi.json" and self.described:
            exchange.answer(200, {"paths": {route: {} for route in self.routes}})
        elif exchange.path == "/health":
            exchange.answer(200)
        else:
            exchange.answer(405 if exchange.path in self.routes else 404, {"detail": "no"})


@asynccontextmanager
async def adapter_of(server: Server, model: str = "", **more: Any) -> AsyncIterator[VllmAdapter]:
    async with ScriptedServer(server) as scripted:
        settings = VllmSettings(adapter="vllm", url=scripted.url, model=model, **more)
        adapter = VllmAdapter(settings, adapter_context())
        try:
            yield adapter
        finally:
            await adapter.aclose()


@pytest.mark.parametrize("described", [True, False])
async def test_a_server_serves_what_its_model_is_for(described: bool) -> None:
    async with adapter_of(Server(GENERATES, described=described)) as adapter:
        found = (await adapter.probe()).endpoints
        assert found == {"chat", "completions", "tokenize", "detokenize"}
    async with adapter_of(Server(POOLS, described=described)) as adapter:
        found = (await adapter.probe()).endpoints
        assert found == {"embeddings", "rerank", "score", "tokenize", "detokenize"}


async def test_an_old_server_mounts_all_and_is_not_believed() -> None:
    server = Server(GENERATES | POOLS, version="0.9.1")
    server.refused = {"/v1/embeddings", "/v1/rerank", "/score"}
    async with adapter_of(server) as adapter:
        found = (await adapter.probe()).endpoints
        assert found == {"chat", "completions", "tokenize", "detokenize"}
    server.refused = {"/v1/chat/completions", "/v1/completions", "/v1/rerank"}
    async with adapter_of(server) as adapter:
        found = (await adapter.probe()).endpoints
        assert found == {"embeddings", "score", "tokenize", "detokenize"}


async def test_it_is_asked_once_for_each_version_and_set_of_models() -> None:
    server = Server(POOLS)
    async with adapter_of(server) as adapter:
        for expected in (3, 3):
            await adapter.probe()
            assert len(server.asked) == expected
        server.version = "0.33.0"
        await adapter.probe()
        assert len(server.asked) == 6
        server.models = ["base", "lora", "another"]
        found = await adapter.probe()
        assert found.models == ("base", "lora", "another")
        assert found.scoring
        assert len(server.asked) == 9


async def test_a_server_that_cannot_tell_now_is_not_ready() -> None:
    server = Server(POOLS)
    server.busy = True
    async with adapter_of(server) as adapter:
        with pytest.raises(BackendBusy):
            await adapter.probe()
        server.busy = False
        assert "score" in (await adapter.probe()).endpoints


def common(**fields: object) -> dict[str, Any]:
    """What every request has; with these further fields, as the client sent them."""
    raw = {name: Raw(msgspec.json.encode(value)) for name, value in fields.items()}
    return {"id": "r", "model": "asked", "created": 1, "fields": raw, "extra": tuple(raw)}


USED = Usage(4, 0)
CASES: list[tuple[Operation, str, dict[str, Any], object]] = [
    (
        EmbedRequest(inputs=("a", "b"), dimensions=2, **common(truncate_prompt_tokens=9)),
        "/v1/embeddings",
        {
            "model": "lora",
            "input": ["a", "b"],
            "encoding_format": "float",
            "dimensions": 2,
            "truncate_prompt_tokens": 9,
        },
        Embeddings(((1, 2), (3, 4)), USED),
    ),
    (
        RerankRequest(query="a", documents=("b", "c"), top_n=1, **common(instruction="i")),
        "/v1/rerank",
        {"model": "lora", "query": "a", "documents": ["b", "c"], "top_n": 1, "instruction": "i"},
        Ranking((Ranked(1, 0.9),), USED),
    ),
    (
        ScoreRequest(pairs=(("a", "b"),), **common()),
        "/score",
        {"model": "lora", "text_1": ["a"], "text_2": ["b"]},
        Scores((0.5,), USED),
    ),
    (
        TokenizeRequest(text="a", with_texts=True, **common()),
        "/tokenize",
        {"model": "lora", "prompt": "a", "add_special_tokens": True, "return_token_strs": True},
        Tokens((2, 5), ("<s>", "a"), 4096),
    ),
    (
        TokenizeRequest(
            chat=(Message(role="user", content="a"),),
            add_special_tokens=False,
            **common(add_generation_prompt=False),
        ),
        "/tokenize",
        {
            "model": "lora",
            "messages": [{"role": "user", "content": "a"}],
            "add_special_tokens": False,
            "add_generation_prompt": False,
        },
        Tokens((2, 5), ("<s>", "a"), 4096),
    ),
    (
        DetokenizeRequest(tokens=(5,), **common()),
        "/detokenize",
        {"model": "lora", "tokens": [5]},
        Text("a"),
    ),
]


@pytest.mark.parametrize(("request_", "path", "body", "result"), CASES)
async def test_work_that_is_no_generation(
    request_: Operation, path: str, body: dict[str, Any], result: object
) -> None:
    server = Server(POOLS)
    async with adapter_of(server, model="lora") as adapter:
        assert await adapter.perform(request_, Attempt()) == result
    assert server.asked == [(path, body)]


async def test_answers_that_do_not_fit_the_question() -> None:
    server = Server(POOLS)
    one = {"data": [{"index": 0, "embedding": [1, 2]}]}
    server.answers |= {"/v1/embeddings": one, "/tokenize": {"tokens": "x"}, "/score": {"data": []}}
    server.answers["/v1/rerank"] = {"results": [{"index": 7, "relevance_score": 1}]}
    async with adapter_of(server) as adapter:
        for request in (
            EmbedRequest(inputs=("a", "b"), **common()),
            TokenizeRequest(text="a", **common()),
            ScoreRequest(pairs=(("a", "b"),), **common()),
            RerankRequest(query="a", documents=("b",), **common()),
        ):
            with pytest.raises(BackendGarbage):
                await adapter.perform(request, Attempt())
        with pytest.raises(BackendRefused, match="2 dimensions") as refused:
            await adapter.perform(EmbedRequest(inputs=("a",), dimensions=1, **common()), Attempt())
        assert refused.value.param == "dimensions"


SCHEMA = {"type": "object"}


async def sent(server: Server, times: int = 1, **fields: Any) -> list[dict[str, Any]]:
    """What a completion with these fields makes the server hear."""
    async with adapter_of(server) as adapter:
        await adapter.probe()
        server.asked.clear()
        for _ in range(times):
            request = chat_request(endpoint="completions", stream=False, **fields)
            await collect(adapter, request)
    return [asked for _, asked in server.asked]


def knowing(name: str, version: str) -> Server:
    server = Server(GENERATES, version)
    server.knows = name
    return server


async def test_new_servers_are_sent_structured_outputs() -> None:
    server = knowing("structured_outputs", "0.32.0")
    question, *asked = await sent(server, 2, guided_json=SCHEMA, guided_whitespace_pattern=None)
    assert question["structured_outputs"] == {"choice": ["a"], "regex": "b"}
    assert len(asked) == 2, "it is verified once"
    assert asked[0]["structured_outputs"] == {"json": SCHEMA}
    assert "guided_json" not in asked[0]
    (_, same) = await sent(server, structured_outputs={"regex": "a+"})
    assert same["structured_outputs"] == {"regex": "a+"}


async def test_old_servers_are_sent_guided_fields() -> None:
    server = knowing("guided_", "0.9.1")
    given = {"json": SCHEMA, "regex": None, "whitespace_pattern": " ?"}
    (question, asked) = await sent(server, structured_outputs=given)
    assert {"guided_choice", "guided_regex"} <= question.keys()
    assert asked["guided_json"] == SCHEMA
    assert "structured_outputs" not in asked
    (_, same) = await sent(knowing("guided_", "0.9.1"), guided_choice=["a"])
    assert same["guided_choice"] == ["a"]


async def test_an_unknown_version_is_found_out() -> None:
    for name, given in (("structured_outputs", "guided_regex"), ("guided_regex", "guided_regex")):
        server = knowing(name.split("_r")[0], "dev")
        fields: dict[str, Any] = {given: "a"}
        asked = await sent(server, **fields)
        assert (asked[-1].get("structured_outputs") == {"regex": "a"}) == (given != name)
        assert (asked[-1].get("guided_regex") == "a") == (given == name)


@pytest.mark.parametrize(
    ("knows", "version", "fields", "param"),
    [
        ("", "0.32.0", {"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ("", "0.9.0", {"guided_choice": ["a"]}, "guided_choice"),
        (
            "guided_",
            "0.9.0",
            {"structured_outputs": {"structural_tag": "x"}},
            "structured_outputs.structural_tag",
        ),
        ("guided_", "0.9.0", {"structured_outputs": 7}, "structured_outputs"),
        (
            "structured_outputs",
            "0.32.0",
            {"guided_decoding_backend": "outlines"},
            "guided_decoding_backend",
        ),
        (
            "structured_outputs",
            "0.32.0",
            {"structured_outputs": {"regex": "a"}, "guided_regex": "a"},
            "guided_regex",
        ),
    ],
)
async def test_constraints_are_never_dropped(
    knows: str, version: str, fields: dict[str, Any], param: str
) -> None:
    server = knowing(knows, version)
    with pytest.raises(BackendRefused, match="vLLM") as refused:
        await sent(server, **fields)
    assert refused.value.param == param
    assert all(asked["max_tokens"] == 1 for _, asked in server.asked), "only questions were sent"


async def test_other_fields_pass_as_they_came() -> None:
    given: dict[str, Any] = {
        "priority": -3,
        "cache_salt": "s",
        "return_token_ids": True,
        "kv_transfer_params": {"do_remote_decode": True},
        "response_format": {"type": "json_object"},
    }
    (asked,) = await sent(knowing("structured_outputs", "0.32.0"), **given)
    assert {name: asked[name] for name in given} == given


V0 = b"""# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="base"} 3.0
vllm:num_requests_swapped{model_name="base"} 9.0
vllm:num_requests_waiting{model_name="base"} 2.0
vllm:gpu_cache_usage_perc{model_name="base"} 0.25
vllm:cpu_cache_usage_perc{model_name="base"} 0.75
"""
V1 = b"""vllm:num_requests_running{engine="0",model_name="base"} 1.0
vllm:num_requests_running{engine="1",model_name="base"} 2.0
vllm:num_requests_waiting{engine="0",model_name="base"} 0.0
vllm:num_requests_waiting{engine="1",model_name="base"} 4.0
vllm:num_requests_waiting_by_reason{engine="1",model_name="base",reason="capacity"} 4.0
vllm:kv_cache_usage_perc{engine="0",model_name="base"} 0.5
vllm:kv_cache_usage_perc{engine="1",model_name="base"} 0.25
"""


@pytest.mark.parametrize(
    ("page", "load"),
    [
        (V0, Load(running=3, waiting=2, kv_usage=0.25)),
        (V1, Load(running=3, waiting=4, kv_usage=0.375)),
        (b"python_info 1.0\n", Load()),
    ],
)
async def test_load_by_the_metrics_of_either_generation(page: bytes, load: Load) -> None:
    server = Server(GENERATES)
    server.page = page
    async with adapter_of(server) as adapter:
        assert await adapter.load() == load


TEXT = "TEXT named_metrics.num_requests_waiting=7.0, named_metrics.kv_cache_usage_perc=0.75"


@pytest.mark.parametrize(
    ("header", "load"),
    [
        (TEXT, Load(waiting=7, kv_usage=0.75)),
        (
            'JSON {"named_metrics": {"num_requests_waiting": 7.0, "kv_cache_usage_perc": 0.75}}',
            Load(waiting=7, kv_usage=0.75),
        ),
        (f"{TEXT}, {TEXT.removeprefix('TEXT ')}", Load(waiting=14, kv_usage=0.75)),
        ("TEXT cpu=0.5, named_metrics.kv_cache_usage_perc=0.5", Load(kv_usage=0.5)),
        ("TEXT named_metrics.num_requests_waiting=nan", None),
        ("TEXT named_metrics.num_requests_waiting", None),
        ("JSON {", None),
        ("BIN CgA=", None),
        ("", None),
    ],
)
def test_load_by_headers(header: str, load: Load | None) -> None:
    assert load_in({"endpoint-load-metrics": header}) == load
    assert load_in({}) is None


async def test_what_answers_tell_saves_readings_of_the_metrics() -> None:
    server = Server(GENERATES)
    server.page, server.load_header = V1, TEXT
    async with adapter_of(server, load_interval=60) as adapter:
        request = chat_request(endpoint="completions", stream=False)
        for _ in range(3):
            await collect(adapter, request)
        assert server.load_asked == [True, False, False], "it is fresh for a while"
        found = [await adapter.load() for _ in range(4)]
        assert server.gets.count("/metrics") == 2, "how many run is said there alone"
    scraped = Load(running=3, waiting=4, kv_usage=0.375)
    assert found[0] == found[3] == scraped
    for told in found[1:3]:
        assert told is not None
        assert (told.running, told.waiting, told.kv_usage) == (3, 7, 0.75)
        assert 0 < told.age < 60


@pytest.mark.parametrize("interval", [0, 1e-9])
async def test_old_tidings_of_load_save_nothing(interval: float) -> None:
    server = Server(GENERATES)
    server.page, server.load_header = V1, TEXT
    async with adapter_of(server, load_interval=interval) as adapter:
        for _ in range(2):
            await collect(adapter, chat_request(endpoint="completions", stream=False))
        assert server.load_asked == [bool(interval)] * 2, "who never reads does not ask"
        for _ in range(3):
            assert await adapter.load() == Load(running=3, waiting=4, kv_usage=0.375)


async def test_what_it_cannot_do() -> None:
    async with adapter_of(Server(GENERATES)) as adapter:
        with pytest.raises(Unsupported):
            await adapter.perform(InferRequest(body=b"", **common()), Attempt())
