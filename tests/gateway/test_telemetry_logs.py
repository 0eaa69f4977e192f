from __future__ import annotations

import asyncio
import json
import logging
import warnings

import pytest
import structlog
from msgspec import structs

from forebay.api import AttemptRecord, Decision, Identity, Outcome, Usage
from forebay.config import Logging
from forebay.telemetry import logs

DECISION = Decision(
    request_id="req-1",
    time=1.0,
    endpoint="chat",
    model="gemma",
    identity=Identity(key="ci", tenant="blue"),
    policy="prefix_affinity",
    policy_version="1",
    seed=0,
    candidates=(),
    order=("a", "b"),
    trace_id="4bf92f3577b34da6a3ce929d0e0e4736",
    attempts=(AttemptRecord("a", 0.0, 0.1, "connect_failed"), AttemptRecord("b", 0.1, 1.0)),
    outcome=Outcome(
        result="ok",
        queue=0.125,
        ttft=0.25,
        duration=1.5,
        overhead=0.0005,
        events=64,
        finish_reasons=("stop",),
        usage=Usage(prompt_tokens=9, completion_tokens=64, cached_tokens=8),
        lane="relay",
    ),
)


pytestmark = pytest.mark.usefixtures("logging_as_before")


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return [json.loads(line) for line in captured.err.splitlines()]


def test_a_request_is_one_wide_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Logging())
    logs.request_done(DECISION)
    (line,) = lines(capsys)
    assert list(line)[:3] == ["timestamp", "level", "event"]
    assert str(line.pop("timestamp")).endswith("Z")
    assert line == {
        "level": "info",
        "event": "request done",
        "logger": "forebay.request",
        "request_id": "req-1",
        "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
        "endpoint": "chat",
        "model": "gemma",
        "tenant": "blue",
        "key": "ci",
        "policy": "prefix_affinity",
        "backend": "b",
        "attempts": 2,
        "outcome": "ok",
        "status": 200,
        "error": None,
        "duration": 1.5,
        "ttft": 0.25,
        "queue": 0.125,
        "overhead": 0.0005,
        "events": 64,
        "input_tokens": 9,
        "output_tokens": 64,
        "cached_tokens": 8,
        "usage_source": "reported",
        "finish_reasons": ["stop"],
        "lane": "relay",
    }


@pytest.mark.parametrize(
    ("result", "level"),
    [
        ("ok", "info"),
        ("client_error", "info"),
        ("client_disconnect", "info"),
        ("shed", "warning"),
        ("truncated", "warning"),
        ("internal_error", "error"),
    ],
)
def test_its_level_tells_whose_trouble_it_was(
    capsys: pytest.CaptureFixture[str], result: str, level: str
) -> None:
    logs.configure(Logging())
    logs.request_done(structs.replace(DECISION, outcome=Outcome(result=result)))
    (line,) = lines(capsys)
    assert line["level"] == level


def test_lines_below_the_level_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Logging(level="warning"))
    logs.request_done(DECISION)
    logging.getLogger("uvicorn.error").info("started")
    logging.getLogger("uvicorn.error").warning("oh")
    assert [line["event"] for line in lines(capsys)] == ["oh"]


def test_libraries_come_out_in_the_same_form(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "litestar"):
        logger = logging.getLogger(name)
        logger.addHandler(logging.StreamHandler())
        logger.propagate = False
    logs.configure(Logging())
    logging.getLogger("uvicorn.error").info("Started server process")
    logging.getLogger("uvicorn.error").warning("listening on %s", "port 8000")
    logging.getLogger("litestar").error("it failed")
    logging.getLogger("uvicorn.access").info("GET / 200")
    logging.getLogger("aiohttp.client").debug("a whole body")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("careful", UserWarning, stacklevel=1)
    found = lines(capsys)
    assert [(line["logger"], line["level"]) for line in found] == [
        ("uvicorn.error", "warning"),
        ("litestar", "error"),
        ("py.warnings", "warning"),
    ]
    assert found[0]["event"] == "listening on port 8000"


def test_debug_is_for_our_own_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Logging(level="debug"))
    logging.getLogger("aiohttp.client").debug("a whole body")
    structlog.get_logger().debug("ours")
    assert [line["event"] for line in lines(capsys)] == ["ours"]


async def test_lines_of_a_request_name_it_and_others_do_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure(Logging())

    async def serve(request_id: str) -> None:
        logs.in_request(request_id, "t" + request_id)
        await asyncio.sleep(0)
        logging.getLogger("some.plugin").warning("hm")
        structlog.get_logger().warning("hm")

    await asyncio.gather(asyncio.create_task(serve("1")), asyncio.create_task(serve("2")))
    structlog.get_logger().warning("outside")
    found = [(line.get("request_id"), line.get("trace_id")) for line in lines(capsys)]
    assert found == [("1", "t1"), ("1", "t1"), ("2", "t2"), ("2", "t2"), (None, None)]


@pytest.mark.parametrize("style", ["json", "console"])
def test_prompts_and_secrets_are_withheld(capsys: pytest.CaptureFixture[str], style: str) -> None:
    logs.configure(Logging(format=style))  # type: ignore[arg-type]  # one of the two literals
    said = "-".join(("tell", "nobody"))  # a traceback shows the source, so it is not spelt out
    for field in sorted(logs.WITHHELD):
        structlog.get_logger().warning("x", **{field: said})

    def handler(prompt: str) -> None:
        raise RuntimeError("the handler failed")

    try:
        handler(said)
    except RuntimeError:
        structlog.get_logger().exception("oops")
        logging.getLogger("some.plugin").exception("oops")
    written = capsys.readouterr().err
    assert "tell-nobody" not in written
    assert "the handler failed" in written
    assert written.count("(withheld)") == len(logs.WITHHELD)


@pytest.mark.parametrize("style", ["json", "console"])
def test_a_client_can_not_forge_a_line(capsys: pytest.CaptureFixture[str], style: str) -> None:
    logs.configure(Logging(format=style))  # type: ignore[arg-type]  # one of the two literals
    evil = 'x"\r\n{"event":"forged"}\x1b[2J\x9b31m'
    structlog.get_logger().warning(evil, request_id=evil)
    logging.getLogger("some.plugin").warning("%s", evil)
    written = capsys.readouterr().err
    assert len(written.splitlines()) == 2
    assert "\x1b" not in written


def test_a_line_is_written_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Logging())
    odd = {"half": "\ud800", "object": object(), "huge": 2**70, "nan": float("nan")}
    structlog.get_logger().warning("odd", **odd)
    (line,) = lines(capsys)
    assert line["half"] == "\ud800"


def test_console_is_text_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Logging(format="console"))
    logs.request_done(DECISION)
    written = capsys.readouterr().err
    assert "request done" in written
    assert "backend=b" in written
    with pytest.raises(json.JSONDecodeError):
        json.loads(written)


def test_configuring_again_replaces(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Logging(format="console"))
    logs.configure(Logging())
    logs.request_done(DECISION)
    logging.getLogger("x").warning("once")
    assert len(lines(capsys)) == 2
