"""What Triton's models are asked, and what is made of their answers."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from msgspec import Raw

from forebay.api import (
    Attempt,
    BackendBusy,
    BackendError,
    BackendFailed,
    BackendGarbage,
    BackendRefused,
    ConfigError,
    Delta,
    Embeddings,
    EmbedRequest,
    Finished,
    GenerateRequest,
    Inference,
    InferRequest,
    Load,
    Sampling,
    StreamTruncated,
    TokenizeRequest,
    Unsupported,
    Usage,
)
from forebay.testing import Exchange, ScriptedServer, adapter_context, chat_request
from forebay.testing.adapter import collect, until
from forebay.testing.answer import Answer, read_answer
from forebay_plugins.triton import TritonAdapter, TritonSettings


@pytest.fixture(scope="session")
def server() -> ModuleType:
    path = Path(__file__).parents[1] / "fakes" / "triton_servers.py"
    spec = spec_from_file_location("triton_servers", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@asynccontextmanager
async def serving(
    script: Any, model: str = "ensemble", **settings: Any
) -> AsyncIterator[tuple[TritonAdapter, ScriptedServer]]:
    async with ScriptedServer(script) as server:
        made = TritonSettings(
            adapter="triton", url=server.url, metrics_url=server.url, model=model, **settings
        )
        adapter = TritonAdapter(made, adapter_context())
        await adapter.start()
        try:
            yield adapter, server
        finally:
            await adapter.aclose()


def asking(text: str = "Hello", **sampling: Any) -> GenerateRequest:
    request = chat_request(text, endpoint="completions")
    return msgspec.structs.replace(request, sampling=Sampling(**{"max_tokens": 16, **sampling}))


def with_extra(**fields: object) -> GenerateRequest:
    raw = {name: Raw(msgspec.json.encode(value)) for name, value in fields.items()}
    return msgspec.structs.replace(asking(), fields=raw, extra=tuple(fields))


async def sent(
    server: ModuleType, request: GenerateRequest, model: str = "ensemble", **settings: Any
) -> dict[str, Any]:
    """What that request asks of the model; of vLLM's, its sampling parameters."""
    async with serving(server.serve, model, **settings) as (adapter, running):
        await collect(adapter, request)
    exchange = running.exchanges[-1]
    assert exchange.path == f"/v2/models/{model}/generate_stream"
    body: dict[str, Any] = exchange.json
    switches = {"exclude_input_in_output", "return_num_input_tokens", "return_num_output_tokens"}
    switches |= {"stream"}
    assert all(body.pop(name) is True for name in switches)
    if model == "vllm_model":
        assert body.pop("return_finish_reason") is True
        parameters: dict[str, Any] = json.loads(body.pop("sampling_parameters"))
        assert set(body) == {"text_input"}
        return parameters
    assert body.pop("text_input") == "Hello"
    assert body.pop("return_perf_metrics") is True
    return body


async def refused(server: ModuleType, request: GenerateRequest, model: str = "ensemble") -> str:
    """The field for which the adapter refuses it, without asking the model."""
    async with serving(server.serve, model) as (adapter, running):
        with pytest.raises(BackendRefused) as raised:
            await collect(adapter, request)
    assert {exchange.method for exchange in running.exchanges} == {"GET"}
    assert raised.value.status == 400
    return raised.value.param or ""


# What TensorRT-LLM is asked

#: By itself it would take the likeliest token.
NEUTRAL = {"temperature": 1.0, "top_p": 1.0}


