"""Each policy sends traffic to all three servers."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    "policy", ["round_robin", "least_connections", "power_of_two", "prefix_affinity"]
)
def test_every_backend_gets_some(client: openai.OpenAI, policy: str) -> None:
    def ask(number: int) -> str:
        raw: Any = client.chat.completions.with_raw_response.create(
            model=policy,
            messages=[{"role": "user", "content": f"{number}: count from {number} upwards."}],
            max_tokens=8,
        )
        assert raw.headers["x-forebay-policy"] == policy
        return str(raw.headers["x-forebay-backend"])

    with ThreadPoolExecutor(6) as clients:
        served = Counter(clients.map(ask, range(30)))
    assert served.keys() == {"native", "llama", "vllm"}, served
