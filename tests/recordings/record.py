"""Record what a server sends, for tests/plugins/test_recordings.py to play back cut to pieces.

    python tests/recordings/record.py NAME ADAPTER URL '{"messages": ..., ...}' [setting=value...]

writes NAME.json beside this file: the question, and every answer that the adapter read to serve
it, byte for byte. A body with ``prompt`` is a completion. Of the settings, ``server=...`` says for
people which server this was. Keep answers short: each is cut at every byte.
"""

from __future__ import annotations

import asyncio
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from forebay.api import Adapter, AdapterContext, Attempt, Event, GenerateRequest, Identity
from forebay.config import Limits
from forebay.http.decode import decode_chat, decode_completion
from forebay.http.reply import Arrival
from forebay.loader import Registry, load_plugins
from forebay.testing import Recorded, recorder
from forebay.testing.recording import Connect
from forebay.transport import connect

HERE = Path(__file__).parent
#: The model's name for clients, which is not the server's.
ENVELOPE = {"model": "asked", "stream": True}


@cache
def registry() -> Registry:
    return load_plugins(None)


class Recording(msgspec.Struct):
    """A question and what the adapter read of its server to answer it."""

    adapter: str
    #: Which server this was, for people.
    server: str
    settings: dict[str, Any]
    body: dict[str, Any]
    answers: list[Recorded]

    def request(self, **changes: Any) -> GenerateRequest:
        """As the gateway makes it."""
        arrival = Arrival(
            body=json.dumps({**self.body, **ENVELOPE, **changes}).encode(),
            request_id="recorded",
            created=1_700_000_000,
            identity=Identity(),
            headers={},
            parameters={},
        )
        decode = decode_completion if "prompt" in self.body else decode_chat
        request, _ = decode(arrival, Limits())
        assert isinstance(request, GenerateRequest)
        return request

    def build(self, to: Connect) -> Adapter:
        """The adapter, before the server behind ``to``."""
        kind = registry().adapter(self.adapter)
        settings = msgspec.convert(
            {"adapter": self.adapter, "url": "http://server", **self.settings}, kind.settings
        )
        return kind.build(settings, AdapterContext(name="test", connect=to, data_dir=Path()))


def load(path: Path) -> Recording:
    content = json.loads(path.read_bytes())
    for answer in content["answers"]:
        answer["body"] = answer["body"].encode()
    return msgspec.convert(content, Recording, builtin_types=(bytes,))


def save(recording: Recording, path: Path) -> None:
    """As JSON with the bodies as text, so that people can read them."""
    content = msgspec.to_builtins(recording, builtin_types=(bytes,))
    text = json.dumps(content, indent=1, ensure_ascii=False, default=bytes.decode)
    path.write_text(text + "\n")


async def record(recording: Recording, url: str) -> list[Event]:
    """Fill in the answers of the server at ``url``."""
    recording.answers.clear()
    adapter = recording.build(recorder(lambda _: connect(url), recording.answers))
    await adapter.start()
    try:
        return [event async for event in adapter.stream(recording.request(), Attempt())]
    finally:
        await adapter.aclose()


def main() -> None:
    name, adapter, url, body, *settings = sys.argv[1:]
    given = dict(setting.split("=", 1) for setting in settings)
    server = given.pop("server", adapter)
    recording = Recording(adapter, server, given, json.loads(body), [])
    for event in asyncio.run(record(recording, url)):
        print(event)
    save(recording, HERE / f"{name}.json")


if __name__ == "__main__":
    main()