@pytest.mark.parametrize(
    ("sampling", "tensors"),
    [
        ({}, {}),
        ({"max_tokens": None}, {"max_tokens": 16}),
        ({"max_tokens": 3}, {"max_tokens": 3}),
        ({"temperature": 0.5}, {"temperature": 0.5}),
        ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}),
        ({"temperature": 0.5, "top_k": 4}, {"temperature": 0.5, "top_k": 4}),
        ({"top_k": -1}, {}),
        ({"frequency_penalty": 0.0, "min_p": 0.0, "repetition_penalty": 1.0}, {}),
        ({"frequency_penalty": 0.5}, {"frequency_penalty": 0.5}),
        ({"presence_penalty": 0.5}, {"presence_penalty": 0.5}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"min_tokens": 2}, {"min_length": 2}),
        ({"seed": 2**40}, {"random_seed": 2**40}),
        ({"stop": ("a", "b")}, {"stop_words": ["a", "b"]}),
        ({"ignore_eos": True}, {"end_id": -1}),
        ({"logprobs": 0}, {"return_log_probs": True}),
    ],
)
async def test_sampling_as_tensors(
    server: ModuleType, sampling: dict[str, Any], tensors: dict[str, Any]
) -> None:
    plain = {"max_tokens": 16, **NEUTRAL}
    assert await sent(server, asking(**sampling)) == {**plain, **tensors}


async def test_the_likeliest_token_has_no_temperature(server: ModuleType) -> None:
    body = await sent(server, asking(temperature=0.0, top_p=0.9))
    assert body == {"max_tokens": 16, "top_k": 1}


async def test_further_fields_as_tensors(server: ModuleType) -> None:
    body = await sent(server, with_extra(bad_words=["sea"], beam_width=1, end_id=7))
    assert body == {"max_tokens": 16, **NEUTRAL, "bad_words": ["sea"], "end_id": 7}


async def test_a_schema_as_a_guide(server: ModuleType) -> None:
    def wanting(**wanted: Any) -> GenerateRequest:
        fields = {"response_format": Raw(msgspec.json.encode(wanted))}
        return msgspec.structs.replace(asking(), fields=fields, needs_schema=True)

    schema = {"type": "object"}
    body = await sent(server, wanting(type="json_schema", json_schema={"schema": schema}))
    assert body["guided_decoding_guide_type"] == "json_schema"
    assert json.loads(body["guided_decoding_guide"]) == schema
    body = await sent(server, wanting(type="json_object"))
    assert body == {"max_tokens": 16, **NEUTRAL, "guided_decoding_guide_type": "json"}
    assert await refused(server, wanting(type="regex", regex="a")) == "response_format"
    assert await refused(server, wanting(type="json_object"), "vllm_model") == "response_format"


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (asking(min_p=0.1), "min_p"),
        (asking(seed=-1), "seed"),
        (asking(logprobs=2), "logprobs"),
        (with_extra(beam_width=2), "beam_width"),
        (with_extra(logit_bias={"1": 2}), "logit_bias"),
        (with_extra(max_token=3), "max_token"),
        (with_extra(stream=False), "stream"),
        (with_extra(length_penalty=1.0), "length_penalty"),
        (msgspec.structs.replace(asking(), prompts=((1, 2),)), "prompt"),
        (msgspec.structs.replace(asking(logprobs=0), echo=True), "echo"),
    ],
)
async def test_what_the_ensemble_has_no_tensor_for(
    server: ModuleType, request_: GenerateRequest, field: str
) -> None:
    assert await refused(server, request_) == field


# What vLLM's backend is asked


async def test_sampling_as_json(server: ModuleType) -> None:
    said: dict[str, Any] = {
        "temperature": 0.0,
        "top_k": -1,
        "min_p": 0.1,
        "seed": -3,
        "ignore_eos": True,
    }
    request = asking(**said, stop=("a",), min_tokens=2)
    parameters = await sent(server, request, "vllm_model")
    assert parameters == {
        "max_tokens": 16,
        "top_p": 1.0,
        **said,
        "stop": ["a"],
        "min_tokens": 2,
    }


async def test_further_fields_as_json(server: ModuleType) -> None:
    parameters = await sent(server, with_extra(logit_bias={"7": -1}), "vllm_model")
    assert parameters == {"max_tokens": 16, **NEUTRAL, "logit_bias": {"7": -1}}
    assert await refused(server, with_extra(best_of=2), "vllm_model") == "best_of"
    assert await refused(server, asking(logprobs=0), "vllm_model") == "logprobs"


