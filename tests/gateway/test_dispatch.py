"""What becomes of a request when backends fail, are slow or full, and when clients leave."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from forebay.api import (
    Attempt,
    BackendBusy,
    BackendError,
    BackendFailed,
    BackendGarbage,
    BackendLacks,
    BackendRefused,
    BackendSettings,
    Capabilities,
    ConnectFailed,
    Delta,
    Event,
    Finished,
    GenerateRequest,
    Policy,
    PolicyKind,
    StaleConnection,
    Started,
    StreamTruncated,
    Timeouts,
    Usage,
    hookimpl,
)
from forebay.config import Config, Health, Model, SamplingDefaults

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
STREAM = {**CHAT, "stream": True}
Script = Callable[[GenerateRequest, Attempt], AsyncIterator[Event]]


def config(*backends: str, slots: int = 0, health: Health | None = None, **model: object) -> Config:
    model.setdefault("policy", "round_robin")
    return Config(
        backends={
            name: BackendSettings(adapter="scripted", max_in_flight=slots, probe_interval=0.2)
            for name in backends
        },
        models={"m": Model(backends=list(backends), **model)},
        health=health or Health(),
    )


def failing(error: Exception) -> Script:
    async def script(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        yield Started()
        raise error

    return script


def hanging(*words: str) -> Script:
    """Says the words, and then nothing any more."""

    async def script(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        yield Started()
        for word in words:
            yield Delta(text=word)
        await asyncio.Event().wait()

    return script


def breaking(message: str) -> Script:
    """Fails after its first word."""

    async def script(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        yield Started()
        yield Delta(text="one ")
        raise BackendFailed(message)

    return script


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def idle(gateway) -> bool:
    return all(
        adapter.open == 0 and gateway.app.fleet.backends[name].in_flight == 0
        for name, adapter in gateway.scripted.items()
    )


@pytest.mark.parametrize(
    "error",
    [
        ConnectFailed("nobody"),
        StaleConnection("gone"),
        BackendFailed("500"),
        BackendBusy("429", retry_after=3),
        BackendGarbage("what?"),
        RuntimeError("a plugin's bug"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_before_the_first_byte_the_next_candidate_is_asked(serve_gateway, error) -> None:
    gateway = await serve_gateway(config("a", "b"))
    gateway.scripted["a"].script = failing(error)
    async with gateway.client() as client:
        responses = [await client.post("/v1/chat/completions", json=CHAT) for _ in range(3)]
    assert [response.status_code for response in responses] == [200, 200, 200]
    assert {response.headers["x-forebay-backend"] for response in responses} == {"b"}
    first = gateway.app.decisions.get(responses[0].headers["x-request-id"])
    assert first.order == ("a", "b")
    kinds = [attempt.error for attempt in first.attempts]
    expected = getattr(error, "kind", "backend_failed")
    # A stale connection is tried once more where it was, before going elsewhere.
    assert kinds == [expected] * (2 if isinstance(error, StaleConnection) else 1) + [None]
    assert responses[0].headers["x-forebay-attempts"] == str(len(kinds))
    assert idle(gateway)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/messages", {**CHAT, "max_tokens": 5}),
        ("/v1/responses", {"model": "m", "input": "hi"}),
    ],
)
async def test_clients_do_not_learn_where_backends_stand(serve_gateway, path, body) -> None:
    gateway = await serve_gateway(config("a"))
    gateway.scripted["a"].script = failing(BackendFailed("http://10.1.2.3 ran out of memory"))
    async with gateway.client() as client:
        whole = await client.post(path, json=body)
        gateway.scripted["a"].script = breaking("http://10.1.2.3 ran out of memory")
        streamed = await client.post(path, json={**body, "stream": True})
    for response in (whole, streamed):
        assert "10.1.2.3" not in response.text
        assert "backend_failed" in response.text


async def test_a_4xx_is_passed_on_and_never_retried(serve_gateway) -> None:
    gateway = await serve_gateway(config("a", "b", health=Health(failures=1)))
    refusal = BackendRefused("too long", status=400, param="messages", code="context_exceeded")
    gateway.scripted["a"].script = failing(refusal)
    async with gateway.client() as client:
        response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_exceeded"
    assert gateway.scripted["b"].requests == []
    assert gateway.app.fleet.backends["a"].state() == "healthy", "the request is at fault"


async def test_after_the_first_byte_nothing_is_retried(serve_gateway) -> None:
    gateway = await serve_gateway(config("a", "b"))
    gateway.scripted["a"].script = breaking("out of memory")
    async with gateway.client() as client:
        response = await client.post("/v1/chat/completions", json=STREAM)
    lines = response.text.strip().split("\n\n")
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "backend_failed"
    assert "[DONE]" not in response.text
    assert gateway.scripted["b"].requests == []
    decision = gateway.app.decisions.get(response.headers["x-request-id"])
    assert decision.outcome.result == "truncated"
    assert idle(gateway)


async def test_an_answer_that_does_not_stream_can_be_begun_anew(serve_gateway) -> None:
    async def breaks(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        yield Started()
        yield Delta(text="half an ")
        yield Delta(text="answer", finish_reason="length")
        raise StreamTruncated("the engine died")

    gateway = await serve_gateway(config("a", "b"))
    gateway.scripted["a"].script = breaks
    async with gateway.client() as client:
        response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.json()["choices"][0]["message"]["content"] == "one two three"
    assert response.json()["choices"][0]["finish_reason"] == "stop"
    decision = gateway.app.decisions.get(response.headers["x-request-id"])
    assert [attempt.error for attempt in decision.attempts] == ["stream_truncated", None]
    assert decision.outcome.finish_reasons == ("stop",)
    assert decision.outcome.events == 4
    assert idle(gateway)


async def test_when_all_the_time_is_used_up_nobody_else_is_asked(serve_gateway) -> None:
    gateway = await serve_gateway(
        config("a", "b", timeouts=Timeouts(total=0.2), health=Health(failures=1))
    )
    gateway.scripted["a"].script = hanging("one ")
    async with gateway.client() as client:
        response = await client.post("/v1/chat/completions", json=CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "total_timeout")
    assert gateway.scripted["b"].requests == []
    assert gateway.app.fleet.backends["a"].state() == "healthy"
    assert idle(gateway)


async def test_if_all_fail_the_client_learns_the_last_failure(serve_gateway) -> None:
    gateway = await serve_gateway(config("a", "b", "c", max_attempts=2))
    for adapter in gateway.scripted.values():
        adapter.script = failing(BackendFailed("500"))
    async with gateway.client() as client:
        response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 502
    assert response.json()["error"]["code"] == "backend_failed"
    assert sum(len(adapter.requests) for adapter in gateway.scripted.values()) == 2


async def test_no_first_token_in_time_goes_elsewhere(serve_gateway) -> None:
    gateway = await serve_gateway(config("a", "b", timeouts=Timeouts(first_token=0.1)))
    gateway.scripted["a"].script = hanging()
    async with gateway.client() as client:
        response = await client.post("/v1/chat/completions", json=CHAT)
        assert response.headers["x-forebay-backend"] == "b"
        gateway.scripted["b"].script = hanging()
        response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "first_token_timeout"
    assert idle(gateway)


@pytest.mark.parametrize(
    ("timeouts", "code"),
    [
        (Timeouts(inter_token=0.1), "inter_token_timeout"),
        (Timeouts(inter_token=0, total=0.2), "total_timeout"),
    ],
)
async def test_a_stall_in_mid_stream_ends_as_an_error_event(serve_gateway, timeouts, code) -> None:
    gateway = await serve_gateway(config("a", timeouts=timeouts))
    gateway.scripted["a"].script = hanging("one ", "two ")
    async with gateway.client() as client:
        response = await client.post("/v1/chat/completions", json=STREAM)
    assert "two " in response.text
    last = response.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == code
    assert "[DONE]" not in response.text
    assert idle(gateway)


async def test_tokens_slower_than_the_total_but_steady_are_no_stall(serve_gateway) -> None:
    async def steady(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        yield Started()
        for _ in range(8):
            await asyncio.sleep(0.05)
            yield Delta(text="x")
        yield Delta(finish_reason="stop")
        yield Finished(Usage(1, 8))

    gateway = await serve_gateway(config("a", timeouts=Timeouts(inter_token=0.25, total=0)))
    gateway.scripted["a"].script = steady
    async with gateway.client() as client:
        response = await client.post("/v1/chat/completions", json=STREAM)
    assert response.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("words", [(), ("one ",)])
async def test_a_client_that_leaves_closes_the_upstream(serve_gateway, stream, words) -> None:
    gateway = await serve_gateway(config("a"))
    gateway.scripted["a"].script = hanging(*words)
    closed_after = await _leave(gateway, stream, lambda: gateway.scripted["a"].open == 1)
    # 100 ms is the promise; the rest is for a test machine that is busy with other things.
    assert closed_after < 0.5
    assert idle(gateway)
    [decision] = gateway.app.decisions.recent(1)
    assert decision.outcome.result == "client_disconnect"
    assert decision.outcome.status == 499
    assert gateway.app.fleet.backends["a"].state() == "healthy"


async def _leave(gateway, stream: bool, begun: Callable[[], bool]) -> float:
    """Send a request, leave once it has ``begun``; seconds until nothing is open any more."""

    async def ask() -> None:
        async with (
            gateway.client() as client,
            client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": stream}) as got,
        ):
            async for _ in got.aiter_bytes():
                pass

    asking = asyncio.create_task(ask())
    await until(begun)
    await asyncio.sleep(0.05)
    asking.cancel()
    left = time.perf_counter()
    await until(lambda: gateway.scripted["a"].open == 0)
    return time.perf_counter() - left


async def test_a_client_that_leaves_the_queue_never_reaches_a_backend(serve_gateway) -> None:
    gateway = await serve_gateway(config("a", slots=1))
    gateway.scripted["a"].script = hanging("one ")
    async with gateway.client() as client:
        first = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        await until(lambda: gateway.scripted["a"].open == 1)
        second = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        await until(lambda: gateway.app.admission.depths() == {"m": 1})
        second.cancel()
        await until(lambda: gateway.app.admission.depths() == {"m": 0})
        assert len(gateway.scripted["a"].requests) == 1
        first.cancel()
        await until(lambda: idle(gateway))


async def test_the_queue_is_first_come_first_served(serve_gateway) -> None:
    gateway = await serve_gateway(config("a", "b", slots=1))
    release = asyncio.Event()

    async def held(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        yield Started()
        await release.wait()
        yield Delta(finish_reason="stop")
        yield Finished(Usage(1, 0))

    for adapter in gateway.scripted.values():
        adapter.script = held
    async with gateway.client() as client:
        asking = []
        for number in range(8):
            headers = {"x-request-id": f"r{number}"}
            request = client.post("/v1/chat/completions", json=CHAT, headers=headers)
            asking.append(asyncio.create_task(request))
            want = min(number + 1, 2)
            await until(lambda want=want: sum(a.open for a in gateway.scripted.values()) == want)
            await until(lambda n=number: gateway.app.admission.depths()["m"] == max(0, n - 1))
        release.set()
        answers = await asyncio.gather(*asking)
    assert all(answer.status_code == 200 for answer in answers)
    decisions = [gateway.app.decisions.get(f"r{n}") for n in range(2, 8)]
    begun = [d.time + d.attempts[0].started for d in decisions]
    assert begun == sorted(begun)
    assert all(d.outcome.queue > 0 for d in decisions)
    assert idle(gateway)


async def test_a_full_queue_and_a_long_wait_are_refused_with_retry_after(serve_gateway) -> None:
    gateway = await serve_gateway(config("a", slots=1, max_queue=1, queue_timeout=0.3))
    gateway.scripted["a"].script = hanging("one ")
    async with gateway.client() as client:
        first = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        await until(lambda: gateway.scripted["a"].open == 1)
        second = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        await until(lambda: gateway.app.admission.depths() == {"m": 1})
        third = await client.post("/v1/chat/completions", json=CHAT)
        waited = await second
        first.cancel()
        await until(lambda: idle(gateway))
    assert (third.status_code, third.json()["error"]["code"]) == (503, "overloaded")
    assert third.headers["retry-after"] == "1"
    assert (waited.status_code, waited.json()["error"]["code"]) == (503, "queue_timeout")
    assert waited.headers["retry-after"] == "1"


async def test_waiting_for_the_one_able_backend_holds_up_nobody_else(serve_gateway) -> None:
    gateway = await serve_gateway(config("able", "plain", slots=1))
    gateway.scripted["able"].capabilities = Capabilities(tools=True)
    gateway.app.fleet.backends["able"].capabilities = Capabilities(tools=True)
    gateway.scripted["able"].script = hanging("one ")
    tools = {**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]}
    async with gateway.client() as client:
        first = asyncio.create_task(client.post("/v1/chat/completions", json=tools))
        await until(lambda: gateway.scripted["able"].open == 1)
        second = asyncio.create_task(client.post("/v1/chat/completions", json=tools))
        await until(lambda: gateway.app.admission.depths() == {"m": 1})
        for _ in range(3):
            response = await client.post("/v1/chat/completions", json=CHAT)
            assert response.headers["x-forebay-backend"] == "plain"
        gateway.scripted["able"].script = gateway.scripted["plain"].script
        first.cancel()
        assert (await second).headers["x-forebay-backend"] == "able"
    assert idle(gateway)


async def test_a_turn_that_ends_in_a_refusal_goes_to_the_next_in_line(serve_gateway) -> None:
    gateway = await serve_gateway(config("a", slots=1))
    release = asyncio.Event()

    async def held(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        yield Started()
        await release.wait()
        yield Delta(finish_reason="stop")
        yield Finished(Usage(1, 0))

    gateway.scripted["a"].script = held
    tools = {**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]}
    async with gateway.client() as client:
        asking = []
        for number, body in enumerate((CHAT, tools, CHAT)):
            asking.append(asyncio.create_task(client.post("/v1/chat/completions", json=body)))
            await until(lambda: gateway.scripted["a"].open == 1)
            await until(lambda n=number: gateway.app.admission.depths() == {"m": n})
        release.set()
        async with asyncio.timeout(10):
            answers = await asyncio.gather(*asking)
    assert [answer.status_code for answer in answers] == [200, 400, 200]
    assert idle(gateway)


async def test_nobody_healthy_is_said_at_once(serve_gateway) -> None:
    gateway = await serve_gateway(config("a", "b"))
    for adapter in gateway.scripted.values():
        adapter.probe_error = ConnectFailed("nobody")
    await until(lambda: {b.state() for b in gateway.app.fleet.backends.values()} == {"unhealthy"})
    async with gateway.client() as client:
        response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "no_backend_available"
    assert response.headers["retry-after"] == "1"
    for adapter in gateway.scripted.values():
        adapter.probe_error = None
    await gateway.healthy()
    async with gateway.client() as client:
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_failures_eject_and_one_trial_brings_back(serve_gateway) -> None:
    health = Health(failures=2, ejection=0.2, ejection_max=0.4)
    gateway = await serve_gateway(config("a", "b", health=health))
    answer = gateway.scripted["a"].script
    gateway.scripted["a"].script = failing(BackendFailed("500"))
    backend = gateway.app.fleet.backends["a"]
    async with gateway.client() as client:
        while backend.state() == "healthy":
            assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        seen = len(gateway.scripted["a"].requests)
        assert seen == 2
        for _ in range(3):
            await client.post("/v1/chat/completions", json=CHAT)
        assert len(gateway.scripted["a"].requests) == seen, "ejected: not asked"
        await until(lambda: backend.state() == "healthy")
        gateway.scripted["a"].script = answer
        for _ in range(4):
            await client.post("/v1/chat/completions", json=CHAT)
    assert len(gateway.scripted["a"].requests) > seen + 1
    assert backend.health.reason is None


async def test_a_broken_policy_does_not_take_the_service_down(serve_gateway) -> None:
    class Broken(Policy):
        def score(self, request, snapshot):
            raise ZeroDivisionError("oops")

    class Plugin:
        @hookimpl
        def policies(self) -> list[PolicyKind]:
            return [PolicyKind(name="broken", build=lambda settings: Broken())]

    gateway = await serve_gateway(config("a", "b", policy="broken"), extra={"broken": Plugin()})
    async with gateway.client() as client:
        response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 200
    assert response.headers["x-forebay-policy"] == "broken (failed)"


async def test_backpressure_reaches_the_adapter(serve_gateway) -> None:
    produced = 0

    async def endless(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        nonlocal produced
        yield Started()
        while True:
            produced += 1
            yield Delta(text="x" * 10_000)

    gateway = await serve_gateway(config("a"))
    gateway.scripted["a"].script = endless
    address = httpx.URL(gateway.url)
    reader, writer = await asyncio.open_connection(address.host, address.port, limit=1024)
    body = json.dumps(STREAM).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
    writer.write(head % len(body) + body)
    await reader.readuntil(b"\r\n\r\n")
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await asyncio.sleep(0.3)
    stuck_at = produced
    await asyncio.sleep(0.3)
    assert produced == stuck_at, "nobody reads, so nothing is made"
    writer.transport.abort()
    await until(lambda: idle(gateway))


async def test_a_models_sampling_defaults_reach_its_backends(serve_gateway) -> None:
    heard = []

    async def listening(request: GenerateRequest, attempt: Attempt) -> AsyncIterator[Event]:
        heard.append((request.sampling, json.loads(request.openai_body())))
        yield Started()
        yield Delta(text="hi", finish_reason="stop")
        yield Finished(Usage(1, 1))

    defaults = SamplingDefaults(temperature=0.6, top_k=20)
    gateway = await serve_gateway(config("a", sampling=defaults))
    gateway.scripted["a"].script = listening
    async with gateway.client() as client:
        await client.post("/v1/chat/completions", json={**CHAT, "temperature": 0})
        await client.post("/v1/messages", json={**CHAT, "max_tokens": 5, "top_k": 3})
    (first, body), (second, _) = heard
    assert (first.temperature, first.top_k) == (0, 20)
    assert body == {**CHAT, "temperature": 0, "top_k": 20}
    assert (second.temperature, second.top_k) == (0.6, 3)


async def test_what_one_backend_has_no_words_for_is_asked_of_the_next(serve_gateway) -> None:
    gateway = await serve_gateway(config("a", "b"))
    gateway.scripted["a"].script = failing(BackendLacks("has no grammar", param="grammar"))
    async with gateway.client() as client:
        answers = [await client.post("/v1/chat/completions", json=CHAT) for _ in range(2)]
        assert [answer.headers["x-forebay-backend"] for answer in answers] == ["b", "b"]
        gateway.scripted["b"].script = gateway.scripted["a"].script
        refused = await client.post("/v1/chat/completions", json=CHAT)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "grammar"
    assert refused.headers["x-forebay-attempts"] == "2"
    assert gateway.app.fleet.backends["a"].state() == "healthy"


async def test_every_error_kind_has_a_status_that_clients_can_act_on() -> None:
    for error in (ConnectFailed, StaleConnection, BackendFailed, BackendGarbage):
        assert issubclass(error, BackendError)
        assert error.status == 502
        assert error.retryable
    assert BackendBusy.status == 503
    assert not BackendRefused.retryable
