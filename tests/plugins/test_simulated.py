"""The simulated backend keeps to its service model."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from msgspec.structs import replace

from forebay.api import (
    Attempt,
    BackendBusy,
    BackendError,
    BackendFailed,
    BackendRefused,
    ConnectFailed,
    Delta,
    DetokenizeRequest,
    Embeddings,
    EmbedRequest,
    Event,
    Finished,
    InferRequest,
    Load,
    Message,
    Ranked,
    Ranking,
    RerankRequest,
    ScoreRequest,
    Scores,
    StreamTruncated,
    Text,
    TokenizeRequest,
    Tokens,
    Unsupported,
    Usage,
)
from forebay.testing import adapter_context, chat_request
from forebay.testing.adapter import collect, until
from forebay.testing.answer import read_answer
from forebay_plugins.simulated import Failures, SimulatedAdapter, SimulatedSettings


def simulated(**settings: Any) -> SimulatedAdapter:
    """A backend that takes no time unless it is told to."""
    options = {"prefill_rate": 0, "decode_rate": 0, "answer_tokens": 5, **settings}
    made = SimulatedSettings(adapter="simulated", **options)
    return SimulatedAdapter(made, adapter_context())


async def finished(adapter: SimulatedAdapter, text: str = "a b c", **options: Any) -> Finished:
    request = chat_request(text, **options)
    return read_answer(request, await collect(adapter, request)).finished


async def text(adapter: SimulatedAdapter, prompt: str, **options: Any) -> str:
    request = chat_request(prompt, **options)
    return read_answer(request, await collect(adapter, request)).texts[0]


async def test_the_text_depends_on_the_prompt_alone() -> None:
    first, second = simulated(), simulated(seed=9)
    assert await text(first, "a b") == await text(second, "a b") != await text(first, "a c")
    assert len((await text(first, "a b")).split()) == 5
    assert (await text(first, "a b")).startswith(await text(first, "a b", max_tokens=2))


async def test_why_it_ends() -> None:
    for limit, reason, tokens in ((2, "length", 2), (5, "stop", 5), (None, "stop", 5)):
        request = chat_request("a b c", max_tokens=limit, n=2)
        answer = read_answer(request, await collect(simulated(), request))
        assert set(answer.finishes.values()) == {reason}
        assert answer.finished.usage == Usage(3, 2 * tokens)


async def test_stop_strings_end_it() -> None:
    adapter = simulated(answer_tokens=12)
    whole = await text(adapter, "a")
    for stop in (whole.split()[4], whole[7:10], whole[0]):
        request = chat_request("a")
        request = replace(request, sampling=replace(request.sampling, stop=("never", stop)))
        answer = read_answer(request, await collect(adapter, request))
        assert answer.texts[0] == whole[: whole.index(stop)]
        assert answer.finishes[0] == "stop"


async def test_time_passes_at_the_given_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await real(0)

    monkeypatch.setattr("forebay_plugins.simulated.asyncio.sleep", sleep)
    await finished(simulated(prefill_rate=2, decode_rate=4, overhead=1), "a b c")
    assert slept == [2.5, *[0.25] * 5]


async def test_timings_are_reported() -> None:
    timings = (await finished(simulated(prefill_rate=100, decode_rate=100), "a b")).timings
    assert timings is not None
    assert timings.prefill is not None
    assert timings.decode is not None
    assert timings.prefill >= 0.02
    assert timings.decode >= 0.05
    assert timings.source == "simulated"


async def test_requests_wait_for_a_slot_in_order() -> None:
    adapter = simulated(slots=1, answer_tokens=1)
    order: list[int] = []

    async def ask(number: int) -> None:
        await finished(adapter)
        order.append(number)

    await asyncio.gather(*(ask(number) for number in range(6)))
    assert order == list(range(6))


async def test_load_and_a_full_queue() -> None:
    adapter = simulated(slots=2, queue=1, failures=Failures(stall=1, after=1))
    assert (await adapter.probe()).slots == 2
    tasks = [asyncio.ensure_future(collect(adapter, chat_request())) for _ in range(3)]
    await until(lambda: (adapter.running, adapter.waiting) == (2, 1), 5)
    assert await adapter.load() == Load(running=2, waiting=1, kv_usage=1.0)
    with pytest.raises(BackendBusy) as raised:
        await finished(adapter)
    assert raised.value.retry_after == 1.0
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert await adapter.load() == Load(running=0, waiting=0, kv_usage=0.0)


async def test_prefixes_are_cached_by_block() -> None:
    def words(count: int, first: int = 0) -> str:
        return " ".join(f"w{number}" for number in range(first, first + count))

    async def cached(adapter: SimulatedAdapter, prompt: str) -> int | None:
        usage = (await finished(adapter, prompt)).usage
        assert usage is not None
        return usage.cached_tokens

    adapter = simulated(cache_tokens=64)
    assert await cached(adapter, words(40)) == 0
    assert await cached(adapter, words(40)) == 32
    assert await cached(adapter, words(20)) == 16
    assert await cached(adapter, words(40, first=1)) == 0
    assert await cached(adapter, words(64, first=100)) == 0
    assert await cached(adapter, words(40)) == 0, "four blocks fit, these were pushed out"
    assert await cached(simulated(), words(40)) is None


@pytest.mark.parametrize(
    ("failures", "kind", "tokens"),
    [
        (Failures(connect=1), ConnectFailed, 0),
        (Failures(busy=1), BackendBusy, 0),
        (Failures(error=1), BackendFailed, 0),
        (Failures(cut=1, after=2), StreamTruncated, 2),
    ],
)
async def test_failures(failures: Failures, kind: type[BackendError], tokens: int) -> None:
    events: list[Event] = []
    with pytest.raises(kind):
        await collect(simulated(failures=failures), chat_request(), events)
    assert sum(isinstance(event, Delta) for event in events) == tokens


async def test_failures_are_drawn_from_the_seed() -> None:
    async def outcomes(seed: int) -> list[bool]:
        adapter = simulated(failures=Failures(error=0.3, cut=0.2, after=1), seed=seed)
        answers = [collect(adapter, chat_request()) for _ in range(60)]
        results = await asyncio.gather(*answers, return_exceptions=True)
        return [isinstance(result, BackendError) for result in results]

    assert await outcomes(1) == await outcomes(1) != await outcomes(2)
    assert 15 < sum(await outcomes(1)) < 45


async def test_failures_can_be_set_while_it_runs() -> None:
    adapter = simulated()
    adapter.failures = Failures(probe=True)
    with pytest.raises(ConnectFailed):
        await adapter.probe()
    adapter.failures = Failures()
    assert (await adapter.probe()).slots == 4


def operation(kind: type[Any], **what: Any) -> Any:
    return kind(id="r", model="m", created=1, **what)


async def test_equal_inputs_have_equal_unit_vectors() -> None:
    request = operation(EmbedRequest, inputs=("a b", "a b", "c", (1, 2)), dimensions=5)
    found = await simulated().perform(request, Attempt())
    assert isinstance(found, Embeddings)
    first, again, other, ids = found.vectors
    assert first == again
    assert len({first, other, ids}) == 3
    assert [len(vector) for vector in found.vectors] == [5] * 4
    assert all(math.hypot(*vector) == pytest.approx(1) for vector in found.vectors)
    assert found.usage == Usage(7, 0)
    default = await simulated().perform(operation(EmbedRequest, inputs=("a",)), Attempt())
    assert isinstance(default, Embeddings)
    assert len(default.vectors[0]) == 64
    long = operation(EmbedRequest, inputs=("a",), dimensions=1 << 40)
    with pytest.raises(BackendRefused, match="8192") as refusal:
        await simulated().perform(long, Attempt())
    assert refusal.value.param == "dimensions"


async def test_texts_are_alike_as_far_as_they_share_words() -> None:
    documents = ("a stone", "Water turns", "water turns the wheel", "")
    request = operation(RerankRequest, query="water turns", documents=documents, top_n=3)
    ranking = await simulated().perform(request, Attempt())
    assert ranking == Ranking((Ranked(1, 1.0), Ranked(2, 0.5), Ranked(0, 0.0)), Usage(16, 0))
    pairs = (("a b", "b c"), ("", ""))
    scores = await simulated().perform(operation(ScoreRequest, pairs=pairs), Attempt())
    assert scores == Scores((1 / 3, 1.0), Usage(4, 0))


async def test_tokens_of_one_can_be_turned_back_by_another() -> None:
    request = operation(TokenizeRequest, text="Grüße", with_texts=True)
    tokens = await simulated().perform(request, Attempt())
    assert isinstance(tokens, Tokens)
    assert tokens.texts is not None
    assert tokens.texts[:4] == ("G", "r", "<0xC3>", "<0xBC>")
    back = await simulated().perform(operation(DetokenizeRequest, tokens=tokens.ids), Attempt())
    assert back == Text("Grüße")
    chat = operation(TokenizeRequest, chat=(Message(role="user", content="Hi"),))
    tokens = await simulated().perform(chat, Attempt())
    assert isinstance(tokens, Tokens)
    assert (bytes(tokens.ids), tokens.texts) == (b"user: Hi\nassistant:", None)
    with pytest.raises(BackendRefused, match="0 to 255") as refusal:
        await simulated().perform(operation(DetokenizeRequest, tokens=(1, 256)), Attempt())
    assert refusal.value.param == "tokens"


async def test_operations_take_slots_and_fail_like_answers() -> None:
    request = operation(EmbedRequest, inputs=("a",))
    adapter = simulated(slots=1, queue=1, failures=Failures(silent=1))
    tasks = [asyncio.ensure_future(adapter.perform(request, Attempt())) for _ in range(2)]
    await until(lambda: (adapter.running, adapter.waiting) == (1, 1), 5)
    with pytest.raises(BackendBusy):
        await adapter.perform(request, Attempt())
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (adapter.running, adapter.waiting) == (0, 0)
    for failures, kind in (
        (Failures(connect=1), ConnectFailed),
        (Failures(error=1), BackendFailed),
        (Failures(cut=1), StreamTruncated),
    ):
        with pytest.raises(kind):
            await simulated(failures=failures).perform(request, Attempt())


async def test_what_is_not_simulated_is_not_offered() -> None:
    capabilities = await simulated().probe()
    assert capabilities.endpoints == {
        "chat", "completions", "embeddings", "rerank", "score", "tokenize", "detokenize",
    }  # fmt: skip
    with pytest.raises(Unsupported):
        await simulated().perform(operation(InferRequest, body=b"{}"), Attempt())