# Chat


async def test_chat_ends_where_the_template_says(server: ModuleType) -> None:
    async with serving(server.serve, chat_template="chatml", max_tokens=99) as (adapter, running):
        request = chat_request(max_tokens=None, stop=["a"])
        sampling = Sampling(stop=("a",))
        await collect(adapter, msgspec.structs.replace(request, sampling=sampling))
    body = running.exchanges[-1].json
    assert body["text_input"] == ("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert body["stop_words"] == ["a", "<|im_end|>"]
    assert body["max_tokens"] == 99


async def test_without_a_template_there_is_no_chat(server: ModuleType) -> None:
    async with serving(server.serve) as (adapter, _):
        assert (await adapter.probe()).endpoints == {"completions"}
        with pytest.raises(Unsupported, match="chat_template"):
            await collect(adapter, chat_request())


async def test_a_template_that_is_not_there_stops_the_start(server: ModuleType) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        async with serving(server.serve, chat_template="nowhere.jinja"):
            pass


# What comes back


def saying(*responses: Any) -> Any:
    """A model that answers these; bytes as they are."""

    async def script(exchange: Exchange) -> None:
        exchange.begin("text/event-stream; charset=utf-8")
        for response in responses:
            data = response if isinstance(response, bytes) else json.dumps(response).encode()
            exchange.send(b"data: " + data + b"\n\n")

    return script


def before(server: ModuleType, script: Any, decoupled: bool = True) -> Any:
    """That model behind a Triton that answers all other questions."""

    async def both(exchange: Exchange) -> None:
        if exchange.path.endswith("/generate_stream"):
            await script(exchange)
        elif exchange.method == "GET":
            server.get(exchange, None, decoupled)
        else:
            await server.serve(exchange)

    return both


async def answer_to(
    server: ModuleType, request: GenerateRequest, *responses: Any, **settings: Any
) -> Answer:
    async with serving(before(server, saying(*responses)), **settings) as (adapter, _):
        return read_answer(request, await collect(adapter, request))


def texts(*pieces: str, **more: Any) -> list[dict[str, Any]]:
    return [{"text_output": text, **more} for text in pieces]


async def test_a_stop_string_is_cut_off_wherever_it_is_cut(server: ModuleType) -> None:
    request = asking(stop=("END",))
    answer = await answer_to(server, request, *texts("one ", "E", "N", "D more", "never"))
    assert (answer.texts, answer.finishes) == ({0: "one "}, {0: "stop"})
    answer = await answer_to(server, request, *texts("one ", "E", "N"))
    assert (answer.texts, answer.finishes) == ({0: "one EN"}, {0: "stop"})


async def test_nothing_matters_after_a_stop_string(server: ModuleType) -> None:
    pieces = [*texts("one END"), {"error": "cancelled"}]
    answer = await answer_to(server, asking(stop=("END",)), *pieces)
    assert (answer.texts, answer.finishes) == ({0: "one "}, {0: "stop"})


async def test_a_model_that_does_not_heed_its_stop_words_is_left(server: ModuleType) -> None:
    async def script(exchange: Exchange) -> None:
        exchange.begin("text/event-stream")
        while True:
            exchange.send(b'data: {"text_output":" END"}\n\n')
            await asyncio.sleep(0.005)

    async with serving(before(server, script)) as (adapter, running):
        answer = read_answer(asking(), await collect(adapter, asking(stop=("END",))))
        assert answer.texts == {0: " "}
        await until(lambda: not running.running, 1)


async def test_vllm_keeps_what_it_left_in_the_text(server: ModuleType) -> None:
    """As with `include_stop_str_in_output`."""
    pieces = [{"text_output": "one END", "finish_reason": "stop"}]
    answer = await answer_to(server, asking(stop=("END",)), *pieces, model="vllm_model")
    assert answer.texts == {0: "one END"}


async def test_an_accumulated_text(server: ModuleType) -> None:
    pieces = texts("one", "one two", "one two three")
    assert (await answer_to(server, asking(), *pieces, accumulates=True)).pieces == 3
    answer = await answer_to(server, asking(), *pieces, accumulates=True)
    assert answer.texts == {0: "one two three"}


@pytest.mark.parametrize(
    ("counts", "tokens"), [([1, 2, 3, 3], 3), ([1, 1, 1, 0], 3), ([2, 1, 2, 0], 5), ([2, 3, 5], 5)]
)
async def test_counts_of_all_tokens_or_of_the_new_ones(
    server: ModuleType, counts: list[int], tokens: int
) -> None:
    said = ["a", "b", "c", ""]
    pieces = [
        {"text_output": text, "num_output_tokens": count, "num_input_tokens": 4}
        for text, count in zip(said, counts, strict=False)
    ]
    answer = await answer_to(server, asking(max_tokens=tokens), *pieces)
    assert answer.finished.usage == Usage(4, tokens)
    assert answer.finishes == {0: "length"}
    answer = await answer_to(server, asking(max_tokens=tokens + 1), *pieces)
    assert answer.finishes == {0: "stop"}


async def test_what_is_not_reported_is_counted(server: ModuleType) -> None:
    answer = await answer_to(server, asking(max_tokens=2), *texts("a", "b"))
    assert answer.finished.usage == Usage(0, 2, source="counted")
    assert answer.finishes == {0: "length"}


@pytest.mark.parametrize(
    "numbers", [[-0.5, [-0.25, -0.125], []], [-0.5, [-0.5, -0.25, -0.125], [-0.5, -0.25, -0.125]]]
)
async def test_logprobs_of_the_new_tokens_or_of_all(server: ModuleType, numbers: list[Any]) -> None:
    said = ["a", "bc", ""]
    pieces = [
        {"text_output": text, "output_log_probs": found}
        for text, found in zip(said, numbers, strict=True)
    ]
    async with serving(before(server, saying(*pieces))) as (adapter, _):
        events = await collect(adapter, asking(logprobs=0))
    found = [one for event in events if isinstance(event, Delta) for one in event.logprobs]
    assert [(one.token, one.logprob) for one in found] == [("a", -0.5), ("bc", -0.25), ("", -0.125)]


async def test_several_choices_with_seeds_of_their_own(server: ModuleType) -> None:
    request = msgspec.structs.replace(asking(seed=5), prompts=("a", "b"), n=2)
    async with serving(server.serve) as (adapter, running):
        answer = read_answer(request, await collect(adapter, request))
    asked = [e.json for e in running.exchanges if e.method == "POST"]
    assert [(one["text_input"], one["random_seed"]) for one in asked] == [
        ("a", 5),
        ("a", 6),
        ("b", 5),
        ("b", 6),
    ]
    assert answer.finished.usage == Usage(22, 20)


async def test_echo(server: ModuleType) -> None:
    request = msgspec.structs.replace(asking("one"), echo=True)
    assert (await answer_to(server, request, *texts(" two"))).texts == {0: "one two"}


async def test_a_model_that_does_not_stream(server: ModuleType) -> None:
    script = before(server, saying({"text_output": "one two"}), decoupled=False)
    async with serving(script) as (adapter, running):
        answer = read_answer(asking(), await collect(adapter, asking()))
        assert (await adapter.probe()).endpoints == {"completions", "infer"}
    assert answer.texts == {0: "one two"}
    (asked,) = (e.json for e in running.exchanges if e.path.endswith("generate_stream"))
    assert asked["stream"] is False


async def test_connections_are_used_again(server: ModuleType) -> None:
    """Also after an answer that ended at a stop string."""
    request = asking(stop=("END",))
    async with serving(before(server, saying(*texts("one END", "")))) as (adapter, running):
        for _ in range(3):
            await collect(adapter, request)
            assert len(running.connections) == 1


@pytest.mark.parametrize(
    ("responses", "error"),
    [
        ([{"text_output": "a"}, {"error": "boom"}], BackendFailed),
        ([{"text_output": "a"}, b"{"], BackendGarbage),
        ([{"text_output": ["a", "b"]}], BackendGarbage),
        ([[1]], BackendGarbage),
        ([{"text_output": "a", "finish_reason": "abort"}], StreamTruncated),
    ],
)
async def test_what_is_no_answer(
    server: ModuleType, responses: list[Any], error: type[BackendError]
) -> None:
    with pytest.raises(error):
        await answer_to(server, asking(), *responses)


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (400, b'{"error":"Model version not ready"}', BackendBusy),
        (404, b'{"error":"model \'x\' has no available versions"}', BackendBusy),
        (404, b'{"error":"Request for unknown model: \'x\' is not found"}', BackendFailed),
        (503, b'{"error":"Exceeds maximum queue size"}', BackendBusy),
        (400, b'data: {"error":"max_tokens too large"}\n\n', BackendRefused),
        (501, b'{"error":"decoupled"}', BackendRefused),
        (500, b'{"error":"CUDA"}', BackendFailed),
        (401, b"", BackendFailed),
    ],
)
async def test_errors_before_the_answer(
    server: ModuleType, status: int, body: bytes, error: type[BackendError]
) -> None:
    async def script(exchange: Exchange) -> None:
        exchange.answer(status, body)

    async with serving(before(server, script)) as (adapter, _):
        with pytest.raises(error) as raised:
            await collect(adapter, asking())
    if error is BackendRefused:
        assert raised.value.message in ("max_tokens too large", "decoupled")
        assert raised.value.status == 400


