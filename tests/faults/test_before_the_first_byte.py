"""Faults before the client has seen anything: another backend serves, and nobody notices."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

LEAK = "secret-of-the-backend"


@pytest.fixture(params=[False, True], ids=["whole", "stream"])
def stream(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


async def failover(gateway: Any, stream: bool, *errors: str) -> None:
    """One request fails on `a` in these ways and is served by `b`."""
    exchange = await gateway.get(stream=stream)
    assert exchange.status == 200
    assert exchange.headers["x-forebay-backend"] == "b"
    assert exchange.complete
    text = exchange.text() if stream else exchange.json()["choices"][0]["message"]["content"]
    assert text == "hello"
    await gateway.until_idle()
    attempts = gateway.decision(exchange).attempts
    assert [attempt.backend for attempt in attempts] == ["a"] * len(errors) + ["b"]
    assert [attempt.error for attempt in attempts] == [*errors, None]
    assert gateway.decision(exchange).outcome.result == "ok"


async def test_connection_refused(start_gateway: Any, upstreams: Any, stream: bool) -> None:
    gateway = await start_gateway(backend={"probe_interval": 60})
    await upstreams[0].stop()
    await failover(gateway, stream, "connect_failed")


async def test_connection_never_accepted(start_gateway: Any, upstreams: Any, stream: bool) -> None:
    gateway = await start_gateway(backend={"probe_interval": 60}, timeouts={"connect": 0.2})
    await upstreams[0].stop()
    # A full accept queue: Linux drops further SYNs, as a host that has vanished would.
    with socket.create_server(("127.0.0.1", upstreams[0].port), backlog=0) as deaf:
        fillers = [socket.socket() for _ in range(2)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(deaf.getsockname())
        await failover(gateway, stream, "connect_failed")
        for filler in fillers:
            filler.close()


async def test_closed_before_an_answer(start_gateway: Any, upstreams: Any, stream: bool) -> None:
    async def close(call: Any) -> None:
        call.fin()

    gateway = await start_gateway()
    upstreams[0].behaviour = close
    # First on the connection that the probe had left open, then on one of its own.
    await failover(gateway, stream, "stale_connection", "connect_failed")
    assert gateway.app.fleet.backends["a"].state() == "healthy"


async def test_kept_alive_connection_was_closed(
    start_gateway: Any, upstreams: Any, stream: bool
) -> None:
    """A connection closed just as a request goes out on it: once more on a new one, unpunished."""

    async def close_on_second(call: Any) -> None:
        if call.age:
            call.fin()
        else:
            await call.answer()

    gateway = await start_gateway(alone=True)
    upstreams[0].behaviour = close_on_second
    assert (await gateway.get(stream=stream)).status == 200
    exchange = await gateway.get(stream=stream)
    assert exchange.status == 200
    kinds = [attempt.error for attempt in gateway.decision(exchange).attempts]
    assert kinds == ["stale_connection", None]
    assert gateway.app.fleet.backends["a"].state() == "healthy"


async def test_internal_error(start_gateway: Any, upstreams: Any, stream: bool) -> None:
    gateway = await start_gateway()
    upstreams[0].behaviour = lambda call: call.json(500, {"error": {"message": LEAK}})
    await failover(gateway, stream, "backend_failed")


async def test_internal_error_everywhere(start_gateway: Any, upstreams: Any, stream: bool) -> None:
    gateway = await start_gateway()
    for upstream in upstreams:
        upstream.behaviour = lambda call: call.json(500, {"error": {"message": LEAK}})
    exchange = await gateway.get(stream=stream)
    assert exchange.status == 502
    assert exchange.json()["error"]["code"] == "backend_failed"
    assert LEAK not in exchange.body.decode()
    assert [len(upstream.calls) for upstream in upstreams] == [1, 1]
    assert gateway.in_flight() == 0


@pytest.mark.parametrize("status", [429, 503])
async def test_busy(start_gateway: Any, upstreams: Any, stream: bool, status: int) -> None:
    """Another backend serves; the busy one is spared for a while, but never ejected."""
    gateway = await start_gateway()
    upstreams[0].behaviour = lambda call: call.json(status, {"error": {}}, retry_after="5")
    await failover(gateway, stream, "backend_busy")
    for _ in range(5):
        assert (await gateway.get(stream=stream)).headers["x-forebay-backend"] == "b"
    assert len(upstreams[0].calls) == 1
    assert gateway.app.fleet.backends["a"].state() == "healthy"


async def test_bad_request_is_passed_through(
    start_gateway: Any, upstreams: Any, stream: bool
) -> None:
    """A 400 is the request's fault: no second backend is bothered, and no backend is punished."""
    error = {"message": "too long", "type": "invalid_request_error", "param": None, "code": "long"}
    gateway = await start_gateway()
    for upstream in upstreams:
        upstream.behaviour = lambda call: call.json(400, {"error": error})
    for _ in range(10):
        exchange = await gateway.get(stream=stream)
        assert exchange.status == 400
        assert exchange.json()["error"]["message"] == "too long"
        assert exchange.headers["x-forebay-attempts"] == "1"
    assert {backend.state() for backend in gateway.app.fleet.backends.values()} == {"healthy"}


