"""The fake servers are what they play: asked the same, both answer in the same shape.

Compared are status, content type, and of every body or event the keys, in order, and the types
of their values; of a stream also the order in which kinds of events come. Not what is said: the
fakes' model is another.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from fake_servers.llamacpp import LlamaCpp
from fake_servers.serving import FakeServer
from fake_servers.triton import Triton
from fake_servers.vllm import Vllm

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]

MODEL = "gemma-3-270m"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "one two three"}]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"const": 41}},
    "required": ["n"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}

OPENAI: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": MESSAGES}),
    "chat-stream": (CHAT, {"messages": MESSAGES, "stream": True}),
    "chat-usage": (CHAT, {"messages": MESSAGES, **WITH_USAGE}),
    "chat-logprobs": (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}),
    "chat-schema": (CHAT, {"messages": MESSAGES, "response_format": FORMAT, "max_tokens": 40}),
    "completion": (COMPLETIONS, {"prompt": "one two"}),
    "completion-usage": (COMPLETIONS, {"prompt": "one two", **WITH_USAGE}),
    "completion-logprobs": (COMPLETIONS, {"prompt": "one two", "logprobs": 2}),
    "several-prompts": (COMPLETIONS, {"prompt": ["one", "two"], "max_tokens": 2}),
    "no-messages": (CHAT, {}),
    "wrong-type": (CHAT, {"messages": MESSAGES, "temperature": "warm"}),
    "no-choices": (CHAT, {"messages": MESSAGES, "n": 0}),
    "top-logprobs-alone": (CHAT, {"messages": MESSAGES, "top_logprobs": 2}),
    "unknown-format": (CHAT, {"messages": MESSAGES, "response_format": {"type": "nonesuch"}}),
    "wrong-schema": (
        CHAT,
        {
            "messages": MESSAGES,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "nonesuch"}},
            },
        },
    ),
    "too-long": (COMPLETIONS, {"prompt": "a " * 5000}),
    "detokenize": ("/detokenize", {"tokens": [2]}),
    "unknown-path": ("/v1/nonesuch", {}),
}
PAGES = {
    "vllm": ("/health", "/version", "/v1/models", "/load"),
    "llama": ("/health", "/v1/completions"),
}
TRITON: dict[str, tuple[str, dict[str, Any] | None]] = {
    "server": ("/v2", None),
    "ready": ("/v2/models/ensemble/ready", None),
    "not-ready": ("/v2/models/nonesuch/ready", None),
    "unknown": ("/v2/models/nonesuch", None),
    "metadata": ("/v2/models/embedder", None),
    "index": ("/v2/repository/index", {}),
    "stream": (
        "/v2/models/ensemble/generate_stream",
        {"text_input": "one two three", "max_tokens": 2, "stream": True},
    ),
    "counts": (
        "/v2/models/ensemble/generate_stream",
        {
            "text_input": "one two three",
            "max_tokens": 2,
            "stream": True,
            "return_num_input_tokens": True,
            "return_num_output_tokens": True,
        },
    ),
    "missing-input": ("/v2/models/ensemble/generate_stream", {"text_input": "one"}),
    "wrong-input": (
        "/v2/models/ensemble/generate_stream",
        {"text_input": "one", "max_tokens": "two", "stream": True},
    ),
    "refused": (
        "/v2/models/ensemble/generate_stream",
        {"text_input": "one", "max_tokens": 0, "stream": True},
    ),
    "decoupled": ("/v2/models/ensemble/infer", {"inputs": []}),
    "infer": (
        "/v2/models/embedder/infer",
        {"inputs": [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": ["a"]}]},
    ),
    "wrong-name": (
        "/v2/models/embedder/infer",
        {"inputs": [{"name": "no", "shape": [1, 1], "datatype": "BYTES", "data": ["a"]}]},
    ),
}


def shape(value: Any) -> Any:
    """Keys and types; of a list the shapes that are in it."""
    if isinstance(value, dict):
        # The keys of a completion's likeliest tokens are these tokens.
        return [
            (key, "likeliest" if key == "top_logprobs" and "tokens" in value else shape(each))
            for key, each in value.items()
        ]
    if isinstance(value, list):
        shapes = [shape(each) for each in value]
        return [one for place, one in enumerate(shapes) if one not in shapes[:place]]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return "number" if number else type(value).__name__


def read(response: httpx.Response) -> tuple[int, str, Any]:
    """Status, content type, and the shapes of body or events; like events in a row are one."""
    kind = response.headers.get("content-type", "")
    if not response.text:
        return response.status_code, "", None
    if not kind.startswith("text/event-stream"):
        return response.status_code, kind, shape(response.json())
    events = [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]
    shapes = [event if event == "[DONE]" else shape(json.loads(event)) for event in events]
    return response.status_code, kind, [one for one, _ in itertools.groupby(shapes)]


@asynccontextmanager
async def both(fake: type[FakeServer], url: str) -> AsyncIterator[list[httpx.AsyncClient]]:
    options: dict[str, Any] = {"timeout": 120, "trust_env": False}
    async with (
        fake() as server,
        httpx.AsyncClient(base_url=server.url, **options) as played,
        httpx.AsyncClient(base_url=url, **options) as real,
    ):
        yield [played, real]


async def compare(fake: type[FakeServer], url: str, path: str, body: dict[str, Any] | None) -> None:
    headers = {"connection": "close"}  # llama.cpp closes after a stream, and does not say so
    async with both(fake, url) as clients:
        answers = [
            await client.request(
                "GET" if body is None else "POST", path, json=body, headers=headers
            )
            for client in clients
        ]
    played, real = map(read, answers)
    assert played == real, [answer.text[:1000] for answer in answers]


@pytest.mark.parametrize("name", OPENAI)
@pytest.mark.parametrize(("server", "fake"), [("vllm", Vllm), ("llama", LlamaCpp)])
async def test_generation(
    real: dict[str, Any], server: str, fake: type[FakeServer], name: str
) -> None:
    path, body = OPENAI[name]
    asked = {"model": MODEL, "max_tokens": 4, "temperature": 0, **body}
    await compare(fake, real[server].url, path, asked)


@pytest.mark.parametrize(
    ("server", "fake", "path"),
    [
        (server, fake, path)
        for server, fake in (("vllm", Vllm), ("llama", LlamaCpp))
        for path in PAGES[server]
    ],
)
async def test_pages(real: dict[str, Any], server: str, fake: type[FakeServer], path: str) -> None:
    await compare(fake, real[server].url, path, None)


@pytest.mark.parametrize("name", TRITON)
async def test_triton(triton_server: Any, name: str) -> None:
    await compare(Triton, triton_server.url, *TRITON[name])