# Probes and load


async def test_probe(server: ModuleType) -> None:
    async with serving(server.serve, chat_template="plain", max_context=4096) as (adapter, _):
        found = await adapter.probe()
    assert found.endpoints == {"completions", "chat"}
    assert found.models == ("ensemble", "vllm_model")
    assert (found.version, found.max_context) == ("2.51.0", 4096)
    assert found.logprobs
    assert found.schema


async def test_a_kind_that_it_is_not(server: ModuleType) -> None:
    for kind in ("vllm", "embedding"):
        async with serving(server.serve, kind=kind) as (adapter, _):
            with pytest.raises(BackendFailed, match=f"kind: {kind}"):
                await adapter.probe()


async def test_any_model_can_be_had_for_infer_alone(server: ModuleType) -> None:
    script = before(server, saying(), decoupled=False)
    async with serving(script, kind="infer") as (adapter, _):
        assert (await adapter.probe()).endpoints == {"infer"}
        with pytest.raises(Unsupported):
            await collect(adapter, asking())


async def test_the_model_must_be_named(server: ModuleType) -> None:
    async with serving(server.serve, model="") as (adapter, _):
        with pytest.raises(BackendFailed, match="`model`"):
            await adapter.probe()


async def test_load(server: ModuleType) -> None:
    async with serving(server.serve) as (adapter, _):
        assert await adapter.load() == Load(running=5, waiting=2, kv_usage=0.25)
    async with serving(server.serve, model="vllm_model", engine="none") as (adapter, _):
        assert await adapter.load() == Load(waiting=3)
    settings = TritonSettings(adapter="triton", url="http://127.0.0.1:9", model="m")
    assert await TritonAdapter(settings, adapter_context()).load() is None


