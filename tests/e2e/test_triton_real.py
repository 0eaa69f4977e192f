"""The adapter before a real Triton: what the fakes claim is true."""

from __future__ import annotations

import asyncio
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest
from openai import AsyncOpenAI, BadRequestError

from forebay.api import (
    Attempt,
    BackendBusy,
    BackendFailed,
    BackendRefused,
    Delta,
    Embeddings,
    EmbedRequest,
    Event,
    GenerateRequest,
    Inference,
    InferRequest,
    Sampling,
    TokenLogprob,
    Usage,
)
from forebay.config import Config, Model
from forebay.loader import load_plugins
from forebay.testing import adapter_context, chat_request
from forebay.testing.adapter import collect, stream
from forebay.testing.answer import Answer, read_answer
from forebay_plugins import triton as plugin
from forebay_plugins.triton import TritonAdapter, TritonSettings

pytestmark = pytest.mark.e2e

BACKENDS = Path(__file__).parents[2] / "scripts" / "backends" / "backends.sh"
PROTOCOLS = ["http", "grpc"]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton") / "log"


def three_free_ports() -> int:
    """The first of three in a row."""
    while True:
        with ExitStack() as held, suppress(OSError):
            first = held.enter_context(socket.create_server(("127.0.0.1", 0)))
            port: int = first.getsockname()[1]
            for more in (1, 2):
                held.enter_context(socket.create_server(("127.0.0.1", port + more)))
            return port


class Triton(NamedTuple):
    url: str
    grpc: str
    metrics: str


@pytest.fixture(scope="module")
def triton(log: Path) -> Iterator[Triton]:
    """A running server."""
    if subprocess.check_output([BACKENDS, "missing", "triton"]):
        pytest.fail("not installed: run scripts/backends/backends.sh install triton")
    port = three_free_ports()
    urls = Triton(*(f"http://127.0.0.1:{port + more}" for more in range(3)))
    with log.open("wb") as out:
        # A model that was unloaded and loaded again keeps the server now and then from ending.
        command = [BACKENDS, "serve", "triton", str(port), "--exit-timeout-secs", "5"]
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        for _ in range(150):
            assert process.poll() is None, log.read_text()[-2000:]
            if "Started Metrics Service" in log.read_text():
                break
            process_wait(process)
        yield urls
    finally:
        process.terminate()
        process.wait(30)


def process_wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(0.2)
    except subprocess.TimeoutExpired:
        return


@asynccontextmanager
async def adapter_for(
    triton: Triton, model: str, protocol: str = "http", **settings: Any
) -> AsyncIterator[TritonAdapter]:
    url = triton.grpc if protocol == "grpc" else triton.url
    made = TritonSettings(
        adapter="triton",
        url=url,
        protocol=protocol,
        model=model,
        metrics_url=triton.metrics,
        **settings,
    )
    adapter = TritonAdapter(made, adapter_context())
    await adapter.start()
    try:
        yield adapter
    finally:
        await adapter.aclose()


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["ensemble", "vllm_model", "tensorrt_llm"])
async def adapter(
    request: pytest.FixtureRequest, triton: Triton, protocol: str
) -> AsyncIterator[TritonAdapter]:
    async with adapter_for(triton, request.param, protocol, chat_template="plain") as made:
        yield made


def asking(text: str, **sampling: Any) -> GenerateRequest:
    request = chat_request(text, endpoint="completions")
    return msgspec.structs.replace(request, sampling=Sampling(**{"max_tokens": 16, **sampling}))


async def ask(adapter: TritonAdapter, request: GenerateRequest) -> Answer:
    return read_answer(request, await collect(adapter, request))


async def test_probe(adapter: TritonAdapter) -> None:
    found = await adapter.probe()
    assert found.endpoints == {"chat", "completions"}
    assert found.version == "2.51.0"
    assert set(found.models) == {"ensemble", "vllm_model", "tensorrt_llm", "embedder"}
    assert found.logprobs == (adapter.settings.model != "tensorrt_llm")


async def test_an_answer_that_ends_by_itself(adapter: TritonAdapter) -> None:
    answer = await ask(adapter, asking("one two three"))
    assert answer.texts == {0: " one two three"}
    assert answer.finishes == {0: "stop"}
    assert answer.pieces == 3
    usage = answer.finished.usage
    assert usage is not None
    if adapter.settings.model == "tensorrt_llm":  # which tells nothing
        assert usage == Usage(0, 3, source="counted")
    else:
        assert usage == Usage(3, 3)


async def test_an_answer_at_its_limit(adapter: TritonAdapter) -> None:
    answer = await ask(adapter, asking("one two three", max_tokens=2))
    assert (answer.texts, answer.finishes) == ({0: " one two"}, {0: "length"})


async def test_chat(adapter: TritonAdapter) -> None:
    answer = await ask(adapter, chat_request("Hello there"))
    assert answer.texts == {0: " User: Hello there Assistant:"}