async def test_no_first_token(start_gateway: Any, upstreams: Any, stream: bool) -> None:
    gateway = await start_gateway(timeouts={"first_token": 0.3})

    async def hang(call: Any) -> None:
        if stream:
            await call.head()
        await call.hang()

    upstreams[0].behaviour = hang
    await failover(gateway, stream, "backend_timeout")
    await asyncio.wait_for(upstreams[0].calls[0].gone.wait(), 5)


async def test_no_first_token_anywhere(start_gateway: Any, upstreams: Any, stream: bool) -> None:
    gateway = await start_gateway(alone=True, timeouts={"first_token": 0.3})
    upstreams[0].behaviour = lambda call: call.hang()
    exchange = await gateway.get(stream=stream)
    assert exchange.status == 504
    assert exchange.json()["error"]["code"] == "first_token_timeout"
    await asyncio.wait_for(upstreams[0].calls[0].gone.wait(), 5)
    assert gateway.in_flight() == 0


def whole(body: bytes, headers: bytes = b"content-type: application/json\r\n") -> bytes:
    return b"HTTP/1.1 200 OK\r\n%scontent-length: %d\r\n\r\n%s" % (headers, len(body), body)


ODD_ANSWERS = {
    "not HTTP": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "HTML": whole(b"<br>", b"content-type: text/html\r\n"),
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "redirect": b"HTTP/1.1 307 X\r\nlocation: http://169.254.169.254/\r\ncontent-length: 0\r\n\r\n",
    "compressed": whole(
        b"\x1f\x8b\x08", b"content-type: application/json\r\ncontent-encoding: gzip\r\n"
    ),
    "cut short": whole(b'{"choices": []}')[:-5],
    "not JSON": whole(b"{a}"),
    "no choices": whole(b"{}"),
}


@pytest.mark.parametrize("odd", ODD_ANSWERS)
async def test_answer_that_makes_no_sense(start_gateway: Any, upstreams: Any, odd: str) -> None:
    async def behave(call: Any) -> None:
        await call.send(ODD_ANSWERS[odd])
        call.fin()

    gateway = await start_gateway()
    upstreams[0].behaviour = behave
    exchange = await gateway.get()
    assert exchange.status == 200
    assert exchange.headers["x-forebay-backend"] == "b"
    upstreams[1].behaviour = behave
    exchange = await gateway.get()
    assert exchange.status == 502
    assert exchange.json()["error"]["type"] == "upstream_error"


async def test_all_dead_is_told_at_once(start_gateway: Any, upstreams: Any, stream: bool) -> None:
    """No queue, no timeout: a model without a healthy backend answers 503 and when to come back."""
    gateway = await start_gateway(queue_timeout=300)
    for upstream in upstreams:
        await upstream.stop()
    await gateway.until("a", "unhealthy")
    await gateway.until("b", "unhealthy")
    exchange = await asyncio.wait_for(gateway.get(stream=stream), 5)
    assert exchange.status == 503
    assert exchange.json()["error"]["code"] == "no_backend_available"
    assert int(exchange.headers["retry-after"]) >= 1


async def test_comes_back(start_gateway: Any, upstreams: Any) -> None:
    gateway = await start_gateway(alone=True)
    await upstreams[0].stop()
    await gateway.until("a", "unhealthy")
    await upstreams[0].start()
    await gateway.until("a", "healthy")
    assert (await gateway.get()).status == 200


async def test_ejected_after_failures_and_tried_again(start_gateway: Any, upstreams: Any) -> None:
    """Probes succeed, requests fail: only the failures can take this backend out."""
    gateway = await start_gateway()
    upstreams[0].behaviour = lambda call: call.json(500, {})
    for _ in range(6):
        assert (await gateway.get()).status == 200
    assert gateway.app.fleet.backends["a"].state() == "ejected"
    assert len(upstreams[0].calls) == 3