# Work that is no generation


def embedding(shape: list[int], size: int, out: list[int]) -> Any:
    """A model that gives [1, 2] for each text, in a tensor of this shape; and what it was asked."""

    async def script(exchange: Exchange) -> None:
        if exchange.path.endswith("/config"):
            exchange.answer(200, {"max_batch_size": size})
        elif exchange.method == "GET":
            inputs = [{"name": "t", "datatype": "BYTES", "shape": shape}]
            outputs = [
                {"name": "ids", "datatype": "INT64", "shape": [-1]},
                {"name": "e", "datatype": "FP32", "shape": [-1, 2]},
            ]
            exchange.answer(200, {"inputs": inputs, "outputs": outputs})
        else:
            (tensor,) = exchange.json["inputs"]
            assert exchange.json["outputs"] == [{"name": "e", "parameters": {"binary_data": True}}]
            head = {"outputs": [{"name": "e", "datatype": "FP32", "shape": out}]}
            body = json.dumps(head).encode()
            headers = {"inference-header-content-length": str(len(body))}
            data = struct.pack("<ff", 1.0, 2.0) * len(tensor["data"])
            kind = {"content-type": "application/octet-stream"}
            exchange.answer(200, body + data, {**headers, **kind})

    return script


@pytest.mark.parametrize(
    ("shape", "size", "asked"),
    [
        ([-1, 1], 2, [[2, 1], [1, 1]]),
        ([-1], 0, [[3]]),
        ([1], 0, [[1], [1], [1]]),
    ],
)
async def test_texts_are_embedded_as_the_model_takes_them(
    shape: list[int], size: int, asked: list[list[int]]
) -> None:
    request = EmbedRequest(id="1", model="m", created=1, inputs=("a", "b", "c"))
    async with serving(embedding(shape, size, [-1, 2])) as (adapter, running):
        result = await adapter.perform(request, Attempt())
    assert isinstance(result, Embeddings)
    assert result.vectors == ((1.0, 2.0),) * 3
    posts = [exchange.json for exchange in running.exchanges if exchange.method == "POST"]
    assert [body["inputs"][0]["shape"] for body in posts] == asked
    assert [text for body in posts for text in body["inputs"][0]["data"]] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"dimensions": 2}, "dimensions"), ({"extra": ("x",)}, "x"), ({"inputs": ((1,),)}, "input")],
)
async def test_what_cannot_be_embedded(changes: dict[str, Any], field: str) -> None:
    request = EmbedRequest(id="1", model="m", created=1, inputs=("a",))
    async with serving(embedding([-1, 1], 2, [1, 2])) as (adapter, running):
        with pytest.raises(BackendRefused) as raised:
            await adapter.perform(msgspec.structs.replace(request, **changes), Attempt())
    assert raised.value.param == field
    assert {exchange.method for exchange in running.exchanges} == {"GET"}