async def test_every_parameter_is_taken(adapter: TritonAdapter) -> None:
    """Triton checks the type of each tensor."""
    known = {
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.5,
        "seed": 2**40,
        "presence_penalty": 0.5,
        "frequency_penalty": 1.0,
        "stop": ("nowhere", "neither"),
    }
    if adapter.settings.model != "tensorrt_llm":
        known |= {"repetition_penalty": 2.0, "min_tokens": 1, "ignore_eos": True}
    answer = await ask(adapter, asking("one two three four", max_tokens=6, **known))
    more = " one two" if "ignore_eos" in known else ""
    assert answer.texts == {0: " one two three four" + more}


async def test_stop_strings(adapter: TritonAdapter) -> None:
    # Those that cut stop strings off by themselves hold nothing back here, so theirs is one word.
    stop = "two three" if adapter.settings.model == "ensemble" else "two"
    answer = await ask(adapter, asking("one two three four", stop=(stop,)))
    assert (answer.texts, answer.finishes) == ({0: " one "}, {0: "stop"})


async def logprobs(adapter: TritonAdapter, count: int) -> list[TokenLogprob]:
    events = await collect(adapter, asking("one three", logprobs=count))
    return [one for event in events if isinstance(event, Delta) for one in event.logprobs]


async def test_logprobs_of_tensorrt_llm(triton: Triton, protocol: str) -> None:
    async with adapter_for(triton, "ensemble", protocol) as adapter:
        found = await logprobs(adapter, 0)
    assert [one.token for one in found] == [" one", " three"]
    assert [one.logprob for one in found] == pytest.approx([-0.4, -0.6])


async def test_logprobs_of_vllm(triton: Triton, protocol: str) -> None:
    async with adapter_for(triton, "vllm_model", protocol) as adapter:
        none, one, three = [await logprobs(adapter, count) for count in (0, 1, 3)]
    assert none == [TokenLogprob(" one", -1.0), TokenLogprob(" three", -1.0)]
    assert [found.top for found in one] == [(("<1>", -0.5),)] * 2
    assert three[0].top == (("<1>", -0.5), (" one", -1.0), ("<3>", -2.0))


async def test_several_prompts(adapter: TritonAdapter) -> None:
    request = msgspec.structs.replace(asking(""), prompts=("a b", "c"), n=2)
    answer = await ask(adapter, request)
    assert answer.texts == {0: " a b", 1: " a b", 2: " c", 3: " c"}
    assert answer.finished.usage is not None
    if adapter.settings.model != "tensorrt_llm":
        assert answer.finished.usage.prompt_tokens == 3


async def test_failing_in_mid_stream(adapter: TritonAdapter) -> None:
    events: list[Event] = []
    if adapter.settings.model == "tensorrt_llm":
        return  # it knows no `ignore_eos`, without which its stand-in does not get that far
    request = asking("break", ignore_eos=True)
    with pytest.raises(BackendFailed, match="broken in mid-stream"):
        await collect(adapter, request, events)
    assert sum(isinstance(event, Delta) for event in events) == 2


async def test_a_models_own_refusal(adapter: TritonAdapter) -> None:
    with pytest.raises(BackendRefused, match="must be above 0") as raised:
        await collect(adapter, asking("one", max_tokens=-1))
    assert raised.value.status == 400


async def test_closing_frees_the_backend(adapter: TritonAdapter, log: Path) -> None:
    """The model itself says that it was told."""
    before = log.read_text().count("cancelled after")
    events = stream(adapter, asking("one two " * 900, max_tokens=2000))
    for _ in range(3):
        await anext(events)
    await events.aclose()
    for _ in range(100):
        if log.read_text().count("cancelled after") == before + 1:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the model was never told")


async def test_load(adapter: TritonAdapter) -> None:
    load = await adapter.load()
    assert load is not None
    assert (load.running, load.waiting) == (None, 0)


async def test_a_model_that_is_unloaded_is_busy(adapter: TritonAdapter, triton: Triton) -> None:
    model = f"{triton.url}/v2/repository/models/{adapter.settings.model}"
    await ask(adapter, asking("one"))
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        await client.post(f"{model}/unload", json={})
        try:
            for _ in range(100):
                if (await client.get(f"{triton.url}/v2/models/{adapter.settings.model}")).is_error:
                    break
                await asyncio.sleep(0.05)
            with pytest.raises(BackendBusy):
                await adapter.probe()
            with pytest.raises(BackendBusy):
                await collect(adapter, asking("one"))
        finally:
            assert (await client.post(f"{model}/load", json={})).is_success
    await ask(adapter, asking("one"))


async def test_an_unknown_model_is_the_operators_fault(triton: Triton, protocol: str) -> None:
    async with adapter_for(triton, "nonesuch", protocol, kind="infer") as adapter:
        with pytest.raises(BackendFailed, match="nonesuch"):
            await collect(adapter, asking("one"))


def embedding(*texts: str) -> EmbedRequest:
    return EmbedRequest(id="1", model="m", created=1, inputs=texts)


