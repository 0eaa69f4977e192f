"""The client and the arithmetic of benchmarks/engine_cpu.py; the engines themselves are not run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


@asynccontextmanager
async def server(body: bytes, status: str = "200 OK") -> AsyncIterator[str]:
    """Answers every request with these bytes, in pieces that cut events in two."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        asked = json.loads(await reader.readexactly(length))
        assert asked["prompt"] == [2, 7]
        assert asked["ignore_eos"]
        writer.write(f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n\r\n".encode())
        for start in range(0, len(body), 11):
            writer.write(body[start : start + 11])
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    listener = await asyncio.start_server(answer, "127.0.0.1")
    async with listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"


def events(*texts: str, tokens: int) -> bytes:
    chunks: list[Any] = [{"choices": [{"text": text}]} for text in texts]
    chunks.append({"choices": [], "usage": {"completion_tokens": tokens}})
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join([": waiting\n\n", *lines, "data: [DONE]\n\n"]).encode()


async def test_pieces_of_text_are_dated_and_tokens_counted() -> None:
    generation = import_module("generation")
    async with server(events("a", "", "b", "cd", tokens=5)) as url:
        found = await generation.HttpTarget(url, "m").generate([2, 7], 5)
    assert found.tokens == 5
    assert len(found.arrivals) == 3
    assert found.sent <= found.arrivals[0]
    assert found.ttft == found.arrivals[0] - found.sent
    assert sum(found.gaps) == pytest.approx(found.arrivals[-1] - found.arrivals[0])


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (events("a", tokens=4), "200 OK", "4 tokens in 1 pieces, not 5"),
        (events("", tokens=5), "200 OK", "5 tokens in 0 pieces, not 5"),
        (b'data: {"error": {"message": "lost"}}\n\n', "200 OK", "lost"),
        (b'{"error": "loading"}', "503 Service Unavailable", "HTTP 503.*loading"),
    ],
)
async def test_an_answer_that_is_not_as_asked_is_not_measured(
    body: bytes, status: str, reason: str
) -> None:
    generation = import_module("generation")
    async with server(body, status) as url:
        with pytest.raises(generation.GenerationFailed, match=reason):
            await generation.HttpTarget(url, "m").generate([2, 7], 5)


async def test_a_server_that_is_not_there_is_not_measured() -> None:
    generation = import_module("generation")
    with pytest.raises(generation.GenerationFailed, match=r"127\.0\.0\.1:1"):
        await generation.HttpTarget("http://127.0.0.1:1", "m").generate([2, 7], 5)


def result(rate: float, ttft: float, prefix: float) -> dict[str, Any]:
    point = {"rate": rate, "ttft_p50": ttft, "ttft_p99": ttft, "gap_p50": 0.01, "gap_p99": 0.02}
    points = {n: {**point, "cpu_per_token": 0.004} for n in (1, 8)}
    return {
        "threads": 2,
        "cold_start": 3.0,
        "memory": 1_500_000_000,
        "points": points,
        "prefix_first": 1.0,
        "prefix_second": prefix,
    }


def test_medians_over_rounds_and_ratios_within_each() -> None:
    # The second round is slow for both: the ratio of medians of all rounds would be 2.5.
    rounds = [
        {"forebay": result(60, 0.1, 0.05), "vllm": result(20, 0.2, 0.5)},
        {"forebay": result(10, 0.5, 0.20), "vllm": result(10, 0.4, 0.5)},
        {"forebay": result(50, 0.1, 0.05), "vllm": result(25, 0.2, 0.5)},
    ]
    lines = import_module("comparison").summary_tables(rounds).splitlines()
    row = "50.0 (10.0–60.0) | 100.0 ms / 100.0 ms | 10.0 ms / 20.0 ms | 4.0 ms |"
    assert f"| forebay | 1 | {row}" in lines
    assert (
        "| vllm | 2 | 3.0 s (3.0–3.0) | 1,500 MB (1,500–1,500) | 1,000.0 ms | 500.0 ms |" in lines
    )
    assert "| bf16 rate over vLLM's, 8 streams | ≥ 1.5 | 2.00 (1.00–3.00) | yes |" in lines
    assert "| bf16 TTFT over vLLM's, 1 streams | ≤ 1 | 0.50 (0.50–1.25) | yes |" in lines
    assert "| TTFT behind a known prefix over the first | ≤ 0.1 | 0.05 (0.05–0.20) | yes |" in lines
    assert not any("llama" in line for line in lines)


def test_percentiles_are_of_what_was_seen() -> None:
    percentile = import_module("engine_cpu").percentile
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.5) == 1.0
    assert percentile(list(range(1, 101)), 0.99) == 99
    assert percentile([5.0], 0.99) == 5.0
