"""What is sent to text-generation-inference, and what is refused before."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from forebay.api import Attempt, BackendRefused
from forebay.testing.adapter import collect


@pytest.fixture(scope="module")
def fake(load_fake: Callable[[str], ModuleType]) -> ModuleType:
    return load_fake("tgi_server")


# What is sent: completions


async def test_a_completion_goes_to_the_native_routes(fake: ModuleType) -> None:
    exchange = await fake.sent(False, stream=True)
    assert (exchange.method, exchange.path) == ("POST", "/generate_stream")
    assert exchange.json == {
        "inputs": "Once",
        "parameters": {"details": True, "do_sample": True, "max_new_tokens": 16},
    }
    assert (await fake.sent(False)).path == "/generate"


async def test_sampling_in_its_words(fake: ModuleType) -> None:
    exchange = await fake.sent(
        False,
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        repetition_penalty=1.2,
        frequency_penalty=-0.5,
        seed=4,
        stop="END",
        logprobs=2,
        watermark=True,
        typical_p=0.5,
    )
    assert exchange.json["parameters"] == {
        "details": True,
        "do_sample": True,
        "max_new_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "repetition_penalty": 1.2,
        "frequency_penalty": -0.5,
        "seed": 4,
        "stop": ["END"],
        "top_n_tokens": 2,
        "watermark": True,
        "typical_p": 0.5,
    }


async def test_values_that_switch_off_what_it_has_no_off_for(fake: ModuleType) -> None:
    exchange = await fake.sent(
        False, top_p=1, top_k=-1, min_p=0, presence_penalty=0, logit_bias={}, n=1
    )
    assert exchange.json["parameters"] == {"details": True, "do_sample": True, "max_new_tokens": 16}


async def test_temperature_0_is_greedy_and_samples_from_nothing(fake: ModuleType) -> None:
    exchange = await fake.sent(False, temperature=0, top_p=0.5, top_k=5)
    assert exchange.json["parameters"] == {
        "details": True,
        "do_sample": False,
        "max_new_tokens": 16,
    }


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
RESPONSE_FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


@pytest.mark.parametrize("chat", [True, False])
async def test_a_schema_is_a_grammar(fake: ModuleType, chat: bool) -> None:
    asked = (await fake.sent(chat, response_format=RESPONSE_FORMAT)).json
    found = asked["response_format"] if chat else asked["parameters"]["grammar"]
    assert found == {"type": "json", "value": SCHEMA}
    own = {"type": "regex", "value": "[ab]+"}
    asked = (await fake.sent(chat, response_format=own)).json
    assert (asked["response_format"] if chat else asked["parameters"]["grammar"]) == own
    asked = (await fake.sent(chat, response_format={"type": "text"})).json
    assert "response_format" not in asked
    assert "grammar" not in asked.get("parameters", {})


# What is sent: chat


async def test_a_chat_request_is_the_clients_but_for_what_it_refuses(fake: ModuleType) -> None:
    exchange = await fake.sent(
        True,
        stream=True,
        max_completion_tokens=9,
        stop="END",
        top_p=1.0,
        top_k=0,
        presence_penalty=0,
        logit_bias={},
        n=1,
        seed=4,
        user="someone",
        response_format={"type": "text"},
    )
    assert exchange.path == "/v1/chat/completions"
    assert exchange.json == {
        "model": "tgi",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 9,
        "stop": ["END"],
        "seed": 4,
        "user": "someone",
    }


async def test_chat_has_a_repetition_penalty_by_the_name_of_presence(fake: ModuleType) -> None:
    """It adds 2 to a presence penalty and takes that for its repetition penalty."""
    assert (await fake.sent(True, repetition_penalty=1.5)).json["presence_penalty"] == -0.5
    assert "presence_penalty" not in (await fake.sent(True, repetition_penalty=1)).json


async def test_greedy_chat_samples_from_nothing(fake: ModuleType) -> None:
    asked = (await fake.sent(True, temperature=0, top_p=0.5)).json
    assert asked["temperature"] == 0
    assert "top_p" not in asked


@pytest.mark.parametrize(
    ("model", "chat", "native"),
    [("", "tgi", None), ("google/gemma-3-270m", "tgi", None), ("my-lora", "my-lora", "my-lora")],
)
async def test_only_an_adapters_name_is_sent(
    fake: ModuleType, model: str, chat: str, native: str | None
) -> None:
    async with fake.serving(fake.healthy, model=model) as (adapter, server):
        await adapter.probe()
        await collect(adapter, fake.request_of(True))
        assert server.exchanges[-1].json["model"] == chat
        await collect(adapter, fake.request_of(False))
        assert server.exchanges[-1].json["parameters"].get("adapter_id") == native


async def test_traces_of_unsampled_requests_end_here(fake: ModuleType) -> None:
    """TGI exports a span for each request that has a traceparent, whatever its flags."""
    async with fake.serving(fake.healthy, api_key="secret") as (adapter, server):
        for flags in ("00", "01"):
            headers = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-{flags}", "x-request-id": "r"}
            async for _ in adapter.stream(fake.request_of(False), Attempt(headers=headers)):
                pass
    found = [exchange.headers for exchange in server.exchanges]
    assert ["traceparent" in headers for headers in found] == [False, True]
    assert all(headers["authorization"] == "Bearer secret" for headers in found)


# What is refused before anything is sent

REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("n", {"n": 2}),
    ("top_p", {"top_p": 0}),
    ("min_p", {"min_p": 0.1}),
    ("presence_penalty", {"presence_penalty": 0.5}),
    ("repetition_penalty", {"repetition_penalty": 0}),
    ("min_tokens", {"min_tokens": 2}),
    ("ignore_eos", {"ignore_eos": True}),
    ("seed", {"seed": -1}),
    ("max_tokens", {"max_tokens": 4096}),
    ("stop", {"stop": ["a", "b", "c", "d", "e"]}),
    ("logit_bias", {"logit_bias": {"1": 2}}),
    ("guided_json", {"guided_json": {}, "guided_regex": "a"}),
    ("response_format", {"response_format": {"type": "json_object"}}),
    ("response_format", {"response_format": {"type": "json_schema", "json_schema": {}}}),
]
COMPLETIONS: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": ["a", "b"]}),
    ("prompt", {"prompt": [1, 2]}),
    ("echo", {"echo": True, "logprobs": 0}),
    ("logprobs", {"logprobs": 6}),
    ("suffix", {"suffix": "x"}),
]
CHAT: list[tuple[str, dict[str, Any]]] = [
    ("top_k", {"top_k": 5}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 6}),
    ("watermark", {"watermark": True}),
    (
        "response_format",
        {
            "response_format": RESPONSE_FORMAT,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        },
    ),
]


@pytest.mark.parametrize(
    ("chat", "field", "fields"),
    [
        *((chat, *case) for chat in (True, False) for case in REFUSED),
        *((False, *case) for case in COMPLETIONS),
        *((True, *case) for case in CHAT),
    ],
)
async def test_refused_before_it_is_sent(
    fake: ModuleType, chat: bool, field: str, fields: dict[str, Any]
) -> None:
    field = "guided_regex" if field == "guided_json" else field  # an empty object says nothing
    async with fake.serving(fake.healthy) as (adapter, server):
        await adapter.probe()
        before = len(server.exchanges)
        with pytest.raises(BackendRefused, match=f"tgi backend cannot serve `{field}`") as raised:
            await collect(adapter, fake.request_of(chat, **fields))
        assert (raised.value.status, raised.value.param) == (400, field)
        assert len(server.exchanges) == before


async def test_limits_hold_as_soon_as_they_are_known(fake: ModuleType) -> None:
    """Before the first probe the server itself has to say so."""
    exchange = await fake.sent(False, probed=False, max_tokens=4096)
    assert exchange.json["parameters"]["max_new_tokens"] == 4096
