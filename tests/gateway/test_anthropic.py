"""Anthropic's dialect on the data port, over a real socket, with its own SDK."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import anthropic
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.access import hash_of
from forebay.api import (
    Attempt,
    BackendBusy,
    BackendFailed,
    BackendSettings,
    BackendTimeout,
    Capabilities,
    Delta,
    Event,
    Finished,
    GenerateRequest,
    Identity,
    Started,
    TokenizeRequest,
    Tokens,
    ToolCallDelta,
    Usage,
)
from forebay.config import Config, Key, Limits, Model
from forebay.http.anthropic import decode_message
from forebay.http.reply import Arrival

#: What a client is told of a backend that failed: nothing of what the backend said.
TOLD = "no backend could serve the request (backend_failed); the gateway's log says why"
ASK = {"model": "m", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}
WEATHER = {
    "name": "weather",
    "description": "Tells the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
ABLE = Capabilities(tools=True, schema=True, multimodal=True)


def config(**changes: object) -> Config:
    return Config(
        backends={"a": BackendSettings(adapter="scripted")},
        models={"m": Model(backends=["a"], policy="round_robin")},
        **changes,
    )


async def thinking_text_and_two_calls(
    request: GenerateRequest, attempt: Attempt
) -> AsyncIterator[Event]:
    yield Started()
    yield Delta(reasoning="let ")
    yield Delta(reasoning="me see", text="I ")
    yield Delta(text="look.")
    yield Delta(tool_calls=(ToolCallDelta(0, "call_1", "weather"),))
    yield Delta(tool_calls=(ToolCallDelta(0, arguments='{"city": '),))
    yield Delta(tool_calls=(ToolCallDelta(0, arguments='"Köln"}'),))
    yield Delta(tool_calls=(ToolCallDelta(1, "call_2", "weather", '{"city": "Rom"}'),))
    yield Delta(finish_reason="tool_calls")
    yield Finished(Usage(20, 7, cached_tokens=16))


def script(*events: Event | Exception):
    async def play(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        for event in events:
            if isinstance(event, Exception):
                raise event
            yield event

    return play


def client_of(gateway, key: str = "none") -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=gateway.url, api_key=key, max_retries=0)


def events_of(text: str) -> list[tuple[str, dict]]:
    frames = [frame.split("\n") for frame in text.split("\n\n") if frame]
    assert all(len(frame) == 2 for frame in frames)
    events = [
        (name.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        for name, data in frames
    ]
    assert all(name == data["type"] for name, data in events)
    return events


async def test_a_stream_has_the_events_in_their_exact_order(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    gateway.scripted["a"].script = thinking_text_and_two_calls
    async with gateway.client() as client:
        response = await client.post("/v1/messages", json={**ASK, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    rid = response.headers["x-request-id"]
    block = [(name, data.get("index")) for name, data in events_of(response.text)]
    delta, start, stop = "content_block_delta", "content_block_start", "content_block_stop"
    assert block == [
        ("message_start", None),
        *[(start, 0), (delta, 0), (delta, 0), (stop, 0)],
        *[(start, 1), (delta, 1), (delta, 1), (stop, 1)],
        *[(start, 2), (delta, 2), (delta, 2), (stop, 2)],
        *[(start, 3), (delta, 3), (stop, 3)],
        ("message_delta", None),
        ("message_stop", None),
    ]
    data = [event for _, event in events_of(response.text)]
    assert data[0]["message"] == {
        "id": f"msg_{rid}",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 0, "output_tokens": 0},
    }
    assert data[1]["content_block"] == {"type": "thinking", "thinking": "", "signature": ""}
    assert data[2]["delta"] == {"type": "thinking_delta", "thinking": "let "}
    assert data[5]["content_block"] == {"type": "text", "text": ""}
    assert data[6]["delta"] == {"type": "text_delta", "text": "I "}
    assert data[9]["content_block"] == {
        "type": "tool_use",
        "id": "call_1",
        "name": "weather",
        "input": {},
    }
    assert data[10]["delta"] == {"type": "input_json_delta", "partial_json": '{"city": '}
    assert data[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert data[-2]["usage"] == {
        "input_tokens": 4,
        "output_tokens": 7,
        "cache_read_input_tokens": 16,
    }


async def test_the_sdk_reads_the_same_from_a_stream_and_from_a_whole(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    gateway.scripted["a"].script = thinking_text_and_two_calls
    async with client_of(gateway) as client:
        whole = await client.messages.create(**ASK)
        async with client.messages.stream(**ASK) as stream:
            texts = [text async for text in stream.text_stream]
            streamed = await stream.get_final_message()
    assert texts == ["I ", "look."]
    for message in (whole, streamed):
        thinking, text, first, second = message.content
        assert (thinking.type, thinking.thinking) == ("thinking", "let me see")
        assert (text.type, text.text) == ("text", "I look.")
        assert (first.type, first.id, first.input) == ("tool_use", "call_1", {"city": "Köln"})
        assert (second.id, second.input) == ("call_2", {"city": "Rom"})
        assert message.stop_reason == "tool_use"
        assert (message.usage.input_tokens, message.usage.output_tokens) == (4, 7)
        assert message.usage.cache_read_input_tokens == 16


async def test_a_request_becomes_the_chat_request_that_means_the_same(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    adapter = gateway.scripted["a"]
    gateway.app.fleet.backends["a"].capabilities = ABLE
    async with client_of(gateway) as client:
        await client.messages.create(
            model="m",
            max_tokens=50,
            system=[{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}],
            messages=[
                {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "hm", "signature": ""},
                        {"type": "text", "text": "I look."},
                        {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "K"}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "t1", "content": "12 °C"},
                        {"type": "text", "text": "And this?"},
                        {
                            "type": "image",
                            "source": {"type": "base64", "media_type": "image/png", "data": "QQ=="},
                        },
                    ],
                },
            ],
            stop_sequences=["END"],
            extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 40},
            tools=[WEATHER],
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
            output_config={"format": {"type": "json_schema", "schema": {"type": "object"}}},
            thinking={"type": "disabled"},
            metadata={"user_id": "u"},
        )
    (request,) = adapter.requests
    function = {
        "name": "weather",
        "description": WEATHER["description"],
        "parameters": WEATHER["input_schema"],
    }
    assert json.loads(request.openai_body()) == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief.\n\nBe kind."},
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": "I look.",
                "tool_calls": [
                    {
                        "id": "t1",
                        "type": "function",
                        "function": {"name": "weather", "arguments": '{"city":"K"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "t1", "content": "12 °C"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "And this?"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,QQ=="}},
                ],
            },
        ],
        "max_tokens": 50,
        "stop": ["END"],
        "stream": False,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "output", "schema": {"type": "object"}, "strict": True},
        },
        "user": "u",
    }
    assert request.typed
    assert request.needs_tools
    assert request.needs_schema
    assert request.needs_multimodal
    assert request.extra == ()
    assert (request.sampling.max_tokens, request.sampling.stop) == (50, ("END",))


@pytest.mark.parametrize(
    ("choice", "chat"),
    [
        ({"type": "auto"}, "auto"),
        ({"type": "none"}, "none"),
        ({"type": "tool", "name": "w"}, {"type": "function", "function": {"name": "w"}}),
    ],
)
def test_each_choice_of_tools_has_its_counterpart(choice, chat) -> None:
    request = decoded({**ASK, "tools": [WEATHER], "tool_choice": choice})
    assert json.loads(request.openai_body())["tool_choice"] == chat
    assert request.needs_tools is (chat != "none")


def test_results_of_tools_keep_failure_and_images() -> None:
    image = {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}
    content = [
        {"type": "tool_result", "tool_use_id": "1", "is_error": True, "content": "no such city"},
        {"type": "tool_result", "tool_use_id": "2", "content": [image]},
        {"type": "tool_result", "tool_use_id": "3"},
    ]
    request = decoded({**ASK, "messages": [{"role": "user", "content": content}]})
    assert json.loads(request.openai_body())["messages"] == [
        {"role": "tool", "tool_call_id": "1", "content": "Error: no such city"},
        {"role": "tool", "tool_call_id": "2", "content": ""},
        {"role": "tool", "tool_call_id": "3", "content": ""},
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}],
        },
    ]


def decoded(body: dict) -> GenerateRequest:
    arrival = Arrival(
        body=msgspec.json.encode(body),
        request_id="r",
        created=1,
        identity=Identity(),
        headers={},
        parameters={},
    )
    request, _ = decode_message(arrival, Limits())
    assert isinstance(request, GenerateRequest)
    return request


@pytest.mark.parametrize(
    ("finish", "stop_reason"),
    [("stop", "end_turn"), ("length", "max_tokens"), ("content_filter", "refusal")],
)
async def test_reasons_to_stop(serve_gateway, finish, stop_reason) -> None:
    gateway = await serve_gateway(config())
    gateway.scripted["a"].script = script(
        Started(), Delta(text="x"), Delta(finish_reason=finish), Finished()
    )
    async with client_of(gateway) as client:
        assert (await client.messages.create(**ASK)).stop_reason == stop_reason


async def test_a_call_is_a_tool_use_even_if_the_backend_says_stop(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    call = ToolCallDelta(0, None, "weather", "{}")
    gateway.scripted["a"].script = script(
        Started(), Delta(tool_calls=(call,), finish_reason="stop"), Finished()
    )
    async with client_of(gateway) as client:
        message = await client.messages.create(**ASK)
    assert message.stop_reason == "tool_use"
    assert message.content[0].id.startswith("call_"), "an id is made where there is none"


async def test_an_answer_of_nothing_is_a_message_all_the_same(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    gateway.scripted["a"].script = script(Started(), Delta(finish_reason="stop"), Finished())
    async with gateway.client() as client:
        response = await client.post("/v1/messages", json={**ASK, "stream": True})
    names = [name for name, _ in events_of(response.text)]
    assert names == ["message_start", "message_delta", "message_stop"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_tokens": None}, "max_tokens: "),
        ({"max_tokens": 0}, "max_tokens: must be from 1 to"),
        ({"messages": []}, "messages: "),
        ({"messages": [*ASK["messages"], {"role": "assistant", "content": "I"}]}, "messages: the"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role: "),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking: "),
        ({"stop_sequences": [""]}, "stop_sequences: "),
        ({"temperature": -1}, "temperature: "),
        ({"mcp_servers": []}, "mcp_servers: "),
        ({"container": "c"}, "container: "),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type: "),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools[0].defer_loading: "),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name: "),
        ({"system": [{"type": "image"}]}, "system[0].type: "),
        (
            {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
            "messages[0].content[0].type: a block of type 'document'",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image", "source": {"type": "file", "file_id": "f"}}],
                    }
                ]
            },
            "messages[0].content[0].source.type: ",
        ),
    ],
)
async def test_each_refusal_names_its_field_in_this_shape(serve_gateway, change, says) -> None:
    gateway = await serve_gateway(config())
    async with gateway.client() as client:
        response = await client.post("/v1/messages", json={**ASK, **change})
    body = response.json()
    assert response.status_code == 400
    assert body.keys() == {"type", "error"}
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"].startswith(says)
    assert gateway.scripted["a"].requests == []


async def test_errors_have_the_statuses_that_the_sdk_knows(serve_gateway) -> None:
    keys = {"team": Key(hash=hash_of("secret"), tenant="acme")}
    gateway = await serve_gateway(config(keys=keys))
    adapter = gateway.scripted["a"]
    async with client_of(gateway, "wrong") as client:
        with pytest.raises(anthropic.AuthenticationError) as refused:
            await client.messages.create(**ASK)
    assert refused.value.body["error"]["type"] == "authentication_error"
    async with client_of(gateway, "secret") as client:
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(**{**ASK, "model": "none"})
        with pytest.raises(anthropic.BadRequestError, match="cannot call tools"):
            await client.messages.create(**ASK, tools=[WEATHER])
        for failure, status, type_ in [
            (BackendFailed("it broke"), 502, "api_error"),
            (BackendTimeout("first_token", 1), 504, "timeout_error"),
            (BackendBusy("full", retry_after=2), 529, "overloaded_error"),
        ]:
            adapter.script = script(failure)
            with pytest.raises(anthropic.APIStatusError) as caught:
                await client.messages.create(**ASK)
            assert caught.value.status_code == status
            assert caught.value.body["error"]["type"] == type_
            gateway.app.fleet.backends["a"].health.succeeded()
    assert caught.value.response.headers["retry-after"] == "2"
    assert adapter.requests[0].identity.tenant == "acme"


async def test_a_wrong_method_is_refused_in_this_shape(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    async with gateway.client() as client:
        response = await client.get("/v1/messages")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_a_broken_stream_ends_in_an_error_event_and_no_stop(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    gateway.scripted["a"].script = script(Started(), Delta(text="half"), BackendFailed("it broke"))
    async with gateway.client() as client:
        response = await client.post("/v1/messages", json={**ASK, "stream": True})
    names = [name for name, _ in events_of(response.text)]
    assert names == ["message_start", "content_block_start", "content_block_delta", "error"]
    assert events_of(response.text)[-1][1] == {
        "type": "error",
        "error": {"type": "api_error", "message": TOLD},
    }
    async with client_of(gateway) as client:
        stream = await client.messages.create(**ASK, stream=True)
        with pytest.raises(anthropic.APIStatusError, match="no backend"):
            async for _ in stream:
                pass


@pytest.mark.parametrize(
    "calls",
    [
        [ToolCallDelta(0, "c", None, "{}")],
        [ToolCallDelta(0, "c", "f", "{"), ToolCallDelta(1, "d", "f"), ToolCallDelta(0, None, "}")],
        [ToolCallDelta(0, "c", "f", "[1]")],
    ],
)
async def test_calls_that_make_no_sense_are_the_backends_fault(serve_gateway, calls) -> None:
    gateway = await serve_gateway(config())
    deltas = [Delta(tool_calls=(call,)) for call in calls]
    gateway.scripted["a"].script = script(
        Started(), *deltas, Delta(finish_reason="tool_calls"), Finished()
    )
    async with gateway.client() as client:
        response = await client.post("/v1/messages", json=ASK)
    assert response.status_code == 502
    assert response.json()["error"]["type"] == "api_error"


async def test_a_model_that_writes_bad_arguments_does_not_eject_its_backend(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    call = ToolCallDelta(0, "c", "weather", "{city: K}")
    gateway.scripted["a"].script = script(
        Started(), Delta(tool_calls=(call,), finish_reason="tool_calls"), Finished()
    )
    async with gateway.client() as client:
        answers = [await client.post("/v1/messages", json=ASK) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [502] * 4
    assert gateway.app.fleet.backends["a"].state() == "healthy"


async def test_a_call_cut_by_the_limit_is_told_by_the_stop_reason(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    call = ToolCallDelta(0, "c", "weather", '{"city": "K')
    gateway.scripted["a"].script = script(
        Started(), Delta(tool_calls=(call,), finish_reason="length"), Finished()
    )
    async with client_of(gateway) as client:
        message = await client.messages.create(**ASK)
    assert (message.stop_reason, message.content[0].input) == ("max_tokens", {})


async def test_tokens_are_counted_by_the_backend(serve_gateway, monkeypatch) -> None:
    gateway = await serve_gateway(config())
    asked: list[TokenizeRequest] = []

    async def perform(request: TokenizeRequest, attempt: Attempt) -> Tokens:
        asked.append(request)
        return Tokens(tuple(range(11)))

    body = {"model": "m", "system": "Be brief.", "messages": ASK["messages"], "tools": [WEATHER]}
    async with client_of(gateway) as client:
        with pytest.raises(anthropic.BadRequestError, match="tokenize"):
            await client.messages.count_tokens(**body)
        monkeypatch.setattr(gateway.scripted["a"], "perform", perform)
        able = Capabilities(endpoints=frozenset({"chat", "tokenize"}))
        gateway.app.fleet.backends["a"].capabilities = able
        counted = await client.messages.count_tokens(**body)
    assert counted.input_tokens == 11
    (request,) = asked
    assert [(message.role, message.content) for message in request.chat] == [
        ("system", "Be brief."),
        ("user", "hi"),
    ]
    assert request.extra == ("tools",), "only backends that take them into account are asked"
    assert json.loads(bytes(request.fields["tools"]))[0]["function"]["name"] == "weather"


async def test_only_text_is_counted(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    image = {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}
    body = {"model": "m", "messages": [{"role": "user", "content": [image]}]}
    async with client_of(gateway) as client:
        with pytest.raises(anthropic.BadRequestError, match="messages: only the tokens of text"):
            await client.messages.count_tokens(**body)


@given(st.lists(st.text(), max_size=8), st.lists(st.text(), max_size=4))
def test_however_text_is_cut_the_message_is_the_same(texts: list[str], thoughts: list[str]) -> None:
    request = decoded(ASK)
    deltas = [Delta(reasoning=piece) for piece in thoughts] + [Delta(text=t) for t in texts]
    _, streaming = decode_message(arrival_of(ASK), Limits())
    _, whole = decode_message(arrival_of(ASK), Limits())
    sent = b""
    for delta in deltas:
        sent += streaming.chunk(delta)
        whole.add(delta)
    sent += streaming.chunk(Finished())
    content = json.loads(whole.body(Finished()))["content"]
    assert [block.get("text", block.get("thinking")) for block in content] == [
        text for text in ("".join(thoughts), "".join(texts)) if text
    ]
    assert joined(events_of(sent.decode())) == content
    assert request.typed


def arrival_of(body: dict) -> Arrival:
    return Arrival(
        body=msgspec.json.encode(body),
        request_id="r",
        created=1,
        identity=Identity(),
        headers={},
        parameters={},
    )


def joined(events: list[tuple[str, dict]]) -> list[dict]:
    blocks: list[dict] = []
    for name, data in events:
        if name == "content_block_start":
            assert data["index"] == len(blocks)
            blocks.append(data["content_block"])
        elif name == "content_block_delta":
            key = data["delta"]["type"].removesuffix("_delta")
            blocks[data["index"]][key] += data["delta"][key]
    return blocks


async def test_models_are_told_to_anthropics_client_as_well_as_to_openais(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    async with client_of(gateway) as client:
        page = await client.models.list()
        found = await client.models.retrieve("m")
    assert ([one.id for one in page.data], page.has_more) == (["m"], False)
    assert (found.type, found.display_name, found.lifecycle) == ("model", "m", "active")
    assert found.created_at.tzinfo is not None
