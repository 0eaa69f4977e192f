"""SGLang: what it is sent, how it fails, what it tells of itself, its work beyond generation."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any

import msgspec
import pytest

from forebay.api import (
    Attempt,
    BackendBusy,
    BackendFailed,
    BackendGarbage,
    BackendRefused,
    Delta,
    DetokenizeRequest,
    Embeddings,
    EmbedRequest,
    Finished,
    InferRequest,
    Load,
    Message,
    Ranked,
    Ranking,
    Relayed,
    RerankRequest,
    ScoreRequest,
    Scores,
    StreamTruncated,
    Text,
    TokenizeRequest,
    Tokens,
    Unsupported,
    Usage,
)
from forebay.testing import Exchange, Scenario, ScriptedServer, adapter_context, chat_request
from forebay.testing.adapter import collect
from forebay_plugins import sglang
from forebay_plugins.sglang import SglangAdapter

COMMON: dict[str, Any] = {"id": "r", "model": "mine", "created": 1}


@pytest.fixture(scope="module")
def fake(load_fake: Callable[[str], ModuleType]) -> ModuleType:
    return load_fake("sglang_server")


class Server:
    """A server with these arguments; ``answers`` holds what other paths than the usual say."""

    def __init__(self, fake: ModuleType, **info: Any) -> None:
        self.fake = fake
        self.info = {**fake.SERVER_INFO, **info}
        self.answers: dict[str, Any] = {}
        self.scenario = Scenario.HEALTHY

    async def __call__(self, exchange: Exchange) -> None:
        if exchange.path in self.answers:
            answer = self.answers[exchange.path]
            exchange.answer(answer if isinstance(answer, int) else 200, answer)
        else:
            await self.fake.serve(exchange, self.scenario, self.info)


@asynccontextmanager
async def serving(
    script: Any, **settings: Any
) -> AsyncIterator[tuple[SglangAdapter, ScriptedServer]]:
    (kind,) = sglang.adapters()
    async with ScriptedServer(script) as server:
        made = kind.settings(adapter="sglang", url=server.url, **settings)
        adapter = kind.build(made, adapter_context())
        assert isinstance(adapter, SglangAdapter)
        try:
            yield adapter, server
        finally:
            await adapter.aclose()


def extra(**fields: Any) -> Any:
    """A request with fields beyond the model."""
    return msgspec.structs.replace(chat_request(**fields), extra=tuple(fields))


# Generation


async def test_null_roles_are_taken_out_of_the_stream(fake: ModuleType) -> None:
    async with serving(Server(fake)) as (adapter, _):
        events = await collect(adapter, chat_request())
    relayed = b"".join(event.data for event in events if isinstance(event, Relayed))
    chunks = [json.loads(line[6:]) for line in relayed.split(b"\n\n")[:-1]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert [delta.get("role", "none") for delta in deltas] == ["assistant"] + ["none"] * 6
    assert "".join(delta["content"] or "" for delta in deltas) == fake.TEXT
    assert events[-1] == Finished(Usage(11, 5, cached_tokens=4), None, ("length",), "model")


async def test_the_typed_lane(fake: ModuleType) -> None:
    said = fake.Sglang({"messages": [], "model": "m"})
    thought = said.piece(0, None).replace(b'"reasoning_content":null', b'"reasoning_content":"hm"')

    async def script(exchange: Exchange) -> None:
        exchange.begin()
        exchange.send(said.piece(0, "", role="assistant") + thought + said.piece(0, "a"))
        exchange.send(said.piece(0, None, "stop") + b"data: [DONE]\n\n")

    async with serving(script) as (adapter, _):
        events = await collect(adapter, msgspec.structs.replace(chat_request(), typed=True))
    assert [event for event in events if isinstance(event, Delta)] == [
        Delta(reasoning="hm"),
        Delta(text="a"),
        Delta(finish_reason="stop"),
    ]


async def test_an_aborted_stream_is_broken(fake: ModuleType) -> None:
    said = fake.Sglang({"messages": [], "model": "m"})

    async def script(exchange: Exchange) -> None:
        exchange.begin()
        exchange.send(said.piece(0, "a", role="assistant"))
        exchange.send(said.piece(0, None, "abort") + b"data: [DONE]\n\n")

    async with serving(script) as (adapter, _):
        with pytest.raises(StreamTruncated, match="abort"):
            await collect(adapter, chat_request())


@pytest.mark.parametrize(
    ("scenario", "error", "text"),
    [
        (Scenario.BUSY, BackendBusy, "The request queue is full."),
        (Scenario.BROKEN, BackendFailed, "the scheduler has died"),
        (Scenario.REFUSING, BackendRefused, "is longer than the model's context"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_flat_and_nested_errors(
    fake: ModuleType,
    stream: bool,
    scenario: Scenario,
    error: type[Exception],
    text: str,
) -> None:
    server = Server(fake)
    server.scenario = scenario
    async with serving(server) as (adapter, _):
        with pytest.raises(error, match=text):
            await collect(adapter, chat_request(stream=stream))


@pytest.mark.parametrize(
    ("model", "asked", "sent"),
    [
        ("", "mine", "mine"),
        ("", "gemma:270m", "google/gemma-3-270m"),
        ("base:lora", "gemma:270m", "base:lora"),
    ],
)
async def test_a_colon_in_a_name_chooses_no_lora(
    fake: ModuleType, model: str, asked: str, sent: str
) -> None:
    async with serving(Server(fake), model=model) as (adapter, server):
        await adapter.probe()
        events = await collect(adapter, chat_request(model=asked, stream=False))
        assert server.exchanges[-1].json["model"] == sent
    assert isinstance(events[0], Relayed)
    assert json.loads(events[0].data)["model"] == asked


async def test_the_fields_it_knows_go_through(fake: ModuleType) -> None:
    async with serving(Server(fake), fields=["brand_new"]) as (adapter, server):
        await collect(adapter, extra(regex="[ab]", lora_path="x", brand_new=1))
        asked = server.exchanges[-1].json
    assert (asked["regex"], asked["lora_path"], asked["brand_new"]) == ("[ab]", "x", 1)


@pytest.mark.parametrize("field", ["guided_json", "structured_outputs", "rid", "brand_new"])
async def test_fields_that_it_would_ignore_are_refused(fake: ModuleType, field: str) -> None:
    """`rid` it would heed: but it cancels by the beginning of an id."""
    async with serving(Server(fake)) as (adapter, server):
        with pytest.raises(BackendRefused, match=f"sglang backend cannot serve `{field}`"):
            await collect(adapter, extra(**{field: {"a": 1}}))
        assert not server.exchanges


@pytest.mark.parametrize(("low_first", "sent"), [(False, -3), (True, 3)])
async def test_the_lowest_priority_comes_first(
    fake: ModuleType, low_first: bool, sent: int
) -> None:
    arguments = {
        "enable_priority_scheduling": True,
        "schedule_low_priority_values_first": low_first,
    }
    async with serving(Server(fake, **arguments)) as (adapter, server):
        await collect(adapter, extra(priority=3))
        assert server.exchanges[-1].json["priority"] == sent


async def test_a_priority_that_means_nothing_is_refused(fake: ModuleType) -> None:
    async with serving(Server(fake)) as (adapter, _):
        with pytest.raises(BackendRefused, match="enable-priority-scheduling"):
            await collect(adapter, extra(priority=3))
        with pytest.raises(BackendRefused, match="integer"):
            await collect(adapter, extra(priority="high"))


# Probe and load


async def test_probe_reads_its_arguments_once(fake: ModuleType) -> None:
    async with serving(Server(fake)) as (adapter, server):
        for _ in range(2):
            found = await adapter.probe()
        asked = [exchange.path for exchange in server.exchanges]
    assert found.endpoints == {"chat", "completions", "tokenize", "detokenize"}
    assert (found.max_context, found.slots, found.version) == (4096, 48, "0.5.23")
    assert (found.tools, found.models) == (True, ("google/gemma-3-270m",))
    assert asked.count("/server_info") == 1


async def test_probe_reads_them_again_after_a_failure(fake: ModuleType) -> None:
    server = Server(fake)
    async with serving(server) as (adapter, _):
        assert (await adapter.probe()).version == "0.5.23"
        server.scenario = Scenario.BROKEN
        with pytest.raises(BackendBusy):
            await adapter.probe()
        server.scenario = Scenario.HEALTHY
        server.info = {**server.info, "version": "0.5.24", "tool_call_parser": None}
        found = await adapter.probe()
    assert (found.version, found.tools) == ("0.5.24", False)


async def test_probe_of_an_older_server(fake: ModuleType) -> None:
    server = Server(fake)
    server.answers = {"/server_info": 404, "/get_server_info": {"version": "0.5.2"}}
    async with serving(server) as (adapter, _):
        assert (await adapter.probe()).version == "0.5.2"


async def test_an_embedding_model(fake: ModuleType) -> None:
    async with serving(Server(fake, is_embedding=True), rerank=True) as (adapter, _):
        found = await adapter.probe()
    assert found.endpoints == {"embeddings", "rerank", "score", "tokenize", "detokenize"}


async def test_load_of_all_ranks(fake: ModuleType) -> None:
    async with serving(Server(fake)) as (adapter, _):
        assert await adapter.load() == Load(running=5, waiting=1, kv_usage=0.5)
    async with serving(Server(fake, enable_metrics=False)) as (adapter, _):
        assert await adapter.load() == Load(running=8, waiting=4, kv_usage=0.5)


# Work that is no generation


async def test_embeddings(fake: ModuleType) -> None:
    vectors = [{"index": index, "embedding": [index, 1.5]} for index in (1, 0)]
    usage = {"prompt_tokens": 4, "total_tokens": 4, "completion_tokens": 0}
    server = Server(fake)
    server.answers = {"/v1/embeddings": {"object": "list", "data": vectors, "usage": usage}}
    async with serving(server) as (adapter, scripted):
        request = EmbedRequest(inputs=("a", "b"), dimensions=2, **COMMON)
        found = await adapter.perform(request, Attempt())
        assert scripted.exchanges[-1].json == {
            "model": "mine",
            "input": ["a", "b"],
            "encoding_format": "float",
            "dimensions": 2,
        }
    assert found == Embeddings(((0, 1.5), (1, 1.5)), Usage(4, 0))


async def test_rerank_is_a_bare_list(fake: ModuleType) -> None:
    server = Server(fake)
    server.answers["/v1/rerank"] = [
        {"score": 0.1, "document": None, "index": 0, "meta_info": {}},
        {"score": 0.9, "document": None, "index": 1, "meta_info": {}},
    ]
    async with serving(server) as (adapter, scripted):
        request = RerankRequest(query="q", documents=("a", "b"), **COMMON)
        assert await adapter.perform(request, Attempt()) == Ranking(
            (Ranked(1, 0.9), Ranked(0, 0.1))
        )
        assert scripted.exchanges[-1].json == {
            "query": "q",
            "documents": ["a", "b"],
            "return_documents": False,
        }
        first = RerankRequest(query="q", documents=("a", "b"), top_n=1, **COMMON)
        assert await adapter.perform(first, Attempt()) == Ranking((Ranked(1, 0.9),))
        assert scripted.exchanges[-1].json["top_n"] == 1
        with pytest.raises(BackendGarbage, match="not given"):
            await adapter.perform(RerankRequest(query="q", documents=("a",), **COMMON), Attempt())


async def test_scores_are_rankings_of_one_text_after_another(fake: ModuleType) -> None:
    async def script(exchange: Exchange) -> None:
        asked = exchange.json
        scores = [len(asked["query"]) + len(text) / 10 for text in asked["documents"]]
        ranks = [{"index": index, "score": score} for index, score in enumerate(scores)]
        exchange.answer(200, sorted(ranks, key=lambda rank: -rank["score"])[: asked.get("most")])

    pairs = (("a", "x"), ("bb", "x"), ("a", "yyy"), ("a", "x"))
    async with serving(script) as (adapter, scripted):
        request = ScoreRequest(pairs=pairs, **COMMON)
        found = await adapter.perform(request, Attempt())
        assert found == Scores((1.1, 2.1, 1.3, 1.1))
        assert [exchange.json["query"] for exchange in scripted.exchanges] == ["a", "bb"]
        fields = {"most": msgspec.Raw(b"1")}
        request = msgspec.structs.replace(request, fields=fields, extra=("most",))
        with pytest.raises(BackendGarbage, match="2 of 4"):
            await adapter.perform(request, Attempt())


@pytest.mark.parametrize(("longest", "ours"), [(2048, 2048), (1e30, 0), (-1, 0)])
async def test_tokens(fake: ModuleType, longest: float, ours: int) -> None:
    server = Server(fake)
    server.answers["/tokenize"] = {"tokens": [2, 5], "count": 2, "max_model_len": longest}
    async with serving(server) as (adapter, scripted):
        request = TokenizeRequest(text="a", add_special_tokens=False, **COMMON)
        assert await adapter.perform(request, Attempt()) == Tokens((2, 5), None, ours)
        assert scripted.exchanges[-1].json == {"prompt": "a", "add_special_tokens": False}
        await adapter.probe()
        assert await adapter.perform(request, Attempt()) == Tokens((2, 5), None, 4096)
        chat = TokenizeRequest(chat=(Message(role="user", content="a"),), **COMMON)
        with pytest.raises(BackendRefused, match="messages"):
            await adapter.perform(chat, Attempt())


async def test_text_of_tokens(fake: ModuleType) -> None:
    server = Server(fake)
    server.answers["/detokenize"] = {"text": "a"}
    async with serving(server) as (adapter, scripted):
        request = DetokenizeRequest(tokens=(2, 5), **COMMON)
        assert await adapter.perform(request, Attempt()) == Text("a")
        assert scripted.exchanges[-1].json == {"tokens": [2, 5]}


async def test_what_it_cannot_perform(fake: ModuleType) -> None:
    async with serving(Server(fake)) as (adapter, _):
        with pytest.raises(Unsupported, match="infer"):
            await adapter.perform(InferRequest(body=b"{}", **COMMON), Attempt())
