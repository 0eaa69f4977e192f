"""CPU time of the relay scan, in µs per streamed event.

    python benchmarks/scan.py

Events have the shapes that vLLM 0.32 and llama.cpp b11434 send. The best of seven runs is printed:
on a shared machine the others measure the neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from forebay.api import GenerateRequest
from forebay_plugins.sse import Scanner

EVENTS = 2000
HEAD = b'data: {"id":"chatcmpl-7f2f8c9d0e1a4b5c","object":"chat.completion.chunk","created":1795370187,'  # noqa: E501 - one event as it comes
TAIL = (
    b'"created":1795369905,"id":"chatcmpl-QSr9Op1sAXwVpCjmIi9MGrbHyB7ifvvw","model":"gemma-3-270m",'
    b'"system_fingerprint":"b0-unknown","object":"chat.completion.chunk"}\n\n'
)


def vllm(delta: bytes, reason: bytes = b"null") -> bytes:
    return (
        HEAD + b'"model":"gemma-3-270m","choices":[{"index":0,"delta":' + delta
        + b',"logprobs":null,"finish_reason":' + reason + b',"token_ids":null}]}\n\n'
    )  # fmt: skip


def llamacpp(delta: bytes, reason: bytes = b"null") -> bytes:
    choice = b'data: {"choices":[{"finish_reason":' + reason + b',"index":0,"delta":' + delta
    return choice + b"}]," + TAIL


def one_by_one(events: list[bytes]) -> Iterator[bytes]:
    yield from events


def eight_at_once(events: list[bytes]) -> Iterator[bytes]:
    for start in range(0, len(events), 8):
        yield b"".join(events[start : start + 8])


def cut_anywhere(events: list[bytes]) -> Iterator[bytes]:
    stream = b"".join(events)
    for start in range(0, len(stream), 1009):
        yield stream[start : start + 1009]


def crlf(events: list[bytes]) -> Iterator[bytes]:
    for event in events:
        yield event.replace(b"\n", b"\r\n")


def measure(chunks: list[bytes], model: str) -> float:
    best = float("inf")
    for _ in range(7):
        request = GenerateRequest(id="r", endpoint="chat", model=model, created=1, stream=True)
        scanner = Scanner(request)
        begun = time.process_time()
        for chunk in chunks:
            scanner.feed(chunk)
        best = min(best, time.process_time() - begun)
        scanner.end()
    return best * 1e6 / EVENTS


def main() -> None:
    for name, event in (("vllm", vllm), ("llama.cpp", llamacpp)):
        events = [event(b'{"role":"assistant","content":""}')]
        events += [event(b'{"content":" token %d"}' % number) for number in range(EVENTS - 2)]
        events += [event(b"{}", b'"stop"')]
        for cut in (one_by_one, eight_at_once, cut_anywhere, crlf):
            chunks = list(cut(events))
            same, other = measure(chunks, "gemma-3-270m"), measure(chunks, "another-name")
            print(f"{name:10} {cut.__name__:14} {same:6.2f} µs/event, renamed {other:6.2f}")


if __name__ == "__main__":
    main()
