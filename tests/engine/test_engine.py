"""The engine's loop around a runner that plays back tokens."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from msgspec import structs

from forebay_engine.cache import CacheGroup
from forebay_engine.chat import ChatTemplate
from forebay_engine.config import EngineConfig
from forebay_engine.costs import StepCosts
from forebay_engine.engine import Engine
from forebay_engine.errors import RequestRefused, StartRefused
from forebay_engine.request import Request
from forebay_engine.sequence import FinishReason, SamplingParams
from forebay_engine.step import NO_TOKEN, Row, Sampled, StepPlan, StepResult
from forebay_engine.tokenizer import Tokenizer
from forebay_engine.wire import Accepted, Done, Event, Failed, Generate, Output

MODEL = Path(__file__).parents[1] / "fakes" / "engine_model"
EOS = 1
TOKENIZER = Tokenizer.from_folder(MODEL)


class Playback:
    """Every sequence gets the tokens of one text, then EOS for ever."""

    block_size = 4
    vocab_size = 261
    max_model_len = 512
    generates = True
    eos_token_ids = frozenset({EOS})
    step_costs = StepCosts((1,), (1.0,))
    draft_costs = None
    runs_ahead = False

    def __init__(self, text: str, num_blocks: int = 64) -> None:
        self.cache_groups = (CacheGroup(num_blocks),)
        self.tokens = TOKENIZER.encode(text, special=False)
        self.seeds: list[int] = []
        #: Cleared by a test that wants a step to last.
        self.go = threading.Event()
        self.go.set()

    def execute(self, plan: StepPlan) -> StepResult:
        assert self.go.wait(20)
        return StepResult(
            tuple(item for row in plan.rows if row.sample for item in self._drawn(row))
        )

    def _drawn(self, row: Row) -> Iterator[Sampled]:
        at = len(row.token_ids) - row.num_prompt
        if at == 0:
            self.seeds.append(row.sampling.seed)
        wanted = row.sampling.logprobs
        for guess in [*row.draft, None]:
            token = self.tokens[at] if at < len(self.tokens) else EOS
            top = ((token, -0.5), (EOS, -1.5))[: wanted or 0]
            yield Sampled(row.seq_id, token, None if wanted is None else -0.5, top)
            if guess != token:
                return
            at += 1


@asynccontextmanager
async def serving(
    runner: Playback,
    ended: Callable[[Request], None] = lambda request: None,
    speculation: str = "none",
) -> AsyncIterator[Engine]:
    config = EngineConfig(
        model=str(MODEL), max_step_tokens=16, max_sequences=8, speculation=speculation
    )
    engine = Engine(runner, TOKENIZER, ChatTemplate.from_folder(MODEL), config, ended)
    task = asyncio.create_task(engine.run())
    try:
        yield engine
        engine.scheduler.check()
        assert engine.scheduler.cache.in_use == 0
        assert not task.done(), task.exception()
    finally:
        runner.go.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def answer(engine: Engine, command: Generate) -> tuple[list[Output], Done]:
    events: list[Event] = []
    done = asyncio.Event()

    def emit(event: Event) -> None:
        events.append(event)
        if isinstance(event, Done):
            done.set()

    await engine.submit(command, emit)
    await done.wait()
    first, *outputs, last = events
    assert isinstance(first, Accepted)
    assert isinstance(last, Done)
    assert all(isinstance(output, Output) for output in outputs)
    return [output for output in outputs if isinstance(output, Output)], last


def command(prompt: str | list[int] = "Hi", n: int = 1, **sampling: Any) -> Generate:
    sampling = {"max_tokens": 50, **sampling}
    seed = sampling.pop("seed", None)
    return Generate(prompts=[prompt], n=n, seed=seed, sampling=SamplingParams(**sampling))


async def answer_to(text: str, **sampling: Any) -> tuple[str, FinishReason | None, Done]:
    async with serving(Playback(text)) as engine:
        outputs, done = await answer(engine, command(**sampling))
    assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
    token_ids = [token_id for output in outputs for token_id in output.token_ids]
    assert len(token_ids) == done.completion_tokens
    return "".join(output.text for output in outputs), outputs[-1].finish_reason, done


async def test_an_answer_ends_before_its_end_token() -> None:
    text, reason, done = await answer_to("Grüße 😀")
    assert (text, reason) == ("Grüße 😀", FinishReason.STOP)
    # <bos>, H, i; six letters with two bytes in two of them, a space, four bytes, <eos>.
    assert (done.prompt_tokens, done.completion_tokens) == (3, 13)
    assert min(done.queue, done.prefill, done.decode) >= 0


async def test_an_answer_ends_at_its_length_and_not_within_a_character() -> None:
    text, reason, done = await answer_to("ab😀", max_tokens=4)
    assert (text, reason, done.completion_tokens) == ("ab", FinishReason.LENGTH, 4)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"max_tokens": 21},
        {"min_tokens": 40},
        {"ignore_eos": True},
        {"stop": ("END",)},
        {"stop": ("bcEN",)},
        {"stop": ("abc",), "min_tokens": 9},
        {"stop": ("zzz",)},
        {"stop_token_ids": (TOKENIZER.encode("E", special=False)[0],)},
        {"logprobs": 1},
    ],
)
async def test_guesses_change_nothing_of_an_answer(sampling: dict[str, Any]) -> None:
    """Not where it ends either, in the middle of guesses that came true."""
    found = []
    for speculation in ("none", "ngram"):
        text = "abcabcabcabcENDabcabcENDabcabcabcENDabc"
        async with serving(Playback(text), speculation=speculation) as engine:
            outputs, done = await answer(engine, command("ab", **sampling))
            accepted = engine.scheduler.counters.accepted_tokens
        assert (accepted > 0) == (speculation == "ngram")
        found.append(
            (
                "".join(output.text for output in outputs),
                [token_id for output in outputs for token_id in output.token_ids],
                [item for output in outputs for item in output.logprobs],
                outputs[-1].finish_reason,
                done.completion_tokens,
            )
        )
    assert found[0] == found[1]
    # Usage counts what was said, and nothing that was drawn behind it.
    assert len(found[1][1]) == found[1][4]


async def test_text_that_was_held_back_comes_with_the_end() -> None:
    text, reason, _ = await answer_to("one EN", stop=("END",))
    assert (text, reason) == ("one EN", FinishReason.STOP)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(("END",), "one "), (("e", "END"), "on"), (("zzz",), "one END two")],
)
async def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(
    stop: tuple[str, ...], expected: str
) -> None:
    text, reason, done = await answer_to("one END two", stop=stop)
    assert (text, reason) == (expected, FinishReason.STOP)
    if expected == "one ":
        # Nothing is generated beyond the stop string.
        assert done.completion_tokens == len("one END")


async def test_min_tokens_counts_before_stops() -> None:
    text, _, done = await answer_to("abab", stop=("b",), min_tokens=3)
    assert (text, done.completion_tokens) == ("aba", 4)
    text, _, done = await answer_to("abc", min_tokens=6)
    assert (text, done.completion_tokens) == ("abc", 6)


async def test_ignore_eos_goes_on_to_the_length() -> None:
    text, reason, done = await answer_to("abc", ignore_eos=True, max_tokens=9)
    assert (text, reason, done.completion_tokens) == ("abc", FinishReason.LENGTH, 9)


async def test_logprobs_name_their_tokens_and_lack_the_end_token() -> None:
    async with serving(Playback("aé")) as engine:
        outputs, _ = await answer(engine, command(logprobs=2))
        plain, _ = await answer(engine, command())
    found = [item for output in outputs for item in output.logprobs]
    assert [item.token for item in found] == ["a", "\ufffd", "\ufffd"]
    assert found[0].logprob == -0.5
    assert found[0].top == [("a", -0.5), ("<eos>", -1.5)]
    assert not any(output.logprobs for output in plain)


async def test_what_ended_the_answer_may_be_part_of_its_text() -> None:
    text, _, _ = await answer_to("one END two", stop=("END",), include_stop=True)
    assert text == "one END"
    (token,) = TOKENIZER.encode("t", special=False)
    for include, spoken in ((True, "one END t"), (False, "one END ")):
        text, reason, _ = await answer_to(
            "one END two", stop_token_ids=(token,), include_stop=include
        )
        assert (text, reason) == (spoken, FinishReason.STOP)
    text, _, _ = await answer_to("ab", include_stop=True)
    assert text == "ab"
    text, _, _ = await answer_to("ab", include_stop=True, skip_special_tokens=False)
    assert text == "ab<eos>"


async def test_bad_words_are_kept_out_with_and_without_a_space_before() -> None:
    runner = Playback("ok")
    spelt = [tuple(TOKENIZER.encode(text, special=False)) for text in ("bad", " bad")]
    async with serving(runner) as engine:
        asked = Generate(
            prompts=["a"], bad_words=[" bad", [7, 8], "bad"], sampling=SamplingParams()
        )
        outputs: list[Event] = []
        request = await engine.submit(asked, outputs.append)
        (choice,) = request.choices
        assert set(choice.sequence.sampling.bad_words) == {*spelt, (7, 8)}
        engine.abort(request)


async def test_an_answer_that_may_not_go_on_fails_its_request_alone() -> None:
    class Stuck(Playback):
        def execute(self, plan: StepPlan) -> StepResult:
            drawn = super().execute(plan).sampled
            stuck = {row.seq_id for row in plan.rows if row.sampling.min_p == 0.5}
            long = {row.seq_id for row in plan.rows if len(row.token_ids) > row.num_prompt + 2}
            return StepResult(
                tuple(
                    structs.replace(s, token_id=NO_TOKEN) if s.seq_id in stuck & long else s
                    for s in drawn
                )
            )

    async with serving(Stuck("a longer text")) as engine:
        events: list[Event] = []
        await engine.submit(command(n=3, min_p=0.5), events.append)
        outputs, _ = await answer(engine, command())
        assert "".join(output.text for output in outputs) == "a longer text"
        failed = events[-1]
        assert isinstance(failed, Failed)
        assert "no token may come next" in failed.message
        assert all(isinstance(event, Accepted | Output) for event in events[:-1])
        assert engine.scheduler.counters.failed >= 1


async def test_choices_share_the_prompt_but_not_the_seed() -> None:
    runner = Playback("ok")
    async with serving(runner) as engine:
        two = Generate(prompts=["one", "three"], n=2, seed=7, sampling=SamplingParams())
        outputs, done = await answer(engine, two)
        texts = dict.fromkeys(range(4), "")
        for output in outputs:
            texts[output.index] += output.text
        assert texts == dict.fromkeys(range(4), "ok")
        assert (done.prompt_tokens, done.completion_tokens) == (10, 12)
        first, runner.seeds = runner.seeds, []
        assert len(set(first)) == 4
        await answer(engine, two)
        assert sorted(runner.seeds) == sorted(first)
        runner.seeds = []
        await answer(engine, command(n=2))
        await answer(engine, command(n=2))
        assert len(set(runner.seeds)) == 4


async def test_usage_tells_what_came_from_the_cache() -> None:
    async with serving(Playback("ok")) as engine:
        prompt = "a prompt of some length"
        (_, first), (_, second) = [await answer(engine, command(prompt)) for _ in range(2)]
        assert first.cached_tokens == 0
        # All whole blocks but not the last token: 24 tokens are 6 blocks of 4.
        assert (second.prompt_tokens, second.cached_tokens) == (24, 20)
        salted = Generate(prompts=[prompt], salt="another tenant")
        _, other = await answer(engine, salted)
        assert other.cached_tokens == 0


async def test_chat_is_templated_and_may_fill_the_context() -> None:
    runner = Playback("Hello", num_blocks=16)
    async with serving(runner) as engine:
        messages = [{"role": "user", "content": "Hi"}]
        chat = Generate(messages=messages, fill_context=True)
        _, done = await answer(engine, chat)
        assert done.prompt_tokens == len(
            TOKENIZER.encode(
                "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>assistant\n",
                special=False,
            )
        )
        assert engine.max_model_len == 64
        endless = SamplingParams(ignore_eos=True)
        _, done = await answer(
            engine, Generate(messages=messages, fill_context=True, sampling=endless)
        )
        assert done.prompt_tokens + done.completion_tokens == 64


@pytest.mark.parametrize(
    ("wrong", "param", "sentence"),
    [
        (Generate(prompts=[]), "prompt", "no prompt"),
        (Generate(prompts=[[]]), "prompt", "empty"),
        (Generate(prompts=[[261]]), "prompt", "token id 261 .* vocabulary of 261"),
        (Generate(prompts=[[-1]]), "prompt", "token id -1"),
        (Generate(prompts=["a"], n=0), "n", "at least 1"),
        (Generate(messages=[]), "messages", "no messages"),
        (Generate(messages=[{"role": "judge", "content": ""}]), "messages", "unknown role judge"),
        (Generate(messages=[{"role": "user", "content": "x" * 300}]), "messages", "holds 256"),
        (command("x" * 300), "prompt", "holds 256 tokens"),
        (command(max_tokens=256), "max_tokens", "3 of prompt and 256"),
        (command(temperature=-1.0), "temperature", "within 0 and inf"),
        (command(temperature=float("nan")), "temperature", "nan"),
        (command(top_p=0.0), "top_p", "greater"),
        (command(top_k=-3), "top_k", "within"),
        (command(frequency_penalty=3.0), "frequency_penalty", "-2 and 2"),
        (command(repetition_penalty=0.0), "repetition_penalty", "greater"),
        (command(logprobs=21), "logprobs", "0 and 20"),
        (command(stop=("",)), "stop", "empty stop"),
        (command(typical_p=0.0), "typical_p", "greater"),
        (command(logit_bias={5: 101.0}), "logit_bias", "token 5 is 101; .* -100 and 100"),
        (command(logit_bias={5: float("nan")}), "logit_bias", "nan"),
        (command(logit_bias={261: 1.0}), "logit_bias", "token id 261"),
        (command(allowed_token_ids=(-1,)), "allowed_token_ids", "token id -1"),
        (command(stop_token_ids=(300,)), "stop_token_ids", "token id 300"),
        (Generate(prompts=["a"], bad_words=[""]), "bad_words", "empty bad word"),
        (Generate(prompts=["a"], bad_words=[[5, 900]]), "bad_words", "token id 900"),
        (
            Generate(
                prompts=["a"],
                bad_words=[[5], [6]],
                sampling=SamplingParams(allowed_token_ids=(6, 5)),
            ),
            "bad_words",
            "no token is left",
        ),
    ],
)
async def test_what_cannot_be_served_is_refused_by_name(
    wrong: Generate, param: str, sentence: str
) -> None:
    async with serving(Playback("ok")) as engine:
        with pytest.raises(RequestRefused, match=sentence) as refusal:
            await engine.submit(wrong, lambda event: pytest.fail(f"sent {event}"))
        assert refusal.value.param == param


async def test_a_prompt_that_is_refused_takes_those_beside_it_along() -> None:
    async with serving(Playback("ok")) as engine:
        with pytest.raises(RequestRefused):
            await engine.submit(Generate(prompts=["good", "x" * 300]), lambda event: None)
        assert engine.scheduler.counters.admitted == engine.scheduler.waiting == 0


async def test_an_abort_stops_all_choices_and_events_at_once() -> None:
    ended: list[Request] = []
    runner = Playback("a long answer that nobody waits for")
    async with serving(runner, ended.append) as engine:
        events: list[Event] = []
        runner.go.clear()
        request = await engine.submit(command(n=3), events.append)
        while engine.scheduler.running == 0:
            await asyncio.sleep(0.001)
        # The step is running now: its blocks stay until it ends.
        engine.abort(request)
        engine.abort(request)
        assert engine.scheduler.cache.in_use > 0
        runner.go.set()
        while engine.scheduler.cache.in_use:
            await asyncio.sleep(0.001)
        assert [type(event) for event in events] == [Accepted]
        assert ended == [request]
        assert engine.scheduler.counters.aborted == 3
        _, done = await answer(engine, command())
        assert done.completion_tokens == 36


async def test_an_abort_in_the_middle_leaves_the_others_alone() -> None:
    async with serving(Playback("some text")) as engine:
        events: list[Event] = []
        kept = asyncio.create_task(answer(engine, command(n=2)))
        request = await engine.submit(command(), events.append)
        while len(events) < 3:
            await asyncio.sleep(0)
        engine.abort(request)
        seen = len(events)
        outputs, _ = await kept
        assert len(events) == seen
        assert "".join(output.text for output in outputs if output.index == 0) == "some text"


def test_a_context_beyond_the_cache_stops_the_start() -> None:
    config = EngineConfig(model=str(MODEL), max_model_len=300)
    with pytest.raises(StartRefused, match=r"max_model_len is 300, .* 256 tokens \(64 blocks of 4"):
        Engine(Playback(""), TOKENIZER, None, config)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"speculation": "ngram", "speculation_tokens": 0}, "0; it must be at least 1"),
    ],
)
def test_guesses_from_nowhere_stop_the_start(settings: dict[str, Any], sentence: str) -> None:
    config = EngineConfig(model=str(MODEL), **settings)
    with pytest.raises(StartRefused, match=sentence):
        Engine(Playback(""), TOKENIZER, None, config)


async def test_a_model_without_template_serves_completions_only() -> None:
    engine = Engine(Playback(""), TOKENIZER, None, EngineConfig(model=str(MODEL)))
    with pytest.raises(RequestRefused, match="no chat template") as refusal:
        await engine.submit(Generate(messages=[{"role": "user"}]), lambda event: None)
    assert refusal.value.param == "messages"


def test_a_model_without_tokenizer_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartRefused, match=r"tokenizer\.json is missing"):
        Tokenizer.from_folder(tmp_path)


async def test_a_storm_of_requests_and_aborts_leaves_nothing_behind() -> None:
    """Ends and aborts at every point, in a cache that holds two or three answers at once."""
    chance = Random(5)
    ended: list[Request] = []

    async def visit(engine: Engine, number: int) -> bool:
        await asyncio.sleep(chance.random() / 10)
        prompt = "a shared prefix " * chance.randrange(3) + str(number)
        done = asyncio.Event()
        request = await engine.submit(
            command(prompt, n=chance.randint(1, 3)),
            lambda event: done.set() if isinstance(event, Done) else None,
        )
        stays = chance.random() < 0.5
        waiting = asyncio.create_task(done.wait())
        await asyncio.wait([waiting], timeout=None if stays else chance.random() / 5)
        engine.abort(request)
        waiting.cancel()
        return done.is_set()

    async with serving(Playback("an answer of a few words", num_blocks=40), ended.append) as engine:
        stayed = await asyncio.gather(*(visit(engine, number) for number in range(300)))
        counters = engine.scheduler.counters
        assert len(ended) == 300
        assert 100 < sum(stayed) < 300
        assert counters.preempted > 0
        assert counters.finished + counters.aborted == sum(len(r.choices) for r in ended)
        while engine.scheduler.cache.in_use:
            await asyncio.sleep(0.001)
        assert engine.scheduler.running == engine.scheduler.waiting == 0
