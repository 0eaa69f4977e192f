"""SIGTERM: what runs is finished, what is new is refused, and the process ends."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_streams_are_finished(start_gateway: Any) -> None:
    gateway = start_gateway("draining", {"drain_timeout": 60})
    with gateway.client() as client:
        stream = client.completions.create(
            model="gemma-3-270m", prompt="one two three", max_tokens=60, stream=True
        )
        next(stream)
        status: list[int] = []
        ending = threading.Thread(target=lambda: status.append(gateway.terminate()))
        ending.start()
        assert _refuses(gateway.url)
        assert [c.finish_reason for chunk in stream for c in chunk.choices][-1] is not None
        ending.join()
    assert status == [0]


def test_a_stream_over_the_limit_is_told(start_gateway: Any) -> None:
    """The process ends in time, and the stream does not look complete."""
    gateway = start_gateway("impatient", {"drain_timeout": 1})
    body = {"model": "gemma-3-270m", "prompt": "one", "max_tokens": 3000, "stream": True}
    with (
        httpx.Client(timeout=60) as client,
        client.stream("POST", f"{gateway.url}/v1/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        status = gateway.terminate()
        try:
            rest = list(lines)
        except httpx.RemoteProtocolError:
            rest = []
    assert status == 0
    assert "data: [DONE]" not in rest


def _refuses(url: str) -> bool:
    """No new connection is taken; asked until the signal has been acted upon."""
    for _ in range(200):
        try:
            httpx.get(f"{url}/v1/models", timeout=5)
        except httpx.TransportError:
            return True
    return False
