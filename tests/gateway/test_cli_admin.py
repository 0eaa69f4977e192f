"""`forebay backends` and `forebay explain` against a small admin server."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import msgspec
import pytest
from click.testing import CliRunner, Result

from forebay.api import (
    AttemptRecord,
    Candidate,
    Capabilities,
    Decision,
    Identity,
    Outcome,
    Usage,
)
from forebay.cli import main
from forebay.cli.backends import Fleet
from forebay.examination import Examination, Finding

DECISION = Decision(
    request_id="req/7",
    time=1_800_000_000.0,
    endpoint="chat",
    model="gemma",
    identity=Identity(key="ops", tenant="platform"),
    policy="prefix_affinity",
    policy_version="1",
    seed=42,
    candidates=(
        Candidate(backend="vllm-1", veto="unhealthy"),
        Candidate(backend="llama", score=0.5, in_flight=3, load_age=1.25),
        Candidate(backend="native", score=0.875, in_flight=1, prefix_tokens=96, load_age=0.012),
    ),
    order=("native", "llama"),
    probability=0.75,
    trace_id="4bf92f3577b34da6a3ce929d0e0e4736",
    attempts=(
        AttemptRecord(backend="native", started=0.0004, duration=0.9, error="connect_failed"),
        AttemptRecord(backend="llama", started=0.9005, duration=2.25),
    ),
    outcome=Outcome(
        result="ok",
        queue=0.25,
        ttft=1.5,
        duration=3.2,
        overhead=0.00041,
        events=12,
        finish_reasons=("length",),
        usage=Usage(21, 64),
        lane="relay",
    ),
)

CAPABILITIES = Capabilities(tools=True, logprobs=True, max_context=32768, slots=4, version="b123")
EXAMINATION = Examination(
    version="b123",
    began=1_800_000_000.0,
    seconds=2.5,
    pending=("cancel",),
    findings={
        "usage": Finding("holds"),
        "stop": Finding("unknown", "it gave another answer to the same question", again=True),
        "completions_schema": Finding("holds"),
        "tools": Finding("fails", "refused: no parser"),
    },
)
BACKENDS = [
    {
        "name": "llama",
        "adapter": "llamacpp",
        "state": "healthy",
        "reason": None,
        "in_flight": 2,
        "max_in_flight": 4,
        "running": 1,
        "waiting": 0,
        "kv_usage": 0.375,
        "load_age": 0.5,
        "ttft": 0.0421,
        "models": ["gemma"],
        "capabilities": msgspec.to_builtins(CAPABILITIES),
        "requests": 1200,
        "failures": 3,
        "cache": {"blocks": 1200, "tokens": 38400, "gaps": 2, "sequence": 9, "age": 0.25},
        "examination": msgspec.to_builtins(EXAMINATION),
        "of_a_later_version": 1,
    },
    {
        "name": "vllm-1",
        "adapter": "vllm",
        "state": "ejected",
        "reason": "connect_failed 3 times in a row",
        "in_flight": 0,
        "max_in_flight": 0,
        "running": None,
        "waiting": None,
        "kv_usage": None,
        "load_age": None,
        "ttft": None,
        "models": [],
        "capabilities": None,
        "requests": 3,
        "failures": 3,
    },
]


class AdminPort(BaseHTTPRequestHandler):
    answers: ClassVar[dict[str, Any]] = {
        "/backends": {"backends": BACKENDS},
        "/decisions/req%2F7": {**msgspec.to_builtins(DECISION), "chosen": "native"},
        "/decisions?limit=1": {"decisions": [msgspec.to_builtins(DECISION)]},
        "/none/backends": {"backends": []},
        "/none/decisions?limit=1": {"decisions": []},
        "/odd/backends": {"object": "list"},
    }

    def do_GET(self) -> None:
        found = self.answers.get(self.path)
        body = json.dumps(found if found is not None else {"error": "no"}).encode()
        self.send_response(200 if found is not None else 404)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture(scope="module")
def admin() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), AdminPort) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # must not be asked


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(main, arguments, env=environment, catch_exceptions=False)


def line_with(output: str, start: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith(start)]
    return " ".join(line.split())


def test_backends_are_a_table_and_a_sentence_each(admin: str) -> None:
    result = run("backends", "--admin", admin)
    assert result.exit_code == 0
    assert line_with(result.output, "llama (").split(maxsplit=2)[2] == (
        "healthy 2/4 1 0 38% 42.1 ms 1200 3"
    )
    assert line_with(result.output, "vllm-1 (").endswith("ejected 0 – – – – 3 3")
    assert "llama serves gemma; chat, completions, logprobs; context 32,768; slots 4" in " ".join(
        result.output.split()
    )
    cache = "1,200 blocks known cached (38,400 tokens), told 250 ms ago, events lost 2 times"
    assert cache in " ".join(result.output.split())
    for line in (
        "proven: usage, schema in completions",
        "refuted: tools (refused: no parser)",
        "not known: stop (it gave another answer to the same question)",
        "being examined: cancel",
    ):
        assert line_with(result.output, f"        {line[:7]}") == line
    assert line_with(result.output, "vllm-1  connect") == (
        "vllm-1 connect_failed 3 times in a row; serves no model"
    )
    assert max(map(len, result.output.splitlines())) <= 100


def test_backends_as_json_are_those_of_the_admin_port(admin: str) -> None:
    output = run("backends", "--json", FOREBAY_ADMIN=f"{admin}/").output
    assert msgspec.json.decode(output, type=Fleet) == msgspec.convert({"backends": BACKENDS}, Fleet)


def test_no_backends_are_not_an_empty_table(admin: str) -> None:
    assert run("backends", "--admin", f"{admin}/none").output == "No backends are configured.\n"


@pytest.mark.parametrize("which", ["req/7", "--last"])
def test_explain_tells_the_whole_story(admin: str, which: str) -> None:
    result = run("explain", which, "--admin", admin)
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    for said in (
        "request req/7",
        "chat, model gemma",
        "by ops, tenant platform",
        "policy prefix_affinity, version 1, seed 42",
        "native with 0.875, before llama with 0.500; chosen with probability 0.75",
        "ok, HTTP 200, after 3.2 s; queued 250 ms, first token after 1.5 s; overhead 0.41 ms",
        "21 tokens in, 64 out; finish: length; relay lane, events: 12",
        "trace 4bf92f3577b34da6a3ce929d0e0e4736",
        "native 0.875 1 96 tokens 12 ms winner llama 0.500 3 0 tokens 1.25 s place 2",
        "vllm-1 – 0 0 tokens – out: unhealthy",
        "1 native 0.4 ms 900 ms failed: connect_failed",
        "2 llama 900 ms 2.25 s served",
    ):
        assert said in text
    assert max(map(len, result.output.splitlines())) <= 100


def test_explain_as_json_is_the_decision(admin: str) -> None:
    output = run("explain", "req/7", "--json", "--admin", admin).output
    assert msgspec.json.decode(output, type=Decision) == DECISION


def test_explain_of_a_request_that_was_refused(admin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = msgspec.structs.replace(
        DECISION, order=(), candidates=DECISION.candidates[:1], attempts=(), outcome=None
    )
    monkeypatch.setitem(AdminPort.answers, "/decisions/r", msgspec.to_builtins(refused))
    output = run("explain", "r", "--admin", admin).output
    assert "no backend was eligible" in output
    assert "still in flight" in output
    assert "attempt" not in output


def test_explain_wants_one_request(admin: str) -> None:
    for arguments in (["explain"], ["explain", "x", "--last"]):
        result = run(*arguments, "--admin", admin)
        assert result.exit_code == 2
        assert "either the ID of a request or --last" in result.output


def test_explain_of_an_unknown_request_says_where_ids_are(admin: str) -> None:
    result = run("explain", "other", "--admin", admin)
    assert result.exit_code == 1
    assert "no decision is kept for request other" in result.output
    assert "x-request-id" in result.output
    assert "no request has been served yet" in run("explain", "--last", "--admin",
                                                   f"{admin}/none").output  # fmt: skip


def test_no_gateway_there_says_so_with_the_url() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    result = run("backends", "--admin", f"http://127.0.0.1:{port}")
    assert result.exit_code == 1
    assert f"cannot reach the admin port at http://127.0.0.1:{port}" in result.output
    assert "--admin URL" in result.output
    assert len(result.output.splitlines()) == 1


def test_what_is_no_admin_port_is_told_apart(admin: str) -> None:
    for path in ("/odd", "/absent"):
        result = run("backends", "--admin", f"{admin}{path}")
        assert result.exit_code == 1
        assert "is it the data port, or another program?" in result.output


@pytest.mark.parametrize("url", ["localhost:8001", "127.0.0.1:8001", "http://[::1", "ftp://h"])
def test_an_address_that_is_no_url_is_the_users_mistake(url: str) -> None:
    result = run("backends", "--admin", url)
    assert result.exit_code == 2
    assert "is not an http(s) URL" in result.output
