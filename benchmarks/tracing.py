"""What tracing costs a request, in CPU microseconds.

    python benchmarks/tracing.py [--rounds 5]

One request here is a decision, an attempt with first token, usage and timings, and the end: six
spans when sampled. Spans go to an HTTP server in a process of its own that reads and forgets them.
"""

from __future__ import annotations

import argparse
import http.server
import multiprocessing
import time
from multiprocessing.connection import Connection

from forebay.api import Candidate, Decision, GenerateRequest, Identity, Outcome, Timings, Usage
from forebay.config import Tracing as Settings
from forebay.telemetry.tracing import Tracing

REQUEST = GenerateRequest(id="r", endpoint="chat", model="gemma-3-270m", created=1, stream=True)
USAGE = Usage(prompt_tokens=128, completion_tokens=64, cached_tokens=96)
TIMINGS = Timings(queue=0.0, prefill=0.0, decode=0.0, source="bench")
DECISION = Decision(
    request_id="r",
    time=0.0,
    endpoint="chat",
    model="gemma-3-270m",
    identity=Identity(),
    policy="prefix_affinity",
    policy_version="1",
    seed=1,
    candidates=(Candidate("a", 0.9), Candidate("b", 0.5), Candidate("c", veto="full")),
    order=("a", "b"),
    outcome=Outcome(result="ok"),
)
#: Six spans each: less than the queue of spans holds, so that none is dropped.
ROUND = 1200
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-{:02x}"


class Sink(http.server.BaseHTTPRequestHandler):
    """Answers 200 to everything."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


def sink(port: Connection) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), Sink)
    port.send(server.server_port)
    server.serve_forever()


def one_request(tracing: Tracing, headers: dict[str, str]) -> None:
    trace = tracing.request("/v1/chat/completions", "POST", headers)
    now = time.time_ns()
    trace.decided(DECISION, now, now)
    attempt = trace.attempt(1, "a", "vllm", "http://127.0.0.1:8081", REQUEST)
    attempt.first_token()
    attempt.end(usage=USAGE, timings=TIMINGS, finish_reasons=("stop",), lane="relay")
    trace.end(200, DECISION, None)


def measure(settings: Settings, headers: dict[str, str], rounds: int) -> tuple[float, float]:
    """CPU µs a request: in the thread that serves it, and in the process, export included."""
    serving = process = 0.0
    for _ in range(rounds):
        tracing = Tracing.build(settings)
        process -= time.process_time()
        serving -= time.thread_time()
        for _ in range(ROUND):
            one_request(tracing, headers)
        serving += time.thread_time()
        tracing.close()
        process += time.process_time()
        if tracing.spans().get("dropped") or tracing.spans().get("failed"):
            raise SystemExit(f"not every span was exported: {dict(tracing.spans())}")
    return serving / rounds / ROUND * 1e6, process / rounds / ROUND * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help=f"of {ROUND} requests each")
    rounds = parser.parse_args().rounds
    receive, send = multiprocessing.Pipe(duplex=False)
    collector = multiprocessing.Process(target=sink, args=(send,), daemon=True)
    collector.start()
    endpoint = f"http://127.0.0.1:{receive.recv()}"
    cases: list[tuple[str, Settings, dict[str, str]]] = [
        ("off", Settings(), {}),
        ("off, traceparent passed on", Settings(), {"traceparent": PARENT.format(1)}),
        ("unsampled, own trace", Settings(otlp_endpoint=endpoint, sample=0.0), {}),
        (
            "unsampled, client's trace",
            Settings(otlp_endpoint=endpoint),
            {"traceparent": PARENT.format(0)},
        ),
        ("sampled, own trace", Settings(otlp_endpoint=endpoint), {}),
        (
            "sampled, client's trace",
            Settings(otlp_endpoint=endpoint),
            {"traceparent": PARENT.format(1)},
        ),
    ]
    print(f"{'µs of CPU a request':<28} {'serving':>8} {'process':>8}")
    for name, settings, headers in cases:
        serving, process = measure(settings, headers, rounds)
        print(f"{name:<28} {serving:>8.1f} {process:>8.1f}")
    collector.terminate()


if __name__ == "__main__":
    main()
