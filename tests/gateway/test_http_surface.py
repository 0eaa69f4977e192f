"""What clients see on the data port, over a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import msgspec
import openai
import pytest

from forebay.access import hash_of
from forebay.api import (
    Attempt,
    BackendSettings,
    Capabilities,
    Delta,
    Event,
    Finished,
    GenerateRequest,
    PromptLogprob,
    Relayed,
    Started,
    TokenLogprob,
    Usage,
)
from forebay.config import Config, Key, Limits, Model

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def config(*backends: str, **changes: object) -> Config:
    names = backends or ("a",)
    return Config(
        backends={name: BackendSettings(adapter="scripted") for name in names},
        models={"m": Model(backends=list(names), policy="round_robin")},
        **changes,
    )


def events(text: str) -> list[dict]:
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]


async def test_a_whole_chat_answer_has_the_shape_of_openai(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    async with gateway.client() as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "n": 2})
    body = response.json()
    assert response.headers["content-type"] == "application/json"
    assert body["object"] == "chat.completion"
    assert body["id"] == f"chatcmpl-{response.headers['x-request-id']}"
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["choices"][1]["message"] == {"role": "assistant", "content": "one two three"}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    assert response.headers["x-forebay-backend"] == "a"
    assert response.headers["x-forebay-policy"] == "round_robin"
    assert response.headers["x-forebay-attempts"] == "1"
    assert 0 < float(response.headers["x-forebay-overhead-ms"]) < 1000


async def test_a_stream_is_strict_where_clients_are(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    request = {**CHAT, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    async with gateway.client() as client:
        response = await client.post("/v1/chat/completions", json=request)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")
    chunks = events(response.text)
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    roles = [c["choices"][0]["index"] for c in chunks[:2]]
    assert roles == [0, 1], "the role of every choice comes first, in order of index"
    deltas = [choice for chunk in chunks for choice in chunk["choices"]]
    assert sum("role" in choice["delta"] for choice in deltas) == 2
    assert sum(choice["finish_reason"] == "stop" for choice in deltas) == 2
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 11
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


async def test_without_include_usage_no_chunk_speaks_of_usage(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    async with gateway.client() as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert all("usage" not in chunk for chunk in events(response.text))
    assert all(chunk["choices"] for chunk in events(response.text))


async def test_completions_take_several_prompts(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    async with gateway.client() as client:
        body = {"model": "m", "prompt": ["a", "b"], "n": 2}
        answer = (await client.post("/v1/completions", json=body)).json()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["choices"][3]["text"] == "one two three"


async def test_the_openai_client_reads_all_of_it(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client:
        assert [model.id for model in (await client.models.list()).data] == ["m"]
        assert (await client.models.retrieve("m")).owned_by == "forebay"
        whole = await client.chat.completions.create(**CHAT)
        assert whole.choices[0].message.content == "one two three"
        async with client.chat.completions.stream(**CHAT) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.content == "one two three"
        assert final.choices[0].message.role == "assistant"
        text = await client.completions.create(model="m", prompt="x", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in text]) == "one two three"
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(model="nope", messages=CHAT["messages"])
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


async def test_logprobs_in_both_dialects(serve_gateway) -> None:
    async def script(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        yield Started()
        yield Delta(text="ab", logprobs=(TokenLogprob("ab", -0.5, (("ab", -0.5), ("c", -1.0))),))
        yield Delta(text="c", logprobs=(TokenLogprob("c", -0.25),), finish_reason="length")
        yield Finished(Usage(1, 2))

    gateway = await serve_gateway(config())
    gateway.scripted["a"].script = script
    async with gateway.client() as client:
        body = {**CHAT, "logprobs": True, "top_logprobs": 2}
        chat = (await client.post("/v1/chat/completions", json=body)).json()
        body = {"model": "m", "prompt": "x", "logprobs": 2}
        text = (await client.post("/v1/completions", json=body)).json()
    content = chat["choices"][0]["logprobs"]["content"]
    assert content[0]["token"] == "ab"
    assert content[0]["bytes"] == [97, 98]
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -1.0]
    logprobs = text["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["ab", "c"]
    assert logprobs["text_offset"] == [0, 2]
    assert logprobs["top_logprobs"][0] == {"ab": -0.5, "c": -1.0}


async def test_a_prompts_logprobs_stand_where_its_text_does(serve_gateway) -> None:
    prompt = (TokenLogprob("<b>", None, (), 0), TokenLogprob("ab", -1.0, (("c", -0.5),), 0))

    async def script(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        yield Started()
        yield Delta(text="abx", logprobs=(*prompt, TokenLogprob("x", -0.25, (), 2)))
        yield Delta(text="yz", logprobs=(TokenLogprob("y", -0.5),))
        yield Delta(logprobs=(TokenLogprob("z", -0.5),), finish_reason="length")
        yield Finished(Usage(2, 3))

    gateway = await serve_gateway(config())
    gateway.scripted["a"].script = script
    body = {"model": "m", "prompt": "ab", "echo": True, "logprobs": 1}
    async with gateway.client() as client:
        whole = (await client.post("/v1/completions", json=body)).json()["choices"][0]
        stream = events((await client.post("/v1/completions", json={**body, "stream": True})).text)
    assert whole["text"] == "abxyz"
    expected = {
        "tokens": ["<b>", "ab", "x", "y", "z"],
        "token_logprobs": [None, -1.0, -0.25, -0.5, -0.5],
        "top_logprobs": [None, {"c": -0.5}, None, None, None],
        "text_offset": [0, 0, 2, 3, 4],
    }
    assert whole["logprobs"] == expected
    parts = [event["choices"][0]["logprobs"] for event in stream]
    assert {name: [one for part in parts for one in part[name]] for name in expected} == expected


async def test_no_tokens_are_asked_for_with_echo_only_and_of_those_who_score(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    body = {"model": "m", "prompt": "ab", "echo": True, "max_tokens": 0}
    async with gateway.client() as client:
        answer = await client.post("/v1/completions", json={**body, "echo": False})
        assert answer.json()["error"]["param"] == "max_tokens"
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 400
        assert "(`max_tokens: 0`)" in answer.json()["error"]["message"]
        able = gateway.app.fleet.backends["a"]
        able.capabilities = msgspec.structs.replace(able.capabilities, scoring=True)
        assert (await client.post("/v1/completions", json=body)).status_code == 200
    (asked,) = gateway.scripted["a"].requests
    assert asked.sampling.max_tokens == 0


async def test_token_ids_come_to_those_who_ask(serve_gateway) -> None:
    async def script(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        yield Started()
        yield Delta(text="ab", token_ids=(5, 6))
        yield Delta(text="c", token_ids=(7,), finish_reason="stop")
        yield Finished(Usage(1, 3))

    gateway = await serve_gateway(config())
    gateway.scripted["a"].script = script
    async with gateway.client() as client:
        for path, body in (
            ("/v1/chat/completions", CHAT),
            ("/v1/completions", {"model": "m", "prompt": "x"}),
        ):
            plain = (await client.post(path, json=body)).json()
            assert "token_ids" not in plain["choices"][0]
            body = {**body, "return_token_ids": True}
            whole = (await client.post(path, json=body)).json()
            assert whole["choices"][0]["token_ids"] == [5, 6, 7]
            stream = events((await client.post(path, json={**body, "stream": True})).text)
            ids = [e["choices"][0].get("token_ids", []) for e in stream]
            assert [one for some in ids for one in some] == [5, 6, 7]


async def test_what_was_likely_in_the_prompt_is_a_member_of_its_choice(serve_gateway) -> None:
    places = ((PromptLogprob(7, "b", -1.5, 2), PromptLogprob(9, "c", -0.5, 1)),)

    async def script(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        yield Started()
        yield Delta(text="x", prompt_logprobs=places)
        yield Delta(text="y", finish_reason="stop")
        yield Finished(Usage(2, 2))

    gateway = await serve_gateway(config())
    gateway.scripted["a"].script = script
    async with gateway.client() as client:
        body = {**CHAT, "prompt_logprobs": 1}
        whole = (await client.post("/v1/chat/completions", json=body)).json()
        body = {**body, "stream": True}
        stream = events((await client.post("/v1/chat/completions", json=body)).text)
    _, first, second = (event["choices"][0] for event in stream)  # the role comes before
    assert first["prompt_logprobs"] == whole["choices"][0]["prompt_logprobs"]
    assert "prompt_logprobs" not in second
    assert whole["choices"][0]["prompt_logprobs"] == [
        None,
        {
            "7": {"logprob": -1.5, "rank": 2, "decoded_token": "b"},
            "9": {"logprob": -0.5, "rank": 1, "decoded_token": "c"},
        },
    ]


async def test_relayed_bytes_pass_untouched(serve_gateway) -> None:
    async def script(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        yield Relayed(b'data: {"x": "\xc3\xa4"}\n\n')
        yield Relayed(b'data: {"y": 1}\n\ndata: {"z": 2}\n\n', events=2)
        yield Finished(Usage(1, 3), finish_reasons=("stop",))

    gateway = await serve_gateway(config())
    gateway.scripted["a"].script = script
    async with gateway.client() as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert response.content == (
        b'data: {"x": "\xc3\xa4"}\n\ndata: {"y": 1}\n\ndata: {"z": 2}\n\ndata: [DONE]\n\n'
    )
    decision = gateway.app.decisions.get(response.headers["x-request-id"])
    assert decision.outcome.lane == "relay"
    assert decision.outcome.events == 3
    assert decision.outcome.finish_reasons == ("stop",)


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"messages": []}, "messages", "at least one"),
        ({"messages": "hi"}, "messages", "array"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "robot"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing"),
        ({"n": 0}, "n", "at least 1"),
        ({"n": 17}, "n", "at most 16"),
        ({"max_tokens": 0}, "max_tokens", "from 1 to"),
        ({"max_tokens": 2**63}, "max_tokens", "from 1 to"),
        ({"max_completion_tokens": -1}, "max_tokens", "from 1 to"),
        ({"max_tokens": "many"}, "max_tokens", "int"),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"top_p": 1.5}, "top_p", "from 0 to 1"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": [""]}, "stop", "empty"),
        ({"stop": "y" * 1025}, "stop", "1024 bytes"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"tools": []}, "tools", "empty"),
        ({"model": None}, "model", "str"),
    ],
)
async def test_each_refusal_names_its_field(serve_gateway, change, param, says) -> None:
    gateway = await serve_gateway(config())
    async with gateway.client() as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, **change})
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"] == param
    assert says in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert gateway.scripted["a"].requests == []


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_json"),
        (b"", "invalid_json"),
        (b'{"model": "\xff"}', "invalid_json"),
        (b'{"model": "m", "n": NaN}', "invalid_json"),
        (b'{"x": ' + b"[" * 65 + b"]" * 65 + b"}", "json_too_deep"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "json_too_deep"),
        (b"[1, 2]", "invalid_request"),
    ],
)
async def test_a_body_that_is_no_request_is_a_400(serve_gateway, body, code) -> None:
    gateway = await serve_gateway(config())
    async with gateway.client() as client:
        response = await client.post("/v1/chat/completions", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == code


async def test_deep_brackets_inside_a_string_are_text(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    message = {"role": "user", "content": '[{"' * 500}
    async with gateway.client() as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "messages": [message]})
    assert response.status_code == 200


async def test_too_large_a_body_or_head_is_refused_early(serve_gateway) -> None:
    gateway = await serve_gateway(config(limits=Limits(body_bytes=1000, header_bytes=500)))
    async with gateway.client() as client:
        declared = await client.post("/v1/chat/completions", content=b"x" * 1001)

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b"y" * 400

        chunked = await client.post("/v1/chat/completions", content=chunks())
        head = await client.post("/v1/chat/completions", json=CHAT, headers={"x-big": "z" * 500})
    assert declared.status_code == chunked.status_code == 413
    assert chunked.json()["error"]["code"] == "request_too_large"
    assert head.status_code == 431
    assert head.json()["error"]["code"] == "headers_too_large"


async def test_unknown_fields_reach_only_backends_that_take_them(serve_gateway) -> None:
    gateway = await serve_gateway(config("strict", "open"))
    gateway.app.fleet.backends["strict"].capabilities = Capabilities(extra_fields=False)
    async with gateway.client() as client:
        for _ in range(4):
            response = await client.post("/v1/chat/completions", json={**CHAT, "novel": {"a": 1}})
            assert response.headers["x-forebay-backend"] == "open"
        assert bytes(gateway.scripted["open"].requests[0].fields["novel"]) == b'{"a":1}'
        harmless = {**CHAT, "user": "u", "metadata": {"k": "v"}, "novel": None}
        backends = {
            (await client.post("/v1/chat/completions", json=harmless)).headers["x-forebay-backend"]
            for _ in range(4)
        }
    assert backends == {"strict", "open"}
    gateway.app.fleet.backends["strict"].capabilities = Capabilities(
        extra_fields=False, fields=frozenset({"novel"})
    )
    async with gateway.client() as client:
        for fields, able in (
            ({"novel": 1}, {"strict", "open"}),
            ({"novel": 1, "newer": 2}, {"open"}),
        ):
            answers = [
                await client.post("/v1/chat/completions", json={**CHAT, **fields}) for _ in range(4)
            ]
            assert {answer.headers["x-forebay-backend"] for answer in answers} == able


async def test_what_no_backend_can_do_is_said_with_the_reason(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    async with gateway.client() as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "tools": tools})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "unsupported"
    assert "a cannot call tools" in response.json()["error"]["message"]
    sound = {"type": "input_audio", "input_audio": {"data": "QQ==", "format": "wav"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "?"}, sound]}]
    async with gateway.client() as client:
        body = {"model": "m", "messages": messages}
        response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "no part of type 'input_audio'" in response.json()["error"]["message"]


async def test_calls_of_tools_and_their_choice_are_taken_as_they_come(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    gateway.app.fleet.backends["a"].capabilities = Capabilities(tools=True)
    function = {"name": "f", "arguments": "{}"}
    calls = [{"id": "c", "type": "function", "function": function}]
    messages = [
        *CHAT["messages"],
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c", "content": "1"},
        {"role": "assistant", "content": "x", "tool_calls": None},
        {"role": "user", "content": "go on"},
    ]
    choice = {"type": "function", "function": {"name": "f"}}
    body = {"model": "m", "messages": messages, "tool_choice": choice}
    body["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    async with gateway.client() as client:
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    (request,) = gateway.scripted["a"].requests
    assert [bytes(call) for call in request.messages[1].tool_calls] == [
        b'{"id":"c","type":"function","function":{"name":"f","arguments":"{}"}}'
    ]
    assert request.messages[3].tool_calls is None
    assert bytes(request.fields["tool_choice"]) == b'{"type":"function","function":{"name":"f"}}'


async def test_keys_are_asked_for_everywhere_on_the_data_port(serve_gateway) -> None:
    keys = {"team": Key(hash=hash_of("secret"), tenant="acme")}
    gateway = await serve_gateway(config(keys=keys))
    async with gateway.client() as client:
        for path in ("/v1/models", "/v1/models/m"):
            assert (await client.get(path)).status_code == 401
        refused = await client.post("/v1/chat/completions", json=CHAT)
        headers = {"authorization": "Bearer secret"}
        served = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
    assert refused.status_code == 401
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert served.status_code == 200
    assert gateway.scripted["a"].requests[0].identity.tenant == "acme"


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1", True), ("x y", False), ("a" * 65, False), ("a\tb", False)]
)
async def test_a_request_id_is_kept_if_it_is_harmless(serve_gateway, given, kept) -> None:
    gateway = await serve_gateway(config())
    async with gateway.client() as client:
        headers = {"x-request-id": given}
        response = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert (response.headers["x-request-id"] == given) is kept


async def test_wrong_paths_and_methods_answer_in_the_same_shape(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    async with gateway.client() as client:
        assert (await client.get("/v1/nothing")).json()["error"]["code"] == "not_found"
        wrong = await client.get("/v1/chat/completions")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        assert (await client.delete("/v1/models")).status_code == 405
        unknown = await client.get("/v1/models/none")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


async def test_the_admin_port_tells_of_health_fleet_and_decisions(serve_gateway) -> None:
    gateway = await serve_gateway(config("a", "b"))
    async with gateway.client() as client, gateway.admin() as admin:
        answers = await asyncio.gather(
            *(client.post("/v1/chat/completions", json=CHAT) for _ in range(4))
        )
        assert (await admin.get("/healthz")).status_code == 200
        assert (await admin.get("/readyz")).json()["ready"] is True
        rows = {row["name"]: row for row in (await admin.get("/backends")).json()["backends"]}
        assert rows["a"]["state"] == "healthy"
        assert rows["a"]["requests"] + rows["b"]["requests"] == 4
        request_id = answers[0].headers["x-request-id"]
        decision = (await admin.get(f"/decisions/{request_id}")).json()
        assert decision["served_by"] == answers[0].headers["x-forebay-backend"]
        assert {c["backend"] for c in decision["candidates"]} == {"a", "b"}
        assert decision["outcome"]["result"] == "ok"
        assert len((await admin.get("/decisions?limit=3")).json()["decisions"]) == 3
        assert (await admin.get("/decisions/none")).status_code == 404
        metrics = (await admin.get("/metrics")).text
        names = [plugin["name"] for plugin in (await admin.get("/plugins")).json()["plugins"]]
    assert (
        'forebay_requests_total{endpoint="chat",model="m",outcome="ok",stream="false"} 4' in metrics
    )
    assert "scripted" in names
    assert "policies" in names


async def test_not_ready_while_a_model_has_no_backend(serve_gateway) -> None:
    gateway = await serve_gateway(config())
    gateway.app.fleet.backends["a"].health.draining = True
    async with gateway.admin() as admin:
        response = await admin.get("/readyz")
    assert response.status_code == 503
    assert response.json()["models_without_backend"] == ["m"]
