"""Clients of two dialects before text-generation-inference and SGLang, through a whole gateway."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from types import ModuleType
from typing import Any

import anthropic
import openai
import pytest

from forebay.api import Timeouts
from forebay.config import Config, Model
from forebay.testing import Exchange, Scenario, ScriptedServer
from forebay_plugins import sglang, tgi

#: Seconds. The servers share the test's event loop, which building a client holds up: on a busy
#: machine for longer than the second in which a connection is to be opened.
PATIENCE = 30.0
PLUGINS = {"tgi": tgi, "sglang": sglang}


@pytest.fixture(params=["tgi", "sglang"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def fake(kind: str, load_fake: Callable[[str], ModuleType]) -> ModuleType:
    return load_fake(f"{kind}_server")


def behaving(fake: ModuleType, scenario: Scenario) -> Any:
    async def script(exchange: Exchange) -> None:
        await fake.serve(exchange, scenario)

    return script


async def gateway_before(
    stack: AsyncExitStack, serve_gateway: Any, kind: str, *scripts: Any
) -> tuple[str, list[ScriptedServer]]:
    """The URL of a gateway whose model `m` is served by these, the first one preferred."""
    servers = [await stack.enter_async_context(ScriptedServer(script)) for script in scripts]
    (offered,) = PLUGINS[kind].adapters()
    backends = {
        f"b{place}": offered.settings(adapter=kind, url=server.url, probe_timeout=PATIENCE)
        for place, server in enumerate(servers)
    }
    model = Model(
        backends=list(backends), policy="round_robin", timeouts=Timeouts(connect=PATIENCE)
    )
    config = Config(backends=backends, models={"m": model})
    return (await serve_gateway(config, extra=PLUGINS)).url, servers


ASK: dict[str, Any] = {"model": "m", "max_tokens": 9}
CHAT: dict[str, Any] = {**ASK, "messages": [{"role": "user", "content": "Hi"}]}


async def test_openai_clients(serve_gateway: Any, kind: str, fake: ModuleType) -> None:
    async with AsyncExitStack() as stack:
        script = behaving(fake, Scenario.HEALTHY)
        url, _ = await gateway_before(stack, serve_gateway, kind, script)
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        await stack.enter_async_context(client)
        chat = await client.chat.completions.create(**CHAT)
        assert chat.choices[0].message.content == fake.TEXT
        completion = await client.completions.create(**ASK, prompt="Once")
        assert completion.choices[0].text == fake.TEXT
        for answer in (chat, completion):
            assert (answer.model, answer.choices[0].finish_reason) == ("m", "length")
            assert answer.id
            assert answer.usage is not None
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (11, 5)
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = [chunk async for chunk in await client.chat.completions.create(**CHAT, **usage)]
        assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
        deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
        assert [delta.role for delta in deltas if delta.role] == ["assistant"]
        assert "".join(delta.content or "" for delta in deltas) == fake.TEXT
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.total_tokens == 16


async def test_anthropic_clients(serve_gateway: Any, kind: str, fake: ModuleType) -> None:
    async with AsyncExitStack() as stack:
        script = behaving(fake, Scenario.HEALTHY)
        url, _ = await gateway_before(stack, serve_gateway, kind, script)
        client = anthropic.AsyncAnthropic(base_url=url, api_key="x", max_retries=0)
        await stack.enter_async_context(client)
        whole = await client.messages.create(**CHAT)
        async with client.messages.stream(**CHAT) as stream:
            streamed = await stream.get_final_message()
        for message in (whole, streamed):
            assert [block.text for block in message.content] == [fake.TEXT]
            assert message.stop_reason == "max_tokens"
            read = message.usage.cache_read_input_tokens or 0  # Anthropic counts these apart
            assert (message.usage.input_tokens + read, message.usage.output_tokens) == (11, 5)


@pytest.mark.parametrize("stream", [True, False])
async def test_an_overload_that_comes_in_a_200_goes_to_the_next_backend(
    serve_gateway: Any, kind: str, fake: ModuleType, stream: bool
) -> None:
    scripts = [behaving(fake, Scenario.BUSY), behaving(fake, Scenario.HEALTHY)]
    async with AsyncExitStack() as stack:
        url, servers = await gateway_before(stack, serve_gateway, kind, *scripts)
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        await stack.enter_async_context(client)
        for _ in range(2):  # so that each of the two is asked first once
            answer = await client.chat.completions.create(**CHAT, stream=stream)
            if stream:
                pieces = [chunk.choices[0].delta.content or "" async for chunk in answer]
                assert "".join(pieces) == fake.TEXT
            else:
                assert answer.choices[0].message.content == fake.TEXT
        asked = [exchange.method for exchange in servers[0].exchanges]
        assert "POST" in asked


async def test_what_a_backend_cannot_do_names_the_field(
    serve_gateway: Any, kind: str, fake: ModuleType
) -> None:
    async with AsyncExitStack() as stack:
        script = behaving(fake, Scenario.HEALTHY)
        url, _ = await gateway_before(stack, serve_gateway, kind, script)
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        await stack.enter_async_context(client)
        with pytest.raises(openai.BadRequestError) as raised:
            await client.chat.completions.create(**CHAT, extra_body={"guided_regex": "a"})
    assert raised.value.param == "guided_regex"
    assert kind in raised.value.message
