"""An OpenAI-shaped upstream that costs next to nothing, to measure what stands in front of it.

    python benchmarks/mock_upstream.py --port 8100 --interval 0.02

Answers `/v1/chat/completions` and `/v1/completions` with canned bytes: at once, or for
`"stream": true` as `max_tokens` events, one every `--interval` seconds. Streams are spread over
the interval as those of a busy server are, instead of all ticking together, which would let
a relay serve hundreds of them with one wake-up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
from typing import Any, cast

import httptools
import uvloop

MODEL = "mock"
SLOT = 0.001  # seconds; the pacer wakes once a slot, so a stream is late by 1 ms at most
END = b"0\r\n\r\n"


def _response(body: dict[str, Any]) -> bytes:
    payload = json.dumps(body, separators=(",", ":")).encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(payload) + payload


def _event(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
    """One SSE event of the size that vLLM sends, as one HTTP chunk."""
    chunk = {
        "id": "chatcmpl-3f1b0c9f7a9d4a0e8d5c2b1a0f9e8d7c",
        "object": "chat.completion.chunk",
        "created": 1_760_000_000,
        "model": MODEL,
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}],
    }
    return _http_chunk(b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n")


def _http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


ANSWER = _response(
    {
        "id": "chatcmpl-3f1b0c9f7a9d4a0e8d5c2b1a0f9e8d7c",
        "object": "chat.completion",
        "created": 1_760_000_000,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Water runs downhill."},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17},
    }
)
MODELS = _response({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0}]})
HEALTH = _response({"status": "ok"})
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
ROLE = _event({"role": "assistant", "content": ""})
TOKEN = _event({"content": " water"})
LAST = _event({"content": ""}, "stop") + _http_chunk(b"data: [DONE]\n\n") + END


class Pacer:
    """Writes the next event of each stream once an interval; each stream has its slot in it."""

    def __init__(self, interval: float) -> None:
        self.slots: list[dict[asyncio.Transport, int]] = [
            {} for _ in range(max(1, round(interval / SLOT)))
        ]
        self._added = 0

    def add(self, transport: asyncio.Transport, tokens: int) -> None:
        transport.write(STREAM_HEAD + ROLE)
        self._added += 7  # coprime with the usual slot counts: neighbours in time lie apart
        self.slots[self._added % len(self.slots)][transport] = tokens

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            for slot in self.slots:
                self._tick(slot)
                due += SLOT
                await asyncio.sleep(due - loop.time())

    def _tick(self, slot: dict[asyncio.Transport, int]) -> None:
        for transport, left in list(slot.items()):
            if transport.is_closing():
                del slot[transport]
            elif left:
                slot[transport] = left - 1
                transport.write(TOKEN)
            else:
                transport.write(LAST)
                del slot[transport]


class Connection(asyncio.Protocol):
    """One keep-alive connection; requests on it come one after another."""

    transport: asyncio.Transport

    def __init__(self, pacer: Pacer) -> None:
        self._pacer = pacer
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's derives from no class

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url, self._body = url, b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._url.startswith(b"/v1/models"):
            self.transport.write(MODELS)
        elif not self._url.startswith(b"/v1/"):
            self.transport.write(HEALTH)
        elif b'"stream"' in self._body and (request := json.loads(self._body))["stream"]:
            self._pacer.add(self.transport, request.get("max_tokens") or 64)
        else:
            self.transport.write(ANSWER)


async def serve(port: int, interval: float) -> None:
    """Serve on loopback until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    pacer = Pacer(interval)
    server = await loop.create_server(lambda: Connection(pacer), "127.0.0.1", port, backlog=1024)
    pacing = asyncio.create_task(pacer.run())
    print(f"mock upstream on {server.sockets[0].getsockname()[1]}", flush=True)
    await stop.wait()
    pacing.cancel()
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--interval", type=float, default=0.02, help="seconds between two events")
    options = parser.parse_args()
    uvloop.run(serve(options.port, options.interval))


if __name__ == "__main__":
    main()
