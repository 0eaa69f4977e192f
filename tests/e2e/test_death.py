"""Each server is killed under load; no request that had not begun its answer fails."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

CLIENTS = 6
MODEL = "gemma-3-270m"


class Load:
    """Clients that ask without pause, half of them streaming, and note what became of it."""

    def __init__(self, client: openai.OpenAI) -> None:
        self._client = client
        self._numbers = itertools.count()
        self._running = True
        self._threads = [
            threading.Thread(target=self._run, args=(number % 2 == 0,)) for number in range(CLIENTS)
        ]
        self.served: Counter[str] = Counter()
        #: Failed without having begun their answer: must not happen.
        self.failed: list[str] = []
        #: Cut in mid-stream, and told so.
        self.cut: list[str] = []
        #: Streams that just ended without a finish: must not happen.
        self.silent = 0

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._running = False
        for thread in self._threads:
            thread.join()

    def _run(self, stream: bool) -> None:
        while self._running:
            text = f"Number {next(self._numbers)}: the river rises in"
            try:
                self._stream(text) if stream else self._whole(text)
            except openai.OpenAIError as error:
                self.failed.append(f"{type(error).__name__}: {error}")

    def _whole(self, text: str) -> None:
        raw: Any = self._client.completions.with_raw_response.create(
            model=MODEL, prompt=text, max_tokens=16
        )
        self.served[raw.headers["x-forebay-backend"]] += 1

    def _stream(self, text: str) -> None:
        raw: Any = self._client.completions.with_raw_response.create(
            model=MODEL, prompt=text, max_tokens=16, stream=True
        )
        reason = None
        with raw.parse() as stream:
            try:
                for chunk in stream:
                    for choice in chunk.choices:
                        reason = choice.finish_reason or reason
            except openai.APIError as error:
                self.cut.append(error.message)
                return
        self.silent += reason is None
        self.served[raw.headers["x-forebay-backend"]] += 1


@contextmanager
def load(client: openai.OpenAI) -> Iterator[Load]:
    running = Load(client)
    running.start()
    try:
        yield running
    finally:
        running.stop()


def wait_until_served(running: Load, backend: str, more: int = 3, seconds: float = 120) -> None:
    """Some more requests than so far."""
    goal, give_up = running.served[backend] + more, time.monotonic() + seconds
    while running.served[backend] < goal:
        assert time.monotonic() < give_up, f"{backend} serves nothing: {running.served}"
        time.sleep(0.1)


@pytest.mark.parametrize("victim", ["llama", "native", "vllm"])
def test_killed_under_load(
    gateway: Any, client: openai.OpenAI, real: dict[str, Any], victim: str
) -> None:
    survivors = [name for name in ("native", "llama", "vllm") if name != victim]
    with load(client) as running:
        wait_until_served(running, victim)
        if victim == "native":
            gateway.engine().kill()
        else:
            real[victim].kill()
        for name in survivors:
            wait_until_served(running, name)
        if victim != "native":
            gateway.wait_until(victim, 30, state="unhealthy")
            alone_it_is_told_at_once(gateway, victim)
            real[victim].start()
            real[victim].wait()
        gateway.wait_until(victim, state="healthy")
        wait_until_served(running, victim)
    assert running.failed == []
    assert running.silent == 0
    # One stream at most was cut for each client that streamed at the moment of death.
    assert len(running.cut) <= CLIENTS // 2


def alone_it_is_told_at_once(gateway: Any, victim: str) -> None:
    """A model whose only backend is dead answers 503, and when to come back, without waiting."""
    body = {"model": victim, "prompt": "hello", "max_tokens": 1}
    with httpx.Client(timeout=5) as client:
        answer = client.post(f"{gateway.url}/v1/completions", json=body)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "no_backend_available"
    assert int(answer.headers["retry-after"]) >= 1