async def test_what_is_no_vector() -> None:
    request = EmbedRequest(id="1", model="m", created=1, inputs=("a",))
    async with serving(embedding([-1, 1], 2, [1, 7])) as (adapter, _):
        with pytest.raises(BackendGarbage, match="one vector for each"):
            await adapter.perform(request, Attempt())


async def test_a_generator_embeds_nothing(server: ModuleType) -> None:
    request = EmbedRequest(id="1", model="m", created=1, inputs=("a",))
    async with serving(server.serve) as (adapter, _):
        with pytest.raises(Unsupported):
            await adapter.perform(request, Attempt())
        with pytest.raises(Unsupported):
            await adapter.perform(TokenizeRequest(id="1", model="m", created=1), Attempt())


async def test_infer_goes_through_untouched() -> None:
    async def script(exchange: Exchange) -> None:
        headers = {"inference-header-content-length": "2", "x-other": "y"}
        exchange.answer(200, b"{}\x00\x01", {**headers, "content-type": "application/octet-stream"})

    request = InferRequest(
        id="1",
        model="m",
        created=1,
        body=b'{"a":1}\x00\xff',
        version="3",
        headers={
            "inference-header-content-length": "7",
            "content-type": "application/octet-stream",
        },
    )
    settings = {"model": "my model", "api_key": "k"}
    async with serving(script, **settings) as (adapter, running):
        attempt = Attempt(headers={"traceparent": "00-aa-bb-01"})
        result = await adapter.perform(request, attempt)
    assert isinstance(result, Inference)
    assert result.body == b"{}\x00\x01"
    assert result.content_type == "application/octet-stream"
    assert result.headers == {"inference-header-content-length": "2"}
    (exchange,) = running.exchanges
    assert exchange.path == "/v2/models/my%20model/versions/3/infer"
    assert exchange.body == request.body
    found = {name: exchange.headers[name] for name in (*request.headers, "traceparent")}
    assert found == {**request.headers, "traceparent": "00-aa-bb-01"}
    assert exchange.headers["authorization"] == "Bearer k"


