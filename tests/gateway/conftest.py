"""Fixtures of this room: a real OTLP receiver, and logging that is put back."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from oteltap import OtelTapHttpProtobufReceiver, OtelTapHttpProtobufReceiverSettings

from forebay.config import Tracing as Settings
from forebay.telemetry.tracing import Tracing


class Collector:
    """A real OTLP receiver, and what it has received."""

    def __init__(self, tap: OtelTapHttpProtobufReceiver, endpoint: str) -> None:
        self._tap = tap
        self._received: list[Span] = []
        self.endpoint = endpoint

    async def receive(self) -> None:
        """Collect for ever. The receiver keeps nothing for those who come late."""
        async for span in self._tap.stream_traces():
            self._received.append(span)

    def tracing(self, sample: float = 1.0) -> Tracing:
        return Tracing.build(Settings(otlp_endpoint=self.endpoint, sample=sample))

    async def spans(self, tracing: Tracing) -> list[Span]:
        """All that ``tracing`` has recorded; it is closed for that."""
        return await self.spans_of(lambda: asyncio.to_thread(tracing.close))

    async def spans_of(self, close: Callable[[], Awaitable[None]]) -> list[Span]:
        """All that was recorded until ``close`` returns; a last trace marks the end of them."""
        await close()
        last = self.tracing()
        last.request("/last", "GET", {}).end(200, None, None)
        await asyncio.to_thread(last.close)
        async with asyncio.timeout(10):
            while not self._received or self._received[-1].name != "GET /last":
                await asyncio.sleep(0.005)
        return self._received[:-1]

    @staticmethod
    def attributes(span: Span) -> dict[str, object]:
        values: dict[str, object] = {}
        for item in span.attributes:
            kind = item.value.WhichOneof("value")
            value = getattr(item.value, kind)
            if kind == "array_value":
                value = [element.string_value for element in value.values]
            values[item.key] = value
        return values

    @staticmethod
    def by_name(spans: list[Span], name: str) -> Span:
        (span,) = [span for span in spans if span.name == name]
        return span


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = OtelTapHttpProtobufReceiverSettings(http_port=port)
    async with OtelTapHttpProtobufReceiver(settings) as tap:
        collector = Collector(tap, f"http://127.0.0.1:{port}")
        receiving = asyncio.create_task(collector.receive())
        yield collector
    await receiving
