"""The relay scan: what comes out is right, whatever the chunks; and the errors are found."""

from __future__ import annotations

import itertools
import json
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw
from msgspec.structs import replace

from forebay.api import (
    BackendBusy,
    BackendError,
    BackendFailed,
    BackendGarbage,
    BackendRefused,
    GenerateRequest,
    Relayed,
    StreamTruncated,
    Usage,
)
from forebay.api import Finished as End
from forebay.testing import chat_request
from forebay.testing.answer import read_answer
from forebay_plugins.sse import MAX_EVENT, Scanner

HEAD = {"id": "c1", "object": "chat.completion.chunk", "created": 5, "model": "up"}


def chunk(delta: dict[str, Any], reason: str | None = None, index: int = 0, **more: Any) -> bytes:
    choice = {"index": index, "delta": delta, "finish_reason": reason}
    return event({**HEAD, "choices": [choice], **more})


def event(content: object) -> bytes:
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    return b"data: " + text.encode() + b"\n\n"


ROLE = chunk({"role": "assistant", "content": ""})
STOP = chunk({}, "stop")
DONE = b"data: [DONE]\n\n"


class Run:
    """A stream fed to a scanner in these chunks."""

    def __init__(
        self, request: GenerateRequest, *chunks: bytes, usage_by_choice: bool = False
    ) -> None:
        self.scanner = Scanner(request, usage_by_choice)
        self.out: list[Relayed] = []
        for piece in chunks:
            data = self.scanner.feed(piece)
            assert (self.scanner.events > 0) == bool(data)
            if data:
                self.out.append(Relayed(data, self.scanner.events))
        self.error: BackendError | None = self.scanner.failure
        if self.error is None:
            try:
                tail = self.scanner.end()
                self.out += [Relayed(tail)] if tail else []
            except BackendError as error:
                self.error = error

    @property
    def data(self) -> bytes:
        return b"".join(event.data for event in self.out)

    @property
    def events(self) -> int:
        return sum(event.events for event in self.out)

    @property
    def chunks(self) -> list[dict[str, Any]]:
        return [json.loads(part[6:]) for part in self.data.split(b"\n\n")[:-1]]

    def state(self) -> tuple[object, ...]:
        said = (type(self.error), str(self.error))
        return self.data, self.events, self.scanner.usage, self.scanner.finish_reasons, said


def run(*chunks: bytes, **options: Any) -> Run:
    return Run(chat_request(model="asked", **options), *chunks)


def test_token_events_pass_untouched_but_for_the_name() -> None:
    text = chunk({"content": 'a "model":"up" \\" 😀'})
    done = run(ROLE, text, STOP, DONE)
    assert text.replace(b'"model":"up"', b'"model":"asked"', 1) in done.data
    assert done.chunks[1]["choices"][0]["delta"]["content"] == 'a "model":"up" \\" 😀'


@pytest.mark.parametrize("space", ["", " "])
def test_reasoning_has_one_name(space: str) -> None:
    """Whatever the server calls it, and wherever its bytes are cut."""
    delta = (
        b'"delta":{"reasoning":' + space.encode() + b'"a \\"reasoning\\": \\"b\\"","content":null}'
    )
    thought = chunk({}).replace(b'"delta":{}', delta)
    for size in (1, 7, 10_000):
        stream = ROLE + thought * 3 + STOP + DONE
        pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
        done = run(*pieces)
        said = [part["choices"][0]["delta"] for part in done.chunks[1:4]]
        assert said == [{"reasoning_content": 'a "reasoning": "b"', "content": None}] * 3
    twice = chunk({"reasoning": "x", "reasoning_content": "x"})
    assert run(ROLE, twice, STOP).chunks[1]["choices"][0]["delta"]["reasoning_content"] == "x"