async def test_the_lane_is_typed_for_all(server: ModuleType) -> None:
    async with serving(server.serve) as (adapter, _):
        for stream in (True, False):
            request = msgspec.structs.replace(asking(), stream=stream, typed=stream)
            events = await collect(adapter, request)
            read_answer(request, events)
            assert isinstance(events[-1], Finished)


# TensorRT-LLM's LLM API, and what vLLM's backend tells beside the text

LLM_API = [
    {"name": name, "datatype": "BYTES", "shape": [1]}
    for name in (
        "text_input",
        "streaming",
        "return_finish_reason",
        *(
            f"sampling_param_{field}"
            for field in (
                "temperature",
                "top_k",
                "top_p",
                "frequency_penalty",
                "presence_penalty",
                "max_tokens",
                "stop",
                "seed",
                "exclude_input_from_output",
            )
        ),
    )
]


METADATA = {"/v2/models/tensorrt_llm", "/v2/models/vllm_model"}


def with_inputs(server: ModuleType, inputs: list[dict[str, Any]], version: str, script: Any) -> Any:
    """A model with these inputs, behind a Triton of this version."""
    rest = before(server, script)

    async def both(exchange: Exchange) -> None:
        if exchange.path == "/v2":
            exchange.answer(200, {"version": version})
        elif exchange.method == "GET" and exchange.path in METADATA:
            outputs = [{"name": "text_output", "datatype": "BYTES", "shape": [-1]}]
            exchange.answer(200, {"inputs": inputs, "outputs": outputs})
        elif exchange.path.endswith("/config"):
            exchange.answer(200, {"model_transaction_policy": {"decoupled": True}})
        else:
            await rest(exchange)

    return both


def said_so_far(*steps: tuple[str, str]) -> Any:
    return saying(*({"text_output": text, "finish_reason": reason} for text, reason in steps))


async def test_the_llm_api(server: ModuleType) -> None:
    said = said_so_far((" a", "None"), (" a b", "None"), (" a b", "length"))
    script = with_inputs(server, LLM_API, "2.70.0", said)
    request = asking(seed=3, stop=("END",), temperature=0.5, presence_penalty=0.5)
    async with serving(script, "tensorrt_llm") as (adapter, running):
        found = await adapter.probe()
        answer = read_answer(request, await collect(adapter, request))
        for unknown in (asking(min_p=0.1), asking(logprobs=0), asking(ignore_eos=True)):
            with pytest.raises(BackendRefused):
                await collect(adapter, unknown)
    assert (found.endpoints, found.logprobs, found.schema) == ({"completions"}, False, False)
    assert (answer.texts, answer.finishes) == ({0: " a b"}, {0: "length"})
    (asked,) = (e.json for e in running.exchanges if e.path.endswith("generate_stream"))
    assert asked == {
        "text_input": "Hello",
        "sampling_param_max_tokens": 16,
        "sampling_param_presence_penalty": 0.5,
        "sampling_param_temperature": 0.5,
        "sampling_param_top_p": 1.0,
        "sampling_param_seed": 3,
        "sampling_param_stop": ["END"],
        "streaming": True,
        "sampling_param_exclude_input_from_output": True,
        "return_finish_reason": True,
    }


@pytest.mark.parametrize("reason", ["cancelled", "timeout", "None"])
async def test_the_llm_api_gives_up(server: ModuleType, reason: str) -> None:
    script = with_inputs(server, LLM_API, "2.70.0", said_so_far((" a", "None"), (" a", reason)))
    async with serving(script, "tensorrt_llm") as (adapter, _):
        with pytest.raises(StreamTruncated):
            await collect(adapter, asking())


