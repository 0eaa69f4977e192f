"""Of sampling, what nobody says is said: each backend is sent the values that change nothing."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import msgspec
import pytest

from forebay.api import BackendError, GenerateRequest, Sampling
from forebay.testing import Exchange, ScriptedServer, adapter_context, chat_request
from forebay.testing.adapter import collect
from forebay_engine.client import SamplingParams
from forebay_plugins import anthropic, llamacpp, ollama, openai, sglang, tgi, trtllm, vllm

OPENAI = {"temperature": 1, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0}
ENGINE = {**OPENAI, "min_p": 0, "top_k": -1, "repetition_penalty": 1}
LLAMACPP = {**OPENAI, "min_p": 0, "top_k": 0, "repeat_penalty": 1}
#: Every name that one of them gives to a sampling field.
NAMES = {*ENGINE, *LLAMACPP, "do_sample", "repeat_last_n"}
PROPS = {"total_slots": 1, "default_generation_settings": {"n_ctx": 512}}


async def sent(module: ModuleType, request: GenerateRequest, **settings: Any) -> dict[str, Any]:
    """What the server is told of sampling, wherever in the body its kind wants that."""
    (kind,) = module.adapters()

    async def script(exchange: Exchange) -> None:
        exchange.answer(200, PROPS) if exchange.path == "/props" else exchange.answer(418, b"")

    async with ScriptedServer(script) as server:
        made = kind.settings(adapter=kind.name, url=server.url, **settings)
        adapter = kind.build(made, adapter_context())
        with pytest.raises(BackendError):
            await collect(adapter, request)
        await adapter.aclose()
    body = server.exchanges[-1].json
    told = {**body, **body.get("options", {}), **body.get("parameters", {})}
    return {name: value for name, value in told.items() if name in NAMES}


@pytest.mark.parametrize(
    ("module", "endpoint", "neutral", "own"),
    [
        (openai, "chat", OPENAI, {}),
        (vllm, "chat", ENGINE, {}),
        (vllm, "completions", ENGINE, {}),
        (sglang, "chat", ENGINE, {}),
        (trtllm, "chat", {**ENGINE, "top_k": 0}, {}),
        (llamacpp, "chat", LLAMACPP, {}),
        (llamacpp, "completions", LLAMACPP, {}),
        (ollama, "chat", LLAMACPP, {}),
        # What these are not told changes nothing, but that TGI would always take the likeliest.
        (tgi, "completions", {"do_sample": True}, {}),
        (tgi, "chat", {}, {}),
        (anthropic, "chat", {}, {}),
    ],
)
async def test_nothing_said_is_sampled_as_it_is(
    module: ModuleType, endpoint: Any, neutral: dict[str, Any], own: dict[str, Any]
) -> None:
    request = chat_request(endpoint=endpoint)
    assert await sent(module, request) == neutral
    assert await sent(module, request, neutral_sampling=False) == own


@pytest.mark.parametrize("module", [openai, vllm, sglang, trtllm, llamacpp, ollama])
async def test_what_is_said_is_kept(module: ModuleType) -> None:
    request = chat_request(temperature=0.25, top_p=None)
    request = msgspec.structs.replace(request, sampling=Sampling(temperature=0.25))
    told = await sent(module, request)
    assert (told["temperature"], told["top_p"]) == (0.25, 1)
    assert (await sent(module, request, neutral_sampling=False))["temperature"] == 0.25


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"repetition_penalty": 1.5}, {"repeat_penalty": 1.5, "repeat_last_n": 512}),
        ({"repetition_penalty": 1}, {"repeat_penalty": 1}),
        ({"presence_penalty": 1.5}, {"presence_penalty": 1.5, "repeat_last_n": 512}),
        (
            {"frequency_penalty": 1, "repeat_last_n": 9},
            {"frequency_penalty": 1, "repeat_last_n": 9},
        ),
        ({"repetition_penalty": 1.5, "repeat_penalty": 2}, {"repeat_penalty": 2}),
        ({"repetition_penalty": None}, {}),
    ],
)
async def test_llamacpp_penalises_as_others_do(said: dict[str, Any], told: dict[str, Any]) -> None:
    """It ignores `repetition_penalty`, and by itself looks back 64 tokens only."""
    request = chat_request(**said)
    penalties = {name: value for name, value in said.items() if name in Sampling.__struct_fields__}
    request = msgspec.structs.replace(request, sampling=Sampling(max_tokens=16, **penalties))
    found = await sent(llamacpp, request)
    found.pop("repeat_last_n") if "repeat_penalty" in said else None
    assert found == {**LLAMACPP, **told}


def test_the_native_engines_own_values_are_neutral() -> None:
    """So what is not said need not be sent to it."""
    neutral = {**ENGINE, "top_k": 0}
    params = SamplingParams()
    assert {name: getattr(params, name) for name in neutral} == neutral
