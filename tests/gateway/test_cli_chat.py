"""`forebay chat` against a small data port."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from click.testing import CliRunner, Result

from forebay.cli import main


class DataPort(ThreadingHTTPServer):
    """Answers with the number of messages it got; some questions make it misbehave."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models = ["gemma", "other"]
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: DataPort

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            models = [{"id": name, "object": "model"} for name in self.server.models]
            self._answer(200, json.dumps({"object": "list", "data": models}))
        else:
            self._answer(200, "<html>")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers["authorization"])
        question = body["messages"][-1]["content"]
        if question == "refuse":
            error = {"message": "the model is full", "type": "x", "param": None, "code": "y"}
            self._answer(503, json.dumps({"error": error}))
        elif question == "crash":
            self._answer(502, "Bad Gateway")
        else:
            self._answer(200, "".join(_events(question, len(body["messages"]))))

    def _answer(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


def _events(question: str, count: int) -> Iterator[str]:
    yield ": keep-alive\n\n"
    yield _event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    yield _event({"choices": [{"index": 0, "delta": {"content": f"{count} \x1b[2J"}}]})
    if question == "break":
        yield _event({"error": {"message": "the backend has died", "code": "stream_truncated"}})
        return
    if question == "stop short":
        return
    if question == "babble":
        yield "data: what?\n\n"
        return
    yield _event({"choices": [{"index": 0, "delta": {"content": "grüße"}}]})
    yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    yield _event({"choices": [], "usage": {"prompt_tokens": 1}})
    yield "data: [DONE]\n\n"


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


@pytest.fixture
def port() -> Iterator[DataPort]:
    with DataPort() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(*arguments: str, typed: str = "", **environment: str) -> Result:
    return CliRunner().invoke(
        main, ["chat", *arguments], input=typed, env=environment, catch_exceptions=False
    )


def test_one_question_is_answered_by_the_first_model(port: DataPort) -> None:
    result = run("Hello?", "--url", port.url, FOREBAY_API_KEY="fb-1")
    assert result.exit_code == 0
    assert result.stdout == "1 [2Jgrüße\n"  # what would clear the screen has lost its escape
    (asked,) = port.asked
    assert asked == {
        "model": "gemma",
        "messages": [{"role": "user", "content": "Hello?"}],
        "max_tokens": 512,
        "stream": True,
    }
    assert port.keys == ["Bearer fb-1"]


def test_a_model_and_an_address_with_v1_may_be_given(port: DataPort) -> None:
    port.models = []
    options = ("--url", f"{port.url}/v1/", "--model", "mine", "--max-tokens", "7")
    assert run("Hello?", *options).exit_code == 0
    assert (port.asked[0]["model"], port.asked[0]["max_tokens"]) == ("mine", 7)
    assert port.keys == [None]


def test_a_conversation_remembers_and_survives_errors(port: DataPort) -> None:
    result = run("--url", port.url, typed="one\n\nrefuse\nbreak\ntwo\n/quit\nnever\n")
    assert result.exit_code == 0
    assert "refused with HTTP 503: the model is full" in result.stderr
    assert "the answer broke off: the backend has died" in result.stderr
    # What was refused or broke off is not part of the conversation.
    contents = [[message["content"] for message in asked["messages"]] for asked in port.asked]
    answer = "1 \x1b[2Jgrüße"
    assert contents == [
        ["one"],
        ["one", answer, "refuse"],
        ["one", answer, "break"],
        ["one", answer, "two"],
    ]


def test_a_conversation_ends_with_its_input(port: DataPort) -> None:
    assert run("--url", port.url, typed="one\n").exit_code == 0
    assert len(port.asked) == 1


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("refuse", "Error: refused with HTTP 503: the model is full"),
        ("crash", "Error: refused with HTTP 502: Bad Gateway"),
        ("break", "Error: the answer broke off: the backend has died"),
        ("stop short", "Error: the answer broke off before its end; see the gateway's log"),
        ("babble", "Error: the stream holds something else than chunks: what?"),
    ],
)
def test_what_goes_wrong_is_said_in_a_line(port: DataPort, question: str, said: str) -> None:
    result = run(question, "--url", port.url)
    assert result.exit_code == 1
    assert result.stderr.strip().splitlines()[-1] == said


def test_a_gateway_without_models_says_so(port: DataPort) -> None:
    port.models = []
    result = run("Hello?", "--url", port.url)
    assert result.exit_code == 1
    assert "serves no model" in result.stderr


def test_what_is_no_gateway_is_told_apart(port: DataPort) -> None:
    result = run("Hello?", "--url", f"{port.url}/elsewhere")
    assert result.exit_code == 1
    assert "is not an OpenAI-compatible endpoint" in result.stderr
    with socket.create_server(("127.0.0.1", 0)) as free:
        gone = free.getsockname()[1]
    result = run("Hello?", "--url", f"http://127.0.0.1:{gone}")
    assert result.exit_code == 1
    assert f"cannot reach the gateway at http://127.0.0.1:{gone}" in result.stderr
    assert "forebay serve" in result.stderr
    result = run("Hello?", "--url", "localhost")
    assert result.exit_code == 2
    assert "is not an http(s) URL" in result.stderr