VLLM = [
    {"name": name, "datatype": "BYTES", "shape": [1]}
    for name in ("text_input", "sampling_parameters", "return_logprobs", "return_finish_reason")
]


@pytest.mark.parametrize(
    ("version", "field"),
    [
        ("2.51.0", None),
        ("2.54.0", "guided_decoding"),
        ("2.62.0dev", "guided_decoding"),
        ("2.63.0", "structured_outputs"),
        ("3.0.0", "structured_outputs"),
        ("", None),
    ],
)
async def test_a_schema_in_the_words_of_each_vllm(
    server: ModuleType, version: str, field: str | None
) -> None:
    script = with_inputs(server, VLLM, version, said_so_far(("{}", "stop")))
    wanted = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    request = msgspec.structs.replace(
        asking(), fields={"response_format": Raw(msgspec.json.encode(wanted))}, needs_schema=True
    )
    any_object = {"response_format": Raw(b'{"type": "json_object"}')}
    async with serving(script, "vllm_model") as (adapter, running):
        assert (await adapter.probe()).schema == (field is not None)
        if field is None:
            with pytest.raises(BackendRefused, match="vLLM"):
                await collect(adapter, request)
            return
        await collect(adapter, request)
        await collect(adapter, msgspec.structs.replace(request, fields=any_object))
    asked = [
        json.loads(json.loads(e.json["sampling_parameters"])[field])
        for e in running.exchanges
        if e.path.endswith("generate_stream")
    ]
    assert asked == [{"json": {"type": "object"}}, {"json_object": True}]


def place(*tokens: tuple[str, float, int | None]) -> dict[str, Any]:
    return {
        str(number): {"decoded_token": token, "logprob": logprob, "rank": rank}
        for number, (token, logprob, rank) in enumerate(tokens)
    }


async def test_logprobs_of_vllm(server: ModuleType) -> None:
    """The chosen token comes first, whatever its rank."""
    places = [
        [place((" a", -2.0, 9), ("x", -0.1, 1), ("y", -0.2, 2))],
        [place((" b", -0.2, 2), ("x", -0.1, 1)), place(("", -0.3, 1), ("y", -0.4, 2))],
    ]
    responses = [
        {"text_output": text, "finish_reason": reason, "logprobs": json.dumps(told)}
        for text, reason, told in zip((" a", " b"), ("None", "stop"), places, strict=True)
    ]
    end = {"text_output": "", "finish_reason": "stop", "logprobs": "null"}
    script = with_inputs(server, VLLM, "2.63.0", saying(*responses, end))
    async with serving(script, "vllm_model") as (adapter, running):
        assert (await adapter.probe()).logprobs
        events = await collect(adapter, asking(logprobs=2))
    found = [one for event in events if isinstance(event, Delta) for one in event.logprobs]
    assert [(one.token, one.logprob, one.top) for one in found] == [
        (" a", -2.0, (("x", -0.1), ("y", -0.2))),
        (" b", -0.2, (("x", -0.1), (" b", -0.2))),
        ("", -0.3, (("", -0.3), ("y", -0.4))),
    ]
    asked = running.exchanges[-1].json
    assert asked["return_logprobs"] is True
    assert json.loads(asked["sampling_parameters"])["logprobs"] == 2


async def test_logprobs_of_vllm_that_are_none(server: ModuleType) -> None:
    response = {"text_output": " a", "finish_reason": "stop", "logprobs": '{"a": 1}'}
    script = with_inputs(server, VLLM, "2.63.0", saying(response))
    async with serving(script, "vllm_model") as (adapter, _):
        with pytest.raises(BackendGarbage, match="logprobs"):
            await collect(adapter, asking(logprobs=0))


async def test_the_models_own_sampling(server: ModuleType) -> None:
    for model in ("ensemble", "vllm_model"):
        body = await sent(server, asking(), model, neutral_sampling=False)
        assert body == {"max_tokens": 16}