def test_bytes_are_the_same_where_nothing_needs_changing() -> None:
    stream = [ROLE, chunk({"content": "a"}), STOP]
    done = Run(chat_request(model="up"), b"".join(stream), DONE)
    assert done.data == b"".join(stream)
    assert done.events == 3


@pytest.mark.parametrize(
    "text",
    [
        "usage",
        '"reasoning": "',
        'usage"',
        '"finish_reason":"stop"',
        "error",
        "role",
        "data: [DONE]",
        "\r\n\n",
        "}\\",
    ],
)
def test_text_that_looks_like_structure_is_text(text: str) -> None:
    done = run(ROLE, chunk({"content": text}), STOP)
    assert done.error is None
    assert done.chunks[1]["choices"][0]["delta"]["content"] == text


def test_tool_calls_and_logprobs_pass_untouched() -> None:
    call = {"index": 0, "id": "x", "type": "function", "function": {"name": "f", "arguments": ""}}
    tool = chunk({"tool_calls": [call]})
    choice = {"index": 0, "delta": {"content": "y"}, "logprobs": {"content": [{"id": 7}]}}
    logprobs = event({**HEAD, "choices": [{**choice, "finish_reason": None}]})
    done = Run(chat_request(model="up"), ROLE, tool, logprobs, chunk({}, "tool_calls"))
    assert done.data == ROLE + tool + logprobs + chunk({}, "tool_calls")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_line_ends_become_lf(end: bytes) -> None:
    stream = (ROLE + chunk({"content": "a"}) + STOP + DONE).replace(b"\n", end)
    assert Run(chat_request(model="up"), stream).data == ROLE + chunk({"content": "a"}) + STOP


def test_comments_fields_and_blank_lines_are_dropped() -> None:
    plain = chunk({"content": "a"})
    after = plain[:-1] + b"id: 5\n\n"
    before = b"id: 7\nretry: 9\n" + plain
    noisy = [b": ping\n\n", ROLE, b"\n\n\n", before, b": x\n", plain, after, STOP]
    done = Run(chat_request(model="up"), *noisy)
    assert done.data == ROLE + plain + plain + plain + STOP
    assert done.events == 5
    assert Run(chat_request(model="up"), b": ping\n\n").out == []


def test_an_event_that_is_null_says_nothing() -> None:
    """llama.cpp sends one when it is asked for several prompts."""
    plain = chunk({"content": "a"})
    done = Run(chat_request(model="up"), ROLE, b"data: null\n\n", plain + b"data: null\n\n", STOP)
    assert done.data == ROLE + plain + STOP
    assert done.events == 3


def test_several_data_lines_are_one_event() -> None:
    head, tail = ROLE[:-2].split(b',"choices"')
    done = run(head + b',\ndata:"choices"' + tail + b"\n\n", STOP)
    assert done.error is None
    assert done.chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_id_created_and_model_are_those_of_the_first_chunk() -> None:
    moved = ROLE.replace(b'"created":5', b'"created":6').replace(b"c1", b"c2")
    late = STOP.replace(b'"created":5', b'"created":9')
    done = run(ROLE, chunk({"content": "a"}), moved.replace(b'"role":"assistant",', b""), late)
    found = {(c["id"], c["created"], c["model"]) for c in done.chunks}
    assert found == {("c1", 5, "asked")}


def test_keys_may_stand_in_any_order() -> None:
    def ordered(text: str) -> bytes:
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
        return event({"id": "c1", "choices": [choice], "created": 5, "model": "up", "object": "x"})

    done = run(ROLE, ordered("a"), ordered("b"), ordered("b"), STOP)
    found = [c["choices"][0]["delta"].get("content") for c in done.chunks]
    assert found == ["", "a", "b", "b", None]
    assert {c["model"] for c in done.chunks} == {"asked"}


