"""One trace from the caller's span through the gateway into our engine."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def spans_of(collector: Any, trace_id: str) -> dict[str, dict[str, Any]]:
    """Spans of a trace by id, from the lines the collector printed."""
    spans = {}
    for line in collector.log.read_text().splitlines():
        if trace_id in line:
            spans.update({span["spanId"]: span for span in _spans(json.loads(line))})
    return {key: span for key, span in spans.items() if span["traceId"] == trace_id}


def _spans(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if "spanId" in value and "traceId" in value:
            yield value
        for part in value.values():
            yield from _spans(part)
    elif isinstance(value, list):
        for part in value:
            yield from _spans(part)


def names(spans: dict[str, dict[str, Any]]) -> set[str]:
    return {span["name"] for span in spans.values()}


@pytest.mark.parametrize("model", ["native", "llama", "vllm"])
def test_one_trace(client: openai.OpenAI, collector: Any, model: str) -> None:
    trace_id, parent = secrets.token_hex(16), secrets.token_hex(8)
    client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=4,
        extra_headers={"traceparent": f"00-{trace_id}-{parent}-01"},
    )
    wanted = {"prefill", "decode"}
    give_up = time.monotonic() + 30
    while not wanted <= names(spans := spans_of(collector, trace_id)):
        assert time.monotonic() < give_up, names(spans)
        time.sleep(0.5)
    roots = [span for span in spans.values() if span.get("parentSpanId") == parent]
    assert len(roots) == 1, "the server span, child of the caller's"
    # Every other span hangs below it.
    for span in spans.values():
        while span["spanId"] != roots[0]["spanId"]:
            span = spans[span["parentSpanId"]]
