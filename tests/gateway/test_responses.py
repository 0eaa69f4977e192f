"""OpenAI's Responses dialect on the data port, over a real socket, with its own SDK."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import msgspec
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.access import hash_of
from forebay.api import (
    Attempt,
    BackendFailed,
    BackendSettings,
    Capabilities,
    Delta,
    Event,
    Finished,
    GenerateRequest,
    Identity,
    Started,
    ToolCallDelta,
    Usage,
)
from forebay.config import Config, Key, Limits, Model
from forebay.http.reply import Arrival, Reply
from forebay.http.response_store import ResponseStore, Stored, UnknownResponse
from forebay.http.responses import decode_response

#: What a client is told of a backend that failed: nothing of what the backend said.
TOLD = "no backend could serve the request (backend_failed); the gateway's log says why"
ASK = {"model": "m", "input": "hi"}
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}
ABLE = Capabilities(tools=True, schema=True, multimodal=True)


def config(**changes: object) -> Config:
    return Config(
        backends={"a": BackendSettings(adapter="scripted")},
        models={"m": Model(backends=["a"], policy="round_robin")},
        **changes,
    )


def script(*events: Event | Exception):
    async def play(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        for event in events:
            if isinstance(event, Exception):
                raise event
            yield event

    return play


REASONING_TEXT_AND_CALL = script(
    Started(),
    Delta(reasoning="let "),
    Delta(reasoning="me see", text="I "),
    Delta(text="look."),
    Delta(tool_calls=(ToolCallDelta(0, "call_1", "weather"),)),
    Delta(tool_calls=(ToolCallDelta(0, arguments='{"city": '),)),
    Delta(tool_calls=(ToolCallDelta(0, arguments='"Köln"}'),)),
    Delta(finish_reason="tool_calls"),
    Finished(Usage(20, 7, cached_tokens=16)),
)


def client_of(gateway, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0)


def events_of(text: str) -> list[dict]:
    frames = [frame.split("\n") for frame in text.split("\n\n") if frame]
    assert all(len(frame) == 2 for frame in frames)
    events = [json.loads(data.removeprefix("data: ")) for _, data in frames]
    names = [name.removeprefix("event: ") for name, _ in frames]
    assert names == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


async def test_a_stream_has_the_events_in_their_exact_order(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    gateway.scripted["a"].script = REASONING_TEXT_AND_CALL
    async with gateway.client() as client:
        response = await client.post("/v1/responses", json={**ASK, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "[DONE]" not in response.text
    events = events_of(response.text)
    added, done = "output_item.added", "output_item.done"
    part_added, part_done = "content_part.added", "content_part.done"
    thought, text, call = "reasoning_text", "output_text", "function_call_arguments"
    assert [
        (event["type"].removeprefix("response."), event.get("output_index")) for event in events
    ] == [
        ("created", None),
        ("in_progress", None),
        *[(added, 0), (part_added, 0), (f"{thought}.delta", 0), (f"{thought}.delta", 0)],
        *[(f"{thought}.done", 0), (part_done, 0), (done, 0)],
        *[(added, 1), (part_added, 1), (f"{text}.delta", 1), (f"{text}.delta", 1)],
        *[(f"{text}.done", 1), (part_done, 1), (done, 1)],
        *[(added, 2), (f"{call}.delta", 2), (f"{call}.delta", 2), (f"{call}.done", 2), (done, 2)],
        ("completed", None),
    ]
    created, completed = events[0]["response"], events[-1]["response"]
    assert (created["status"], created["output"], created["usage"]) == ("in_progress", [], None)
    assert created["id"] == completed["id"]
    assert completed["status"] == "completed"
    assert completed["output"] == [e["item"] for e in events if e["type"] == f"response.{done}"]
    items = {e["output_index"]: e["item"]["id"] for e in events if "item" in e}
    assert all(e["item_id"] == items[e["output_index"]] for e in events if "item_id" in e)
    assert all(e["content_index"] == 0 for e in events if "part" in e)
    opened = [e["item"] for e in events if e["type"] == f"response.{added}"]
    assert [item["type"] for item in opened] == ["reasoning", "message", "function_call"]
    assert (opened[0]["content"], opened[1]["content"], opened[2]["arguments"]) == ([], [], "")
    assert all(item["status"] == "in_progress" for item in opened)
    assert completed["usage"] == {
        "input_tokens": 20,
        "input_tokens_details": {"cached_tokens": 16, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 27,
    }


async def test_the_sdk_reads_the_same_from_a_stream_and_from_a_whole(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    gateway.scripted["a"].script = REASONING_TEXT_AND_CALL
    async with client_of(gateway) as client:
        whole = await client.responses.create(**ASK)
        async with client.responses.stream(**ASK) as stream:
            deltas = [e.delta async for e in stream if e.type == "response.output_text.delta"]
            streamed = await stream.get_final_response()
    assert deltas == ["I ", "look."]
    for response in (whole, streamed):
        assert response.status == "completed"
        assert response.output_text == "I look."
        thought, message, call = response.output
        assert thought.content[0].text == "let me see"
        assert message.content[0].text == "I look."
        assert (call.call_id, call.name) == ("call_1", "weather")
        assert json.loads(call.arguments) == {"city": "Köln"}
        assert response.usage.total_tokens == 27
        assert response.usage.input_tokens_details.cached_tokens == 16


async def test_a_request_becomes_the_chat_request_that_means_the_same(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    gateway.app.fleet.backends["a"].capabilities = ABLE
    schema = {"type": "object", "properties": {"x": {"type": "string"}}}
    async with client_of(gateway) as client:
        response = await client.responses.create(
            model="m",
            instructions="Be brief.",
            input=[
                {"role": "developer", "content": "Speak plainly."},
                {
                    "type": "message",
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "What is this?"},
                        {"type": "input_image", "image_url": "http://x/y.png", "detail": "low"},
                    ],
                },
                {"type": "reasoning", "id": "rs_1", "summary": []},
                {"role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
                {"type": "function_call", "call_id": "1", "name": "weather", "arguments": "{}"},
                {"type": "function_call", "call_id": "2", "name": "weather", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "12 °C"},
                {
                    "type": "function_call_output",
                    "call_id": "2",
                    "output": [{"type": "input_text", "text": "13 °C"}],
                },
            ],
            max_output_tokens=50,
            temperature=0.5,
            top_p=0.9,
            tools=[WEATHER],
            tool_choice={"type": "function", "name": "weather"},
            parallel_tool_calls=False,
            text={"format": {"type": "json_schema", "name": "o", "schema": schema}},
            reasoning={"effort": "low"},
            metadata={"k": "v"},
            user="u",
        )
    (request,) = gateway.scripted["a"].requests
    function = {name: value for name, value in WEATHER.items() if name != "type"}
    call = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
    assert json.loads(request.openai_body()) == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": "Speak plainly."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is this?"},
                    {"type": "image_url", "image_url": {"url": "http://x/y.png", "detail": "low"}},
                ],
            },
            {
                "role": "assistant",
                "content": "I look.",
                "tool_calls": [{"id": "1", **call}, {"id": "2", **call}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "12 °C"},
            {"role": "tool", "tool_call_id": "2", "content": "13 °C"},
        ],
        "stream": False,
        "max_tokens": 50,
        "temperature": 0.5,
        "top_p": 0.9,
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "parallel_tool_calls": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "o", "schema": schema}},
        "reasoning_effort": "low",
        "user": "u",
    }
    assert request.typed
    assert request.needs_tools
    assert request.needs_schema
    assert request.needs_multimodal
    assert request.extra == ("reasoning_effort",)
    assert response.metadata == {"k": "v"}
    assert response.tools[0].name == "weather"
    assert response.tool_choice.name == "weather"
    assert response.text.format.name == "o"
    assert response.temperature == 0.5


async def test_a_conversation_with_a_tool_goes_on_from_what_was_stored(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    adapter = gateway.scripted["a"]
    gateway.app.fleet.backends["a"].capabilities = ABLE
    adapter.script = REASONING_TEXT_AND_CALL
    async with client_of(gateway) as client:
        first = await client.responses.create(
            model="m", input="Weather?", instructions="Be brief.", tools=[WEATHER]
        )
        adapter.script = script(
            Started(), Delta(text="12 °C"), Delta(finish_reason="stop"), Finished()
        )
        output = {"type": "function_call_output", "call_id": "call_1", "output": "12"}
        second = await client.responses.create(
            model="m", input=[output], previous_response_id=first.id, stream=True
        )
        last = [event async for event in second][-1].response
        third = await client.responses.create(
            model="m", input="Thanks", instructions="Be kind.", previous_response_id=last.id
        )
        assert third.previous_response_id == last.id
    messages = json.loads(adapter.requests[-1].openai_body())["messages"]
    assert [(m["role"], m.get("content")) for m in messages] == [
        ("system", "Be kind."),
        ("user", "Weather?"),
        ("assistant", "I look."),
        ("tool", "12"),
        ("assistant", "12 °C"),
        ("user", "Thanks"),
    ]
    assert messages[2]["tool_calls"][0]["id"] == "call_1"


async def test_what_is_stored_can_be_read_and_deleted_and_is_no_one_elses(serve_gateway) -> None:
    keys = {
        "one": Key(hash=hash_of("secret-1"), tenant="acme"),
        "two": Key(hash=hash_of("secret-2"), tenant="acme"),
        "other": Key(hash=hash_of("secret-3"), tenant="globex"),
    }
    gateway = await serve_gateway(config(keys=keys))
    async with (
        client_of(gateway, "secret-1") as one,
        client_of(gateway, "secret-2") as two,
        client_of(gateway, "secret-3") as other,
        client_of(gateway, "secret-4") as stranger,
    ):
        response = await one.responses.create(**ASK)
        assert (await two.responses.retrieve(response.id)).output == response.output
        with pytest.raises(openai.NotFoundError) as hidden:
            await other.responses.retrieve(response.id)
        with pytest.raises(openai.NotFoundError):
            await other.responses.delete(response.id)
        with pytest.raises(openai.BadRequestError) as refused:
            await other.responses.create(**ASK, previous_response_id=response.id)
        with pytest.raises(openai.AuthenticationError):
            await stranger.responses.retrieve(response.id)
        with pytest.raises(openai.BadRequestError, match="starting_after"):
            await one.responses.retrieve(response.id, extra_query={"starting_after": 1})
        await one.responses.delete(response.id)
        with pytest.raises(openai.NotFoundError):
            await one.responses.retrieve(response.id)
        unstored = await one.responses.create(**ASK, store=False)
        assert unstored.store is False
        with pytest.raises(openai.NotFoundError):
            await one.responses.retrieve(unstored.id)
    assert hidden.value.code == "response_not_found"
    assert refused.value.code == "previous_response_not_found"
    assert refused.value.param == "previous_response_id"


@pytest.mark.parametrize(
    ("finish", "reason"), [("length", "max_output_tokens"), ("content_filter", "content_filter")]
)
async def test_an_answer_that_was_cut_is_incomplete(serve_gateway, finish, reason) -> None:
    gateway = await serve_gateway(config())
    gateway.scripted["a"].script = script(
        Started(), Delta(text="half"), Delta(finish_reason=finish), Finished(Usage(1, 1))
    )
    async with client_of(gateway) as client:
        whole = await client.responses.create(**ASK)
        stream = await client.responses.create(**ASK, stream=True)
        last = [event async for event in stream][-1]
    assert last.type == "response.incomplete"
    for response in (whole, last.response):
        assert response.status == "incomplete"
        assert response.incomplete_details.reason == reason
        assert response.output[0].status == "incomplete"
        assert response.output_text == "half"


async def test_a_broken_stream_ends_in_error_and_failed(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    gateway.scripted["a"].script = script(Started(), Delta(text="half"), BackendFailed("it broke"))
    async with gateway.client() as client:
        response = await client.post("/v1/responses", json={**ASK, "stream": True})
        *_, error, failed = events_of(response.text)
        assert error.keys() == {"type", "sequence_number", "code", "message", "param"}
        assert (error["type"], error["code"]) == ("error", "backend_failed")
        assert error["message"] == TOLD
        assert failed["type"] == "response.failed"
        assert failed["response"]["status"] == "failed"
        assert failed["response"]["error"] == {"code": "server_error", "message": TOLD}
        assert failed["response"]["output"][0]["status"] == "incomplete"
        kept = await client.get(f"/v1/responses/{failed['response']['id']}")
    assert kept.status_code == 404, "a failed response is not kept"
    async with client_of(gateway) as client:
        with pytest.raises((openai.APIError, RuntimeError)):
            async with client.responses.stream(**ASK) as stream:
                await stream.get_final_response()


async def test_a_failure_before_the_first_byte_is_an_error_response(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    gateway.scripted["a"].script = script(BackendFailed("it broke"))
    async with client_of(gateway) as client:
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="no backend") as caught:
                await client.responses.create(**ASK, stream=stream)
            assert caught.value.status_code == 502
            assert caught.value.code == "backend_failed"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": "none"}, "model"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
            "input[0].content[0].type",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input[0].content[0].type",
        ),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"previous_response_id": "resp_none"}, "previous_response_id"),
    ],
)
async def test_each_refusal_names_its_field(serve_gateway, change, param) -> None:
    gateway = await serve_gateway(config())
    async with gateway.client() as client:
        response = await client.post("/v1/responses", json={**ASK, **change})
    error = response.json()["error"]
    assert response.status_code == (404 if param == "model" else 400)
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert gateway.scripted["a"].requests == []


async def test_wrong_methods_are_refused(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    async with gateway.client() as client:
        assert (await client.get("/v1/responses")).status_code == 405
        assert (await client.post("/v1/responses/resp_1", json={})).status_code == 405


def test_the_oldest_make_room_within_each_tenants_bound() -> None:
    store = ResponseStore(limit=5000)
    store.put("other", "x", Stored(b"x", ()))
    for index in range(10):
        store.put("t", f"r{index}", Stored(b"y" * 900, (b"z" * 76,)))  # 2000 bytes each
    assert store.get("t", "r9").body == b"y" * 900
    assert store.get("t", "r8").size == 2000
    for gone in ("r0", "r7"):
        with pytest.raises(UnknownResponse):
            store.get("t", gone)
    assert store.get("other", "x").body == b"x"
    store.delete("t", "r8")
    store.put("t", "r10", Stored(b"y" * 900, (b"z" * 76,)))
    assert store.get("t", "r9"), "what was deleted no longer counts"
    store.put("t", "huge", Stored(b"y" * 5000, ()))
    assert store.get("t", "r10"), "what can never fit drives nobody out"


def test_a_bound_of_nothing_keeps_nothing() -> None:
    store = ResponseStore(limit=0)
    store.put("t", "r", Stored(b"", ()))
    with pytest.raises(UnknownResponse):
        store.get("t", "r")


def reply_of(body: dict) -> Reply:
    arrival = Arrival(
        body=msgspec.json.encode(body),
        request_id="r",
        created=1,
        identity=Identity(),
        headers={},
        parameters={},
    )
    _, reply = decode_response(ResponseStore(1 << 20), arrival, Limits())
    return reply


@given(st.lists(st.text(), max_size=8), st.lists(st.text(), max_size=4))
def test_however_text_is_cut_the_response_is_the_same(
    texts: list[str], thoughts: list[str]
) -> None:
    deltas = [Delta(reasoning=piece) for piece in thoughts] + [Delta(text=t) for t in texts]
    streaming, whole = reply_of(ASK), reply_of(ASK)
    sent = b""
    for delta in deltas:
        sent += streaming.chunk(delta)
        whole.add(delta)
    events = events_of((sent + streaming.chunk(Finished())).decode())
    output = json.loads(whole.body(Finished()))["output"]
    said = [item["content"][0]["text"] for item in output]
    assert said == [text for text in ("".join(thoughts), "".join(texts)) if text]
    final = events[-1]["response"]["output"]
    assert [item["content"] for item in final] == [item["content"] for item in output]
    pieces = [""] * len(output)
    for event in events:
        if event["type"].endswith("_text.delta"):
            pieces[event["output_index"]] += event["delta"]
    assert pieces == said