def test_what_the_server_leaves_out_is_filled_in() -> None:
    bare = event({"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]})
    empty = event({**HEAD, "id": "", "choices": [{"index": 0, "delta": {}, "finish_reason": ""}]})
    done = run(bare, bare, STOP.replace(b'"c1"', b'""'))
    request = chat_request()
    assert {c["id"] for c in done.chunks} == {request.id}
    assert {c["created"] for c in done.chunks} == {request.created}
    assert [c["choices"][0]["delta"].get("role") for c in done.chunks] == ["assistant", None, None]
    assert run(empty, STOP).chunks[0]["choices"][0]["finish_reason"] is None


def test_a_role_comes_once_in_each_choice() -> None:
    again = chunk({"role": "assistant", "content": "a"})
    null = chunk({"role": "assistant", "content": None}, index=1)
    done = run(again, null, again, STOP, chunk({}, "stop", 1), n=2)
    assert [c["choices"][0]["delta"] for c in done.chunks[:3]] == [
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": ""},
        {"content": "a"},
    ]


@pytest.mark.parametrize("null", [b'"role":null,', b'"role": null,'])
def test_a_role_of_null_is_none(null: bytes) -> None:
    """SGLang says so in each delta."""
    text = chunk({"role": None, "content": '{"role":null,"a":1}'}).replace(b'"role":null,', null, 1)
    first = chunk({"role": None, "content": "a"}).replace(b'"role":null,', null)
    done = run(first, text, STOP)
    assert [c["choices"][0]["delta"] for c in done.chunks[:2]] == [
        {"role": "assistant", "content": "a"},
        {"content": '{"role":null,"a":1}'},
    ]


@pytest.mark.parametrize(
    ("said", "heard"),
    [("stop", "stop"), ("length", "length"), ("repetition", "stop"), ("eos_token", "stop")],
)
def test_finish_reasons_are_openais(said: str, heard: str) -> None:
    done = run(ROLE, chunk({"content": "a"}, said), DONE)
    assert done.scanner.finish_reasons == (heard,)
    assert done.chunks[-1]["choices"][0] == {
        "index": 0,
        "delta": {"content": "a"},
        "finish_reason": heard,
    }


@pytest.mark.parametrize(("said", "kind"), [("abort", StreamTruncated), ("error", BackendFailed)])
def test_reasons_that_are_failures(said: str, kind: type[BackendError]) -> None:
    done = run(ROLE, chunk({"content": "a"}), chunk({"content": "b"}, said), DONE)
    assert isinstance(done.error, kind)
    assert done.events == 2


USAGE = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}


def test_usage_goes_to_those_who_ask_and_comes_last() -> None:
    usage = event({**HEAD, "choices": [], "usage": USAGE})
    for stream in ([ROLE, usage, STOP, DONE], [ROLE, STOP, usage, DONE]):
        asked = run(*stream, include_usage=True)
        assert asked.chunks[-1]["usage"] == USAGE
        assert asked.chunks[-1]["choices"] == []
        assert asked.events == 3
        silent = run(*stream)
        assert b"usage" not in silent.data
        assert silent.events == 2
        assert silent.scanner.usage == asked.scanner.usage == Usage(7, 2)


def test_usage_in_the_finish_chunk() -> None:
    last = chunk({}, "stop", usage={**USAGE, "prompt_tokens_details": {"cached_tokens": 3}}, x=1)
    assert run(ROLE, last).scanner.usage == Usage(7, 2, 3)
    assert b"usage" not in run(ROLE, last).data
    asked = run(ROLE, last, include_usage=True)
    assert asked.chunks[-1]["choices"] == []
    assert asked.chunks[-1]["usage"]["total_tokens"] == 9
    assert [c for c in asked.chunks if "usage" in c] == asked.chunks[-1:]


def test_usage_so_far_goes_to_those_who_ask_for_it_in_each_chunk() -> None:
    so_far = chunk({"content": "a"}, usage={**USAGE, "completion_tokens": 1})
    stream = [ROLE, so_far, STOP, event({**HEAD, "choices": [], "usage": USAGE}), DONE]
    once = run(*stream, include_usage=True)
    assert [c["usage"] for c in once.chunks if "usage" in c] == [USAGE]
    options = Raw(b'{"include_usage": true, "continuous_usage_stats": true}')
    asked = replace(chat_request(include_usage=True), fields={"stream_options": options})
    running = Run(asked, *stream)
    counts = [c["usage"]["completion_tokens"] for c in running.chunks if "usage" in c]
    assert counts == [1, 2]


def test_null_usage_in_every_chunk_stays_on_the_fast_way() -> None:
    text = chunk({"content": "a"}, usage=None)
    assert Run(chat_request(model="up"), ROLE, text, STOP).data == ROLE + text + STOP


def test_usage_by_choice_is_summed() -> None:
    usage = event({**HEAD, "choices": [], "usage": USAGE})
    stream = [ROLE, STOP, usage, chunk({"role": "assistant"}, "stop", 1), usage, DONE]
    request = chat_request(n=2, include_usage=True)
    done = Run(request, *stream, usage_by_choice=True)
    assert done.scanner.usage == Usage(7, 4)
    assert [c["usage"]["total_tokens"] for c in done.chunks if not c["choices"]] == [11]
    assert Run(request, *stream).scanner.usage == Usage(7, 2)


def test_missing_usage_is_counted() -> None:
    done = run(ROLE, chunk({"content": "a"}), chunk({"content": "b"}), STOP, include_usage=True)
    assert done.scanner.usage == Usage(0, 2, source="counted")
    assert done.events == 4


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ({"error": {"message": "m", "type": "t", "code": 500}}, BackendFailed),
        ({"error": {"message": "m"}}, BackendFailed),
        ({"error": {"message": "m", "code": 400}}, BackendRefused),
        ({"error": {"message": "m", "code": 503}}, BackendBusy),
        ({"error": "m", "error_type": "generation"}, BackendFailed),
        ({"object": "error", "message": "m", "code": 500}, BackendFailed),
        ({"message": "m", "code": 500}, BackendFailed),
        ({"detail": "m"}, BackendFailed),
        ({**HEAD, "choices": [], "error": {"message": "m"}}, BackendFailed),
    ],
)
def test_errors_inside_a_stream_are_raised(content: object, kind: type[BackendError]) -> None:
    for tail in (b"", DONE):
        done = run(ROLE + chunk({"content": "a"}) + event(content) + tail + STOP)
        assert isinstance(done.error, kind)
        assert done.error.message == "m"
        assert done.events == 2


