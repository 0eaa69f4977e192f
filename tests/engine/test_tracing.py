"""The engine's spans at a real OTLP receiver, from the engine's real process."""

from __future__ import annotations

import asyncio
import socket
import sys
from contextlib import aclosing
from pathlib import Path

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from oteltap import OtelTapHttpProtobufReceiver, OtelTapHttpProtobufReceiverSettings

from forebay_engine.client import EngineClient, EngineConfig, Generate, SamplingParams
from forebay_engine.errors import EngineUnavailable
from forebay_engine.tracing import Tracing, sampled

FAKES = Path(__file__).parents[1] / "fakes"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def ready(client: EngineClient) -> None:
    while True:
        try:
            if (await client.status()).state == "ready":
                return
        except EngineUnavailable:
            pass
        await asyncio.sleep(0.01)


async def spans_of_requests(receiver: OtelTapHttpProtobufReceiver, port: int) -> list[Span]:
    """What is exported for one request whose trace is not recorded, and one whose trace is."""
    received: list[Span] = []

    async def receive() -> None:
        async for span in receiver.stream_traces():
            received.append(span)

    receiving = asyncio.create_task(receive())
    client = EngineClient(
        EngineConfig(model=str(FAKES / "engine_model")),
        environment={"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}"},
        command=(sys.executable, str(FAKES / "engine_process.py")),
    )
    await client.start()
    await ready(client)
    for flags in ("00", "01"):
        request = Generate(
            prompts=["abc"],
            n=2,
            sampling=SamplingParams(max_tokens=3),
            traceparent=f"00-{TRACE}-{PARENT}-{flags}",
        )
        async with aclosing(client.generate(request)) as events:
            async for _ in events:
                pass
    # The engine's end sends what is left.
    await client.aclose()
    while len(received) < 4:
        await asyncio.sleep(0.01)
    receiving.cancel()
    await asyncio.gather(receiving, return_exceptions=True)
    return received


async def test_a_recorded_request_leaves_four_spans_under_its_parent() -> None:
    port = free_port()
    settings = OtelTapHttpProtobufReceiverSettings(http_port=port)
    async with OtelTapHttpProtobufReceiver(settings) as receiver:
        spans = {span.name: span for span in await spans_of_requests(receiver, port)}
    assert sorted(spans) == ["decode", "engine.request", "prefill", "queue"]
    root = spans.pop("engine.request")
    assert root.trace_id.hex() == TRACE
    assert root.parent_span_id.hex() == PARENT
    assert {span.parent_span_id for span in spans.values()} == {root.span_id}
    assert {span.trace_id for span in spans.values()} == {root.trace_id}
    queue, prefill, decode = (spans[name] for name in ("queue", "prefill", "decode"))
    edges = [
        root.start_time_unix_nano,
        queue.start_time_unix_nano,
        queue.end_time_unix_nano,
        prefill.end_time_unix_nano,
        decode.end_time_unix_nano,
        root.end_time_unix_nano,
    ]
    assert edges == sorted(edges)
    assert (prefill.start_time_unix_nano, decode.start_time_unix_nano) == tuple(edges[2:4])
    counts = {item.key: item.value.int_value for item in root.attributes}
    assert counts["gen_ai.usage.input_tokens"] == 4
    assert counts["gen_ai.usage.output_tokens"] == 6
    assert counts["forebay.engine.drafted_tokens"] == 0
    assert counts["forebay.engine.accepted_tokens"] == 0


@pytest.mark.parametrize(
    ("traceparent", "expected"),
    [
        (f"00-{TRACE}-{PARENT}-01", True),
        (f"00-{TRACE}-{PARENT}-03", True),
        (f"00-{TRACE}-{PARENT}-00", False),
        (f"00-{TRACE}-{PARENT}-02", False),
        ("", False),
        ("garbage-1", False),
    ],
)
def test_only_recorded_traces_cost_anything(traceparent: str, expected: bool) -> None:
    assert sampled(traceparent) == expected


def test_without_a_collector_there_is_no_tracing() -> None:
    assert Tracing.from_environment({}, "model") is None
