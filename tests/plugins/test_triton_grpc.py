"""Triton by gRPC: what is asked, in which call, and what each call's end means."""

from __future__ import annotations

import asyncio
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
from grpc import StatusCode

from forebay.api import (
    Attempt,
    BackendBusy,
    BackendError,
    BackendFailed,
    BackendGarbage,
    BackendRefused,
    BackendTimeout,
    ConfigError,
    ConnectFailed,
    Delta,
    Embeddings,
    EmbedRequest,
    Finished,
    GenerateRequest,
    Inference,
    InferRequest,
    Sampling,
    StreamTruncated,
    Timeouts,
)
from forebay.testing import Scenario, adapter_context, chat_request
from forebay.testing.adapter import collect, until
from forebay.testing.answer import read_answer
from forebay_plugins.triton import TritonAdapter, TritonSettings


@pytest.fixture(scope="session")
def fake() -> ModuleType:
    return fake_from("triton_grpc_server")


@pytest.fixture(scope="session")
def models() -> dict[str, Any]:
    found: dict[str, Any] = fake_from("triton_servers").MODELS
    return found


def fake_from(name: str) -> ModuleType:
    spec = spec_from_file_location(name, Path(__file__).parents[1] / "fakes" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@asynccontextmanager
async def before(server: Any, model: str = "ensemble", **settings: Any) -> AsyncIterator[Any]:
    async with server.serving() as url:
        made = TritonSettings(adapter="triton", url=url, protocol="grpc", model=model, **settings)
        adapter = TritonAdapter(made, adapter_context())
        await adapter.start()
        try:
            yield adapter
        finally:
            await adapter.aclose()


def asking(text: str = "Hello", **sampling: Any) -> GenerateRequest:
    request = chat_request(text, endpoint="completions")
    return msgspec.structs.replace(request, sampling=Sampling(**{"max_tokens": 16, **sampling}))


def server_of(fake: ModuleType, models: Any, model: Any) -> Any:
    return fake.GrpcServer(models, True, model)


async def test_the_tensors_of_a_request(fake: ModuleType, models: dict[str, Any]) -> None:
    server = server_of(fake, models, fake.model_in(Scenario.HEALTHY, lambda: server))
    request = msgspec.structs.replace(
        asking(seed=2**40, stop=("a", "bc")),
        fields={"embedding_bias_words": msgspec.Raw(b"1"), "end_id": msgspec.Raw(b"7")},
        extra=("end_id",),
    )
    headers = {"traceparent": "00-aa-bb-01", "x-request-id": "r"}
    settings = {"api_key": "k", "headers": {"X-Tenant": "t"}}
    async with before(server, **settings) as adapter:
        events = [event async for event in adapter.stream(request, Attempt(headers=headers))]
    assert isinstance(events[-1], Finished)
    (asked,) = server.asked
    assert asked.model_name == "ensemble"
    assert asked.parameters["triton_enable_empty_final_response"].bool_param is True
    tensors = {
        tensor.name: (tensor.datatype, list(tensor.shape), content)
        for tensor, content in zip(asked.inputs, asked.raw_input_contents, strict=True)
    }
    one = struct.pack("<f", 1.0)
    words = b"\x01\x00\x00\x00a\x02\x00\x00\x00bc"
    assert tensors == {
        "text_input": ("BYTES", [1, 1], b"\x05\x00\x00\x00Hello"),
        "max_tokens": ("INT32", [1, 1], struct.pack("<i", 16)),
        "temperature": ("FP32", [1, 1], one),
        "top_p": ("FP32", [1, 1], one),
        "random_seed": ("UINT64", [1, 1], struct.pack("<Q", 2**40)),
        "stop_words": ("BYTES", [1, 2], words),
        "end_id": ("INT32", [1, 1], struct.pack("<i", 7)),
        "stream": ("BOOL", [1, 1], b"\x01"),
        "exclude_input_in_output": ("BOOL", [1, 1], b"\x01"),
        "return_num_input_tokens": ("BOOL", [1, 1], b"\x01"),
        "return_num_output_tokens": ("BOOL", [1, 1], b"\x01"),
        "return_perf_metrics": ("BOOL", [1, 1], b"\x01"),
    }
    metadata = server.metadata[0]
    assert metadata["triton_grpc_error"] == "true"
    assert metadata["authorization"] == "Bearer k"
    assert metadata["x-tenant"] == "t"
    assert {name: metadata[name] for name in headers} == headers


async def test_a_model_without_batches_gets_flat_tensors(
    fake: ModuleType, models: dict[str, Any]
) -> None:
    server = server_of(fake, models, fake.model_in(Scenario.HEALTHY, lambda: server))
    async with before(server, "vllm_model") as adapter:
        await collect(adapter, asking())
    assert {tuple(tensor.shape) for tensor in server.asked[0].inputs} == {(1,)}


async def test_a_field_of_the_wrong_type_is_named(fake: ModuleType, models: dict[str, Any]) -> None:
    server = server_of(fake, models, None)
    request = msgspec.structs.replace(
        asking(), fields={"end_id": msgspec.Raw(b'"x"')}, extra=("end_id",)
    )
    async with before(server) as adapter:
        with pytest.raises(BackendRefused, match="INT32") as raised:
            await collect(adapter, request)
    assert raised.value.param == "end_id"
    assert not server.asked


def failing(code: StatusCode, said: str, after: int, fake: ModuleType) -> Any:
    async def model(request: Any, context: Any) -> AsyncIterator[Any]:
        for _ in range(after):
            yield fake.Said(request).piece(" a")
        await context.abort(code, said)

    return model


@pytest.mark.parametrize(
    ("code", "said", "after", "error"),
    [
        (StatusCode.UNAVAILABLE, "Exceeds maximum queue size", 0, BackendBusy),
        (StatusCode.UNAVAILABLE, "shutting down", 1, StreamTruncated),
        (StatusCode.NOT_FOUND, "'m' has no available versions", 0, BackendBusy),
        (StatusCode.NOT_FOUND, "unknown model: 'm' is not found", 0, BackendFailed),
        (StatusCode.INVALID_ARGUMENT, "unexpected shape", 0, BackendRefused),
        (StatusCode.UNIMPLEMENTED, "decoupled", 0, BackendRefused),
        (StatusCode.INTERNAL, "CUDA", 0, BackendFailed),
        (StatusCode.INTERNAL, "CUDA", 1, BackendFailed),
        (StatusCode.UNKNOWN, "", 0, BackendFailed),
        (StatusCode.UNAUTHENTICATED, "no", 0, BackendFailed),
        (StatusCode.CANCELLED, "cancelled", 1, BackendFailed),
    ],
)
async def test_statuses(
    fake: ModuleType,
    models: dict[str, Any],
    code: StatusCode,
    said: str,
    after: int,
    error: type[BackendError],
) -> None:
    server = server_of(fake, models, failing(code, said, after, fake))
    async with before(server) as adapter:
        with pytest.raises(error) as raised:
            await collect(adapter, asking())
    assert raised.type is error
    if error is not BackendBusy:
        assert said in raised.value.message


@pytest.mark.parametrize(
    ("said", "after", "error"),
    [
        ("Request for unknown model: 'x' is not found", 0, BackendFailed),
        ("'x' has no available versions", 0, BackendBusy),
        ("Exceeds maximum queue size", 0, BackendBusy),
        ("unexpected inference input 'y'", 0, BackendRefused),
        ("the engine has died", 1, BackendFailed),
    ],
)
async def test_an_error_that_stands_in_the_stream(
    fake: ModuleType, models: dict[str, Any], said: str, after: int, error: type[BackendError]
) -> None:
    """As older servers do always, newer ones before they begin."""

    async def model(request: Any, context: Any) -> AsyncIterator[Any]:
        for _ in range(after):
            yield fake.Said(request).piece(" a")
        yield fake.pb.ModelStreamInferResponse(error_message=said)

    server = server_of(fake, models, model)
    server.version = "2.67.0"
    async with before(server) as adapter:
        with pytest.raises(error) as raised:
            await collect(adapter, asking())
    assert raised.type is error
    assert "triton_grpc_error" not in server.metadata[0]


async def test_what_is_no_response(fake: ModuleType, models: dict[str, Any]) -> None:
    async def wrong(request: Any, context: Any) -> AsyncIterator[Any]:
        answer = fake.Said(request).piece(" a")
        del answer.infer_response.raw_output_contents[0]
        yield answer

    async with before(server_of(fake, models, wrong)) as adapter:
        with pytest.raises(BackendGarbage, match="cannot be read"):
            await collect(adapter, asking())


async def test_the_server_is_told_of_the_deadline(fake: ModuleType, models: dict[str, Any]) -> None:
    left: list[float | None] = []

    async def model(request: Any, context: Any) -> AsyncIterator[Any]:
        left.append(context.time_remaining())
        if len(left) > 1:
            await context.abort(StatusCode.DEADLINE_EXCEEDED, "too late")
        yield fake.response(request, final=True, text_output=("BYTES", fake.text(" a")))

    async with before(server_of(fake, models, model)) as adapter:
        attempt = Attempt(timeouts=Timeouts(total=0))
        assert [event async for event in adapter.stream(asking(), attempt)]
        with pytest.raises(BackendTimeout) as raised:
            await collect(adapter, asking())
    assert raised.value.phase == "total"
    assert left[0] is None
    assert left[1] is not None
    assert 590 < left[1] < 602  # gRPC rounds it up


async def test_two_choices_at_once_and_one_ends_early(
    fake: ModuleType, models: dict[str, Any]
) -> None:
    """A stop string ends its own choice at the server; the other one goes on."""
    reached = asyncio.Event()

    async def model(request: Any, context: Any) -> AsyncIterator[Any]:
        said = fake.Said(request)
        seed = dict(
            zip([one.name for one in request.inputs], request.raw_input_contents, strict=True)
        )
        try:
            if struct.unpack("<Q", seed["random_seed"]) == (0,):
                while True:
                    yield said.piece(" END")
                    await asyncio.sleep(0.005)
            await reached.wait()
            yield said.piece(" on")
            yield fake.response(request, final=True)
        finally:
            reached.set()

    server = server_of(fake, models, model)
    request = msgspec.structs.replace(asking(stop=("END",), seed=0), n=2)
    async with before(server) as adapter:
        answer = read_answer(request, await collect(adapter, request))
        assert answer.texts == {0: " ", 1: " on"}
        await until(lambda: server.running == 0, 1)


async def test_leaving_ends_every_choice(fake: ModuleType, models: dict[str, Any]) -> None:
    server = server_of(fake, models, fake.model_in(Scenario.ENDLESS, lambda: server))
    request = msgspec.structs.replace(asking(), prompts=("a", "b", "c"))
    async with before(server) as adapter:
        seen = set()
        async for event in (events := adapter.stream(request, Attempt())):
            if isinstance(event, Delta):
                seen.add(event.index)
            if len(seen) == 3:
                break
        assert server.running == 3
        await events.aclose()
        await until(lambda: server.running == 0, 0.5)


async def test_a_server_that_is_back_is_found_at_once(
    fake: ModuleType, models: dict[str, Any]
) -> None:
    server = server_of(fake, models, fake.model_in(Scenario.HEALTHY, lambda: server))
    async with server.serving() as url:
        settings = TritonSettings(adapter="triton", url=url, protocol="grpc", model="ensemble")
        adapter = TritonAdapter(settings, adapter_context())
        assert (await adapter.probe()).models == ("ensemble", "vllm_model")
        port = server.wires.port
        server.wires.close()
        with pytest.raises(ConnectFailed):
            await until_it_fails(adapter)
        await server.wires.reopen(port)
        for _ in range(40):
            try:
                await adapter.probe()
                break
            except ConnectFailed:
                await asyncio.sleep(0.1)
        else:
            pytest.fail("it was not found again")
        await adapter.aclose()


async def until_it_fails(adapter: TritonAdapter) -> None:
    for _ in range(100):
        with suppress(StreamTruncated, BackendBusy):  # the call that lost the connection
            await adapter.probe()
        await asyncio.sleep(0.02)


NUMBERS = {
    "inputs": [{"name": "t", "datatype": "BYTES", "shape": [-1, 1]}],
    "outputs": [{"name": "e", "datatype": "FP32", "shape": [-1, 2]}],
}


def embedding(fake: ModuleType) -> Any:
    async def model(request: Any, context: Any) -> AsyncIterator[Any]:
        if not request.inputs:
            await context.abort(StatusCode.INVALID_ARGUMENT, "expected 1 inputs but got 0")
        rows = request.inputs[0].shape[0]
        answer = fake.pb.ModelInferResponse(model_name="embedder", model_version="1")
        answer.outputs.add(name="e", datatype="FP32", shape=[rows, 2])
        answer.raw_output_contents.append(struct.pack("<ff", 1.0, 2.0) * rows)
        yield answer

    return fake.GrpcServer({"embedder": NUMBERS}, False, model)


async def test_embeddings(fake: ModuleType) -> None:
    server = embedding(fake)
    texts = tuple(f"text {number}" for number in range(17))
    async with before(server, "embedder") as adapter:
        assert (await adapter.probe()).endpoints == {"embeddings", "infer"}
        request = EmbedRequest(id="1", model="m", created=1, inputs=texts)
        result = await adapter.perform(request, Attempt())
    assert isinstance(result, Embeddings)
    assert result.vectors == ((1.0, 2.0),) * 17
    assert [asked.inputs[0].shape[0] for asked in server.asked] == [16, 1]


async def test_infer(fake: ModuleType) -> None:
    server = embedding(fake)
    body = {"inputs": [{"name": "t", "datatype": "BYTES", "shape": [1, 1], "data": ["a"]}]}
    async with before(server, "embedder") as adapter:
        request = InferRequest(
            id="1", model="m", created=1, body=msgspec.json.encode(body), version="3"
        )
        attempt = Attempt(headers={"traceparent": "00-aa-bb-01"})
        result = await adapter.perform(request, attempt)
        assert isinstance(result, Inference)
        assert msgspec.json.decode(result.body)["outputs"][0]["data"] == [1.0, 2.0]
        with pytest.raises(BackendRefused, match="expected 1 inputs"):
            await adapter.perform(
                msgspec.structs.replace(request, body=b'{"inputs":[]}'), Attempt()
            )
    assert server.asked[0].model_version == "3"
    assert server.metadata[0]["traceparent"] == "00-aa-bb-01"


async def test_a_server_that_hides_its_repository(fake: ModuleType, models: dict[str, Any]) -> None:
    server = server_of(fake, models, None)
    server.index = (StatusCode.UNAVAILABLE, "This protocol is restricted")
    async with before(server) as adapter:
        assert (await adapter.probe()).models == ("ensemble",)


def test_what_grpc_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith(("grpc", "forebay_plugins.triton_grpc", "forebay_plugins.kserve_grpc")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "grpc", None)
    settings = TritonSettings(adapter="triton", url="http://t:1", protocol="grpc", model="m")
    with pytest.raises(ConfigError, match=r"pip install 'forebay\[triton-grpc\]'"):
        TritonAdapter(settings, adapter_context())