@pytest.mark.parametrize(
    "bad",
    [
        b"data: {\n\n",
        b"data: ping\n\n",
        b"data: 7\n\n",
        b"data: {}\n\n",
        b'data: {"choices":7}\n\n',
        b'data: {"choices":[{"index":"a"}]}\n\n',
        b'data: {"choices":[{"delta":[]}]}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":"x"}}\n\n',
        b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n',
        b"data: {" + b" " * MAX_EVENT + b"}\n\n",
        chunk({"content": "x" * MAX_EVENT}),
    ],
)
def test_what_is_not_the_protocol_is_garbage(bad: bytes) -> None:
    done = run(ROLE, bad, STOP)
    assert isinstance(done.error, BackendGarbage)
    assert done.events == 1


def test_what_never_ends_is_garbage_before_it_fills_the_memory() -> None:
    scanner = Scanner(chat_request())
    for _ in range(1 + MAX_EVENT // 65536):
        scanner.feed(b"x" * 65536)
    assert isinstance(scanner.failure, BackendGarbage)


def test_a_stream_must_say_how_it_ended() -> None:
    assert isinstance(run().error, StreamTruncated)
    assert isinstance(run(ROLE, chunk({"content": "a"})).error, StreamTruncated)
    assert isinstance(run(ROLE, DONE).error, StreamTruncated)
    assert isinstance(run(ROLE, STOP[:-1]).error, StreamTruncated)
    assert isinstance(run(ROLE, STOP, n=2).error, StreamTruncated)
    assert run(ROLE, STOP, DONE, n=2).error is None, "the server says that it is all"
    assert run(ROLE, STOP).error is None


def test_nothing_after_done_counts() -> None:
    done = run(ROLE, STOP + DONE + event({"error": "x"}), b"garbage", b"x" * (MAX_EVENT + 1))
    assert done.error is None
    assert done.events == 2


words = st.text(max_size=8) | st.sampled_from(['usage"', "\n\n", "\r", "data: ", "😀", "error"])
events = st.one_of(
    words.map(lambda text: chunk({"content": text})),
    st.just(chunk({"content": "x"}).replace(b'"created":5', b'"created":6')),
    st.just(event({**HEAD, "choices": [], "usage": USAGE})),
    st.just(chunk({"content": "y"}).replace(b',"choices"', b',\ndata: "choices"')),
    st.sampled_from([b": ping\n\n", b"\n", b"event: x\n", b"id: 1\n\n", ROLE, STOP, DONE]),
    st.sampled_from([b"data: {\n\n", event({"error": "m"}), chunk({"content": "z"}, "abort")]),
)


@given(
    stream=st.lists(events, max_size=12).map(b"".join),
    cuts=st.lists(st.integers(0, 4000), max_size=12),
    newline=st.sampled_from([b"\n", b"\r\n", b"\r"]),
    model=st.sampled_from(["up", "asked"]),
    include_usage=st.booleans(),
)
def test_how_the_bytes_are_cut_makes_no_difference(
    stream: bytes, cuts: list[int], newline: bytes, model: str, include_usage: bool
) -> None:
    stream = (ROLE + stream).replace(b"\n", newline)
    request = chat_request(model=model, include_usage=include_usage)
    borders = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    pieces = [stream[a:b] for a, b in itertools.pairwise(borders) if a < b]
    assert Run(request, *pieces).state() == Run(request, stream).state()


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_a_cut_may_be_anywhere(newline: bytes) -> None:
    two_lines = chunk({"content": "😀"}).replace(b',"choices"', b',\ndata: "choices"')
    stream = ROLE + b": x\n\n" + two_lines + chunk({"content": "é"}) + STOP + DONE
    stream = stream.replace(b"\n", newline)
    whole = run(stream)
    assert whole.error is None
    for cut in range(1, len(stream)):
        assert run(stream[:cut], stream[cut:]).state() == whole.state()


@given(data=st.data(), usage=st.booleans(), n=st.integers(1, 3))
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize("kind", ["Vllm", "LlamaCpp"])
def test_real_servers_streams_byte_by_byte(
    kind: str, endpoint: Any, fakes: ModuleType, data: st.DataObject, usage: bool, n: int
) -> None:
    request = chat_request(endpoint=endpoint, model="asked", include_usage=usage, n=n)
    asked = {"model": "served", "n": n, "stream_options": {"include_usage": True}}
    said = getattr(fakes, kind)({**asked, **({"messages": []} if endpoint == "chat" else {})})
    stream = b"".join([*said.pieces(), *said.ending()])
    width = data.draw(st.sampled_from([1, 2, 3, 7, 64, 1000, len(stream)]))
    pieces = (stream[i : i + width] for i in range(0, len(stream), width))
    done = Run(request, *pieces, usage_by_choice=kind == "LlamaCpp")
    assert done.error is None
    end = End(done.scanner.usage, finish_reasons=done.scanner.finish_reasons)
    answer = read_answer(request, [*done.out, end])
    assert answer.texts == {index: "".join(fakes.WORDS) for index in range(n)}
    assert set(answer.finishes.values()) == {"length"}
    assert (answer.usage is not None) == usage
    assert done.scanner.usage.completion_tokens == 5 * n