async def test_embeddings_in_more_batches_than_one(triton: Triton, protocol: str) -> None:
    texts = [f"word{i}" for i in range(11)]
    async with adapter_for(triton, "embedder", protocol) as adapter:
        found = await adapter.probe()
        assert found.endpoints == {"embeddings", "infer"}
        result = await adapter.perform(embedding(*texts, "word0"), Attempt())
    assert isinstance(result, Embeddings)
    assert [len(vector) for vector in result.vectors] == [64] * 12
    assert result.vectors[0] == result.vectors[11]
    assert len(set(result.vectors)) > 5


async def infer(adapter: TritonAdapter, body: bytes, **headers: str) -> Inference:
    made = {name.replace("_", "-"): value for name, value in headers.items()}
    request = InferRequest(id="1", model="m", created=1, body=body, version="1", headers=made)
    result = await adapter.perform(request, Attempt())
    assert isinstance(result, Inference)
    return result


async def test_infer_with_tensors_in_json_and_in_binary(triton: Triton) -> None:
    """gRPC is answered to the byte as HTTP is, but for blanks and the order of fields."""
    tensor = {"name": "text", "shape": [1, 1], "datatype": "BYTES"}
    text = struct.pack("<I", 3) + b"sea"
    head = msgspec.json.encode(
        {
            "id": "7",
            "inputs": [{**tensor, "parameters": {"binary_data_size": len(text)}}],
            "parameters": {"binary_data_output": True},
        }
    )
    heads, tails = [], []
    for protocol in PROTOCOLS:
        async with adapter_for(triton, "embedder", protocol, kind="infer") as adapter:
            asked = msgspec.json.encode({"inputs": [{**tensor, "data": ["sea"]}]})
            plain = await infer(adapter, asked)
            binary = await infer(
                adapter,
                head + text,
                inference_header_content_length=str(len(head)),
                content_type="application/octet-stream",
            )
        assert binary.content_type == "application/octet-stream"
        length = int(binary.headers["inference-header-content-length"])
        told = [msgspec.json.decode(plain.body), msgspec.json.decode(binary.body[:length])]
        (output,) = told[0]["outputs"]
        assert output["shape"] == [1, 64]
        assert told[1]["id"] == "7"
        tails.append(binary.body[length:])
        assert list(struct.unpack("<64f", tails[-1])) == pytest.approx(output.pop("data"))
        heads.append(told)
    assert tails[0] == tails[1]
    assert heads[0] == heads[1]


async def test_infer_says_what_is_wrong(triton: Triton, protocol: str) -> None:
    async with adapter_for(triton, "embedder", protocol) as adapter:
        with pytest.raises(BackendRefused, match="text"):
            await infer(adapter, b'{"inputs":[]}')
    async with adapter_for(triton, "ensemble", protocol) as adapter:
        with pytest.raises(BackendRefused, match="decoupled"):
            await infer(adapter, b'{"inputs":[]}')


async def test_through_the_gateway(
    triton: Triton, protocol: str, serve_gateway: Callable[..., Awaitable[Any]]
) -> None:
    """OpenAI's and KServe's clients of one gateway, before three models of one Triton."""
    names = {"words": "ensemble", "vllm": "vllm_model", "vectors": "embedder"}
    url = triton.grpc if protocol == "grpc" else triton.url
    backends: dict[str, Any] = {
        name: TritonSettings(
            adapter="triton", url=url, protocol=protocol, model=model, chat_template="gemma"
        )
        for name, model in names.items()
    }
    config = Config(backends=backends, models={name: Model(backends=[name]) for name in names})
    extra = {} if "triton" in load_plugins().adapters else {"triton": plugin}
    gateway = await serve_gateway(config, extra=extra)
    openai = AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
    async with openai:
        for name in ("words", "vllm"):
            streamed = await openai.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": "one two"}],
                max_tokens=3,
                stream=True,
                stream_options={"include_usage": True},
            )
            chunks = [chunk async for chunk in streamed]
            text = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
            assert text.removesuffix("<end_of_turn>") == " <start_of_turn>user one two"
            assert chunks[-1].usage is not None
            assert chunks[-1].usage.completion_tokens == 3
            whole = await openai.completions.create(model=name, prompt="one two", max_tokens=9)
            assert whole.choices[0].text == " one two"
            assert whole.choices[0].finish_reason == "stop"
            with pytest.raises(BadRequestError, match="best_of"):
                await openai.completions.create(model=name, prompt="one", best_of=2)
        vectors = await openai.embeddings.create(model="vectors", input=["sea", "sea", "land"])
        first, second, third = (entry.embedding for entry in vectors.data)
        assert first == second != third
    async with gateway.client() as client:
        tensor = {"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": ["sea"]}
        answer = await client.post("/v2/models/vectors/infer", json={"inputs": [tensor]})
    assert answer.json()["outputs"][0]["data"] == pytest.approx(first)
