"""`forebay chat`: a conversation in the terminal, over the data port as any client would."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

import click
import httpx
import msgspec
from msgspec import Struct

from forebay.cli.group import Failed

#: Seconds. A model may think long before its first token; the gateway has its own limits.
_TIMEOUT = httpx.Timeout(5.0, read=None)
# A model may write anything; what would steer the terminal (C0, DEL, C1) is left out.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


class _Message(Struct, frozen=True):
    role: str
    content: str


class _Piece(Struct, frozen=True):
    content: str | None = None


class _Choice(Struct, frozen=True):
    delta: _Piece = _Piece()


class _Error(Struct, frozen=True):
    message: str


class _Chunk(Struct, frozen=True):
    choices: list[_Choice] = []
    error: _Error | None = None


class _Named(Struct, frozen=True):
    id: str


class _Models(Struct, frozen=True):
    data: list[_Named]


class Conversation(NamedTuple):
    client: httpx.Client
    model: str
    messages: list[_Message]
    max_tokens: int

    def ask(self, text: str) -> Iterator[str]:
        """The answer in pieces. Question and answer are kept once the answer has come whole.

        :raises Failed: the gateway or the backend refused or broke off.
        """
        asked = [*self.messages, _Message("user", text)]
        body = {
            "model": self.model,
            "messages": asked,
            "max_tokens": self.max_tokens,
            "stream": True,
        }
        answer = []
        with self.client.stream(
            "POST",
            "/v1/chat/completions",
            content=msgspec.json.encode(body),
            headers={"content-type": "application/json"},
        ) as response:
            if response.status_code != httpx.codes.OK:
                raise Failed(_reason(response.status_code, response.read()))
            for piece in _pieces(response):
                answer.append(piece)
                yield piece
        self.messages[:] = [*asked, _Message("assistant", "".join(answer))]


@click.command()
@click.argument("text", required=False)
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The gateway.")
@click.option("--model", help="The model to talk to.  [default: the first one it serves]")
@click.option("--key", envvar="FOREBAY_API_KEY", help="API key; better in $FOREBAY_API_KEY.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Longest answer, in tokens.",
)
def chat(text: str | None, url: str, model: str | None, key: str | None, max_tokens: int) -> None:
    """Talk to a model. With TEXT: one question, one answer.

    In a conversation, Ctrl-C stops an answer; /quit or Ctrl-D ends it.
    """
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(
            base_url=base, headers=headers, timeout=_TIMEOUT, trust_env=False
        ) as client:
            conversation = Conversation(client, model or _first_model(client), [], max_tokens)
            if text is not None:
                _say(conversation, text)
            else:
                _converse(conversation)
    except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise click.BadParameter(
            f"'{url}' is not an http(s) URL; write one like http://127.0.0.1:8000",
            param_hint="--url",
        ) from error
    except httpx.TransportError as error:
        raise Failed(
            f"cannot reach the gateway at {base}: {error or type(error).__name__}. "
            "Start it with `forebay serve`, or give its address with --url URL"
        ) from error


def _first_model(client: httpx.Client) -> str:
    response = client.get("/v1/models")
    if response.status_code != httpx.codes.OK:
        raise Failed(_reason(response.status_code, response.content))
    try:
        models = msgspec.json.decode(response.content, type=_Models).data
    except msgspec.DecodeError as error:
        raise Failed(f"{client.base_url} is not an OpenAI-compatible endpoint") from error
    if not models:
        raise Failed("the gateway serves no model; add one under `models` in its configuration")
    return models[0].id


def _converse(conversation: Conversation) -> None:
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 - gives input() its editing and history

        click.echo(f"Talking to {conversation.model}. /quit ends, Ctrl-C stops an answer.")
    while True:
        try:
            text = input("\n> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if text == "/quit":
            return
        if text:
            _answer(conversation, text)
    if interactive:
        click.echo()


def _answer(conversation: Conversation, text: str) -> None:
    """One turn; what goes wrong in it does not end the conversation."""
    try:
        _say(conversation, text)
    except KeyboardInterrupt:
        click.echo("\n(stopped)")
    except Failed as error:
        click.echo(f"\n{error.message}", err=True)


def _say(conversation: Conversation, text: str) -> None:
    for piece in conversation.ask(text):
        click.echo(piece.translate(_CONTROLS), nl=False)
        sys.stdout.flush()
    click.echo()


def _pieces(response: httpx.Response) -> Iterator[str]:
    """The text of each SSE event (WHATWG HTML, section 9.2.6), up to `[DONE]`."""
    for line in response.iter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        try:
            chunk = msgspec.json.decode(data.encode(), type=_Chunk)
        except msgspec.DecodeError as error:
            raise Failed(f"the stream holds something else than chunks: {data[:80]}") from error
        if chunk.error is not None:
            raise Failed(f"the answer broke off: {chunk.error.message}")
        yield from (choice.delta.content for choice in chunk.choices if choice.delta.content)
    raise Failed("the answer broke off before its end; see the gateway's log")


def _reason(status: int, body: bytes) -> str:
    try:
        error = msgspec.json.decode(body, type=_Chunk).error
    except msgspec.DecodeError:
        error = None
    said = error.message if error is not None else body[:200].decode(errors="replace")
    return f"refused with HTTP {status}: {said}"
