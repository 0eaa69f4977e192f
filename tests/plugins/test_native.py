"""The native adapter: its contract over a real engine process, and what it makes of a request."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from forebay.api import (
    AdapterContext,
    Attempt,
    BackendBusy,
    BackendError,
    BackendLacks,
    BackendRefused,
    BackendTimeout,
    ConfigError,
    ConnectFailed,
    ContentPart,
    Delta,
    DetokenizeRequest,
    Embeddings,
    EmbedRequest,
    Event,
    Finished,
    GenerateRequest,
    Identity,
    Message,
    Sampling,
    Started,
    StreamTruncated,
    Text,
    Timeouts,
    TokenizeRequest,
    Tokens,
    Upstream,
)
from forebay.testing import AdapterContract, Bench, Scenario, chat_request
from forebay_engine.client import SamplingParams, Watermark
from forebay_plugins.native import NativeAdapter, NativeSettings, adapters
from forebay_plugins.native_request import generate_command

FAKES = Path(__file__).parents[1] / "fakes"
COMMAND = (sys.executable, str(FAKES / "engine_process.py"))


def no_http(url: str) -> Upstream:
    raise AssertionError(f"the native adapter opened {url}")


def context(data_dir: Path, environment: Mapping[str, str]) -> AdapterContext:
    return AdapterContext(
        name="native", connect=no_http, data_dir=data_dir, environment=environment
    )


class Patient(NativeAdapter):
    """Waits for the engine before each request, as the gateway's probes do."""

    async def stream(self, request: GenerateRequest, attempt: Attempt) -> AsyncGenerator[Event]:
        await ready(self)
        events = super().stream(request, attempt)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()


async def ready(adapter: NativeAdapter) -> None:
    while True:
        try:
            await adapter.probe()
        except BackendError:
            await asyncio.sleep(0.01)
        else:
            return


async def died(adapter: NativeAdapter) -> None:
    """Until the engine is neither there nor on its way."""
    while True:
        try:
            await adapter.probe()
        except ConnectFailed:
            return
        except BackendBusy:
            await asyncio.sleep(0.01)


@asynccontextmanager
async def native(
    mode: str = "", kind: type[NativeAdapter] = NativeAdapter, **settings: Any
) -> AsyncIterator[NativeAdapter]:
    """An adapter on the fake engine, up where it ever will be."""
    settings = {"path": str(FAKES / "engine_model"), "block_size": 4, **settings}
    adapter = kind(
        NativeSettings(adapter="native", **settings),
        context(FAKES, {"FAKE_ENGINE": mode}),
        COMMAND,
    )
    await adapter.start()
    try:
        if mode != "loading":
            await ready(adapter)
        yield adapter
    finally:
        await adapter.aclose()


class TestNative(AdapterContract):
    # Its engine either answers by our own protocol or dies.
    impossible = frozenset(
        {Scenario.BROKEN, Scenario.GARBAGE, Scenario.FAILING, Scenario.UNFINISHED}
    )
    # It is another process that has to be given a turn by the machine, and then to say so.
    cancel_within = 2.0

    def bench(self, scenario: Scenario) -> AbstractAsyncContextManager[Bench]:
        return self._bench(scenario)

    @asynccontextmanager
    async def _bench(self, scenario: Scenario) -> AsyncIterator[Bench]:
        if scenario is Scenario.DEAD:
            async with self._dead() as adapter:
                yield Bench(adapter, lambda: 0)
            return
        mode = {
            Scenario.ENDLESS: "slow",
            Scenario.SILENT: "slow",
            Scenario.BUSY: "loading",
            Scenario.CUT: "dies",
        }.get(scenario, "")
        settings: dict[str, int] = {}
        if scenario is Scenario.SILENT:
            # A token a step: the first comes after half a second.
            settings = {"max_step_tokens": 1}
        if scenario is Scenario.REFUSING:
            settings = {"max_model_len": 8}
        kind = Patient if scenario is Scenario.CUT else NativeAdapter
        async with native(mode, kind, **settings) as adapter:
            busy = [0]
            watching = asyncio.create_task(self._watch(adapter, busy))
            try:
                yield Bench(adapter, lambda: busy[0])
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)

    @staticmethod
    async def _watch(adapter: NativeAdapter, busy: list[int]) -> None:
        while True:
            try:
                load = await adapter.load()
            except BackendError:
                busy[0] = 0
            else:
                busy[0] = (load.running or 0) + (load.waiting or 0) if load else 0
            await asyncio.sleep(0.002)

    @asynccontextmanager
    async def _dead(self) -> AsyncIterator[NativeAdapter]:
        command = (sys.executable, "-c", "raise SystemExit(1)")
        settings = NativeSettings(adapter="native", path=str(FAKES / "engine_model"))
        adapter = NativeAdapter(settings, context(FAKES, {}), command)
        await adapter.start()
        try:
            await died(adapter)
            yield adapter
        finally:
            await adapter.aclose()


async def collect(adapter: NativeAdapter, request: GenerateRequest) -> list[Event]:
    return [event async for event in adapter.stream(request, Attempt())]


def text(events: list[Event], index: int = 0) -> str:
    return "".join(e.text for e in events if isinstance(e, Delta) and e.index == index)


def completion(*prompts: str | tuple[int, ...], n: int = 1, **sampling: Any) -> GenerateRequest:
    return GenerateRequest(
        id="forebay-1",
        endpoint="completions",
        model="m",
        created=1,
        prompts=prompts,
        n=n,
        sampling=Sampling(**sampling),
    )


def chat(*messages: Message, **sampling: Any) -> GenerateRequest:
    return GenerateRequest(
        id="forebay-1",
        endpoint="chat",
        model="m",
        created=1,
        messages=messages,
        sampling=Sampling(**sampling),
    )


async def test_a_request_is_translated_and_so_is_the_answer() -> None:
    async with native() as adapter:
        events = await collect(adapter, completion("Hello", (72, 73, 1), n=2, logprobs=1))
        assert isinstance(events[0], Started)
        # The third token of the second prompt is the end token.
        assert [text(events, i) for i in range(4)] == ["HelloHelloHel"] * 2 + ["de"] * 2
        reasons = {
            e.index: e.finish_reason for e in events if isinstance(e, Delta) and e.finish_reason
        }
        assert reasons == {0: "length", 1: "length", 2: "stop", 3: "stop"}
        logprob = next(e.logprobs[0] for e in events if isinstance(e, Delta) and e.index == 2)
        assert (logprob.token, logprob.logprob, logprob.top) == ("d", -0.25, (("d", -0.25),))
        finished = events[-1]
        assert isinstance(finished, Finished)
        assert finished.usage is not None
        # OpenAI's default of 16 tokens, <bos> among those echoed.
        assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (9, 38)
        assert finished.usage.cached_tokens == 0
        assert finished.timings is not None
        assert finished.timings.source == "forebay_engine"
        assert (finished.timings.decode or -1) >= 0


async def test_messages_go_through_the_template_and_may_fill_the_context() -> None:
    async with native() as adapter:
        parts = (ContentPart("text", "a"), ContentPart("text", "b"))
        events = await collect(adapter, chat(Message(role="user", content=parts), ignore_eos=True))
        assert text(events).startswith("user\nab\nassistant\nuser\nab\n")
        finished = events[-1]
        assert isinstance(finished, Finished)
        assert finished.usage is not None
        assert finished.usage.prompt_tokens + finished.usage.completion_tokens == 256


async def test_stops_penalties_and_the_rest_reach_the_engine() -> None:
    async with native() as adapter:
        events = await collect(
            adapter,
            completion("abcdef", stop=("de",), top_k=-1, temperature=0.0, presence_penalty=1.0),
        )
        assert text(events) == "abc"
        for field, value in (("temperature", -1.0), ("top_p", 2.0), ("frequency_penalty", 9.0)):
            wrong = msgspec.structs.replace(
                completion("a"), sampling=msgspec.convert({field: value}, Sampling)
            )
            with pytest.raises(BackendRefused) as refusal:
                await collect(adapter, wrong)
            assert (refusal.value.param, refusal.value.status) == (field, 400)


def with_fields(request: GenerateRequest, **fields: Any) -> GenerateRequest:
    """The request with further fields, as the gateway decodes them."""
    raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields.items()}
    return msgspec.structs.replace(request, fields=raw, extra=tuple(sorted(raw)))


async def test_the_engines_own_fields_are_understood() -> None:
    async with native() as adapter:
        stop = with_fields(completion((72, 73, 74)), stop_token_ids=[74])
        events = await collect(adapter, stop)
        assert text(events) == "de"
        fields = {"stop_token_ids": [74], "include_stop_str_in_output": True}
        assert (
            text(await collect(adapter, with_fields(completion((72, 73, 74)), **fields))) == "def"
        )


async def test_echo_repeats_texts_as_they_came_and_tokens_as_texts() -> None:
    ids = (2, 44, 77)
    async with native() as adapter:
        for prompts, texts in ((("Hi", "é"), ("Hi", "é")), ((ids,), ("<bos>Hi",))):
            request = msgspec.structs.replace(
                completion("", max_tokens=2), prompts=prompts, echo=True, n=2
            )
            events = await collect(adapter, request)
            for index in range(2 * len(prompts)):
                said = "".join(e.text for e in events if isinstance(e, Delta) and e.index == index)
                assert said.startswith(texts[index // 2])


async def test_a_prompt_is_scored_without_an_answer() -> None:
    """The fake engine gives the token at place k of a prompt a log probability of -k."""
    async with native() as adapter:
        request = msgspec.structs.replace(
            completion("é", max_tokens=0),
            echo=True,
            n=2,
            sampling=Sampling(max_tokens=0, logprobs=0),
        )
        *_, first, second, finished = await collect(adapter, request)
    for index, delta in enumerate((first, second)):
        assert isinstance(delta, Delta)
        assert (delta.index, delta.text, delta.finish_reason) == (index, "é", "length")
        told = [(one.logprob, one.offset, one.top) for one in delta.logprobs]
        assert told == [(None, 0, ()), (-1.0, 0, ()), (-2.0, 1, ())]
        assert delta.logprobs[0].token == "<bos>"
        assert not delta.token_ids
    assert isinstance(finished, Finished)
    assert finished.usage is not None
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (3, 0)


def test_prompt_logprobs_are_for_streams_as_well() -> None:
    request = with_fields(completion("a"), prompt_logprobs=3)
    for stream in (False, True):
        asked = msgspec.structs.replace(request, stream=stream)
        assert generate_command(asked, Attempt()).sampling.prompt_logprobs == 3


def test_each_further_field_has_its_place_in_the_command() -> None:
    request = with_fields(
        completion("a"),
        logit_bias={"7": 1.5},
        bad_words=["no", [5, 6]],
        allowed_token_ids=[1, 2],
        typical_p=0.5,
        skip_special_tokens=False,
        return_token_ids=True,
    )
    command = generate_command(request, Attempt())
    assert command.bad_words == ["no", [5, 6]]
    assert command.sampling == SamplingParams(
        logit_bias={7: 1.5}, allowed_token_ids=(1, 2), typical_p=0.5, skip_special_tokens=False
    )


async def test_priority_and_the_time_of_the_attempt_reach_the_engine() -> None:
    request = with_fields(completion("a"), priority=-3)
    command = generate_command(request, Attempt(timeouts=Timeouts(total=2.5)))
    assert (command.priority, command.timeout) == (-3, 2.5)
    assert generate_command(request, Attempt(timeouts=Timeouts(total=0))).timeout is None
    async with native("slow") as adapter:
        with pytest.raises(BackendRefused, match="priority is 101"):
            await collect(adapter, with_fields(completion("a"), priority=101))
        hasty = Attempt(timeouts=Timeouts(total=0.1))
        with pytest.raises(BackendTimeout) as late:
            async for _ in adapter.stream(completion("abc", max_tokens=100), hasty):
                pass
        assert (late.value.phase, late.value.retryable) == ("total", False)


async def test_what_the_engine_tells_of_itself_is_documented_and_nothing_else() -> None:
    async with native() as adapter:
        await collect(adapter, completion("abcdef", max_tokens=4))
        load = await adapter.load()
    assert load is not None
    assert load.counters["generation_tokens"] == 4
    assert load.counters["prefix_cache_queries"] == load.counters["prompt_tokens"] == 7
    assert sum(load.distributions["time_to_first_token_seconds"].counts) == 1
    assert sum(load.distributions["inter_token_latency_seconds"].counts) == 3
    told = {f"{name}_total" for name in load.counters} | {*load.gauges, *load.distributions}
    text = (FAKES.parents[1] / "docs" / "observability.md").read_text()
    assert {f"forebay_engine_{name}" for name in told} == set(
        re.findall(r"^\| `(forebay_engine_[a-z_]+)`", text, re.M)
    )


def test_a_watermark_is_asked_for_by_name_or_in_particular() -> None:
    def asked(value: Any) -> object:
        return generate_command(with_fields(completion("a"), watermark=value), Attempt()).watermark

    assert asked(True) is True
    assert asked(False) is False
    assert asked({"gamma": 0.5, "seeding": "lefthash"}) == Watermark(gamma=0.5, seeding="lefthash")
    for wrong in ({"key": "mine"}, {"scheme": "red"}, "yes"):
        with pytest.raises(BackendRefused) as refusal:
            asked(wrong)
        assert (refusal.value.param or "").startswith("watermark")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop_token_ids": "74"}, "stop_token_ids"),
        ({"stop_token_ids": [1, None]}, "stop_token_ids[1]"),
    ],
)
async def test_a_further_field_of_another_type_is_refused_by_name(
    fields: dict[str, Any], param: str
) -> None:
    adapter = NativeAdapter(NativeSettings(adapter="native", path="x"), context(FAKES, {}))
    with pytest.raises(BackendRefused, match="Expected") as refusal:
        await collect(adapter, with_fields(completion("a"), **fields))
    assert refusal.value.param == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"needs_tools": True}, "tools"),
        ({"needs_schema": True}, "response_format"),
        ({"needs_multimodal": True}, "messages"),
        ({"extra": ("stop_token_ids", "tool_prompt")}, "tool_prompt"),
    ],
)
async def test_what_the_engine_cannot_do_is_refused_by_name(
    change: dict[str, Any], param: str
) -> None:
    adapter = NativeAdapter(NativeSettings(adapter="native", path="x"), context(FAKES, {}))
    with pytest.raises(BackendRefused) as refusal:
        await collect(adapter, msgspec.structs.replace(completion("a"), **change))
    assert refusal.value.param == param


async def test_a_probe_tells_what_it_can_do() -> None:
    async with native() as adapter:
        capabilities = await adapter.probe()
        assert {capabilities.tools, capabilities.multimodal} == {False}
        assert capabilities.schema
        assert capabilities.scoring
        assert not capabilities.extra_fields
        assert {"stop_token_ids", "guided_json", "structured_outputs"} <= capabilities.fields
        assert (capabilities.max_context, capabilities.slots) == (256, 64)


async def test_a_refusal_names_the_field_that_the_client_sent() -> None:
    async with native() as adapter:
        for name in ("max_tokens", "max_completion_tokens"):
            request = msgspec.structs.replace(
                chat_request(max_tokens=5000), fields={name: msgspec.Raw(b"5000")}
            )
            with pytest.raises(BackendRefused, match="context holds 256") as refusal:
                await collect(adapter, request)
            assert (refusal.value.param, refusal.value.code) == (name, "context_length_exceeded")
        with pytest.raises(BackendRefused, match="unknown role tool") as refusal:
            await collect(adapter, chat(Message(role="tool", content="x", tool_call_id="1")))
        assert refusal.value.param == "messages"


async def test_an_answer_keeps_to_the_schema_and_not_to_the_model() -> None:
    async with native() as adapter:
        schema = {
            "type": "object",
            "properties": {"a": {"const": "é"}},
            "required": ["a"],
            "additionalProperties": False,
        }
        format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        request = with_fields(completion("no JSON", max_tokens=100), response_format=format_)
        events = await collect(adapter, msgspec.structs.replace(request, extra=()))
        assert msgspec.json.decode(text(events))["a"] == "é"
        (reason,) = [e.finish_reason for e in events if isinstance(e, Delta) and e.finish_reason]
        assert reason == "stop"


async def test_a_grammar_that_the_engine_refuses_is_named_as_the_client_named_it() -> None:
    async with native() as adapter:
        with pytest.raises(BackendLacks, match="look-around") as refusal:
            await collect(adapter, with_fields(completion("a"), guided_regex="(?=a)"))
        assert (refusal.value.param, refusal.value.status) == ("guided_regex", 400)


async def test_tenants_do_not_share_cached_prefixes() -> None:
    async with native() as adapter:
        cached = []
        for tenant in ("a", "b", "a"):
            request = msgspec.structs.replace(
                completion("a long enough prompt"), identity=Identity(tenant=tenant)
            )
            finished = (await collect(adapter, request))[-1]
            assert isinstance(finished, Finished)
            assert finished.usage is not None
            cached.append(finished.usage.cached_tokens)
        assert cached == [0, 0, 20]


async def test_a_death_in_mid_stream_is_a_truncated_stream_and_then_no_connection() -> None:
    async with native("slow") as adapter:
        events = adapter.stream(completion("Hello", max_tokens=200), Attempt())
        for _ in range(3):
            await anext(events)
        client = adapter._client
        assert client is not None
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(StreamTruncated):
            await collect_rest(events)
        with pytest.raises(ConnectFailed, match="restarted"):
            await collect(adapter, completion("Hello"))
        await ready(adapter)
        assert text(await collect(adapter, completion("Hello", max_tokens=6))) == "Hello"


async def collect_rest(events: AsyncIterator[Event]) -> None:
    async for _ in events:
        pass


def tokenize(**what: Any) -> TokenizeRequest:
    return TokenizeRequest(id="forebay-1", model="m", created=1, **what)


def detokenize(*tokens: int) -> DetokenizeRequest:
    return DetokenizeRequest(id="forebay-1", model="m", created=1, tokens=tokens)


async def test_it_tokenizes_texts_and_chats_and_turns_tokens_back() -> None:
    async with native() as adapter:
        assert {"tokenize", "detokenize"} <= (await adapter.probe()).endpoints
        plain = await adapter.perform(tokenize(text="Hi", add_special_tokens=False), Attempt())
        assert isinstance(plain, Tokens)
        assert (plain.texts, plain.max_model_len, len(plain.ids)) == (None, 256, 2)
        marked = await adapter.perform(tokenize(text="Hi", with_texts=True), Attempt())
        assert isinstance(marked, Tokens)
        assert marked.texts == ("<bos>", "H", "i")
        assert marked.ids[1:] == plain.ids
        hello = (Message(role="user", content="Hi"),)
        chat = await adapter.perform(tokenize(chat=hello, add_special_tokens=False), Attempt())
        assert isinstance(chat, Tokens)
        text = await adapter.perform(detokenize(*chat.ids), Attempt())
        assert isinstance(text, Text)
        assert text.text.count("<bos>") == 1
        assert text.text.endswith("user\nHi<end_of_turn>\n<start_of_turn>assistant\n")
        with pytest.raises(BackendRefused, match="vocabulary") as refusal:
            await adapter.perform(detokenize(9999), Attempt())
        assert refusal.value.param == "tokens"
        with pytest.raises(BackendRefused, match="chat_template") as refusal:
            await adapter.perform(tokenize(text="a", extra=("chat_template",)), Attempt())
        assert refusal.value.param == "chat_template"


def embed(*inputs: str | tuple[int, ...], dimensions: int | None = None) -> EmbedRequest:
    return EmbedRequest(id="r", model="m", created=1, inputs=inputs, dimensions=dimensions)


async def test_it_embeds_where_the_model_pools() -> None:
    async with native(pooling="last") as adapter:
        assert "embeddings" in (await adapter.probe()).endpoints
        found = await adapter.perform(embed((5, 6, 7), "ab"), Attempt())
        assert isinstance(found, Embeddings)
        three, two = found.vectors
        assert three == pytest.approx((3 / 10**0.5, 1 / 10**0.5))
        assert len(two) == 2
        assert found.usage is not None
        assert found.usage.prompt_tokens > 3
        with pytest.raises(BackendRefused, match="the vectors have 2") as refusal:
            await adapter.perform(embed("a", dimensions=3), Attempt())
        assert refusal.value.param == "dimensions"


async def test_a_model_that_does_not_pool_says_so() -> None:
    async with native() as adapter:
        assert "embeddings" not in (await adapter.probe()).endpoints
        with pytest.raises(BackendRefused, match="set pooling to last or mean"):
            await adapter.perform(embed("a"), Attempt())


async def test_while_it_loads_it_is_busy() -> None:
    async with native("loading") as adapter:
        while True:
            with pytest.raises(BackendBusy) as early:
                await adapter.perform(tokenize(text="a"), Attempt())
            if "being loaded" in early.value.message:
                break
            await asyncio.sleep(0.01)
        with pytest.raises(BackendBusy) as busy:
            await adapter.probe()
        assert busy.value.code == "loading"
        while "40 % of its weights are read" not in busy.value.message:
            await asyncio.sleep(0.01)
            with pytest.raises(BackendBusy) as busy:
                await adapter.probe()
        assert busy.value.retry_after


def test_paths_are_folders_or_names_of_pulled_models(tmp_path: Path) -> None:
    pulled = tmp_path / "models" / "tiny"
    pulled.mkdir(parents=True)
    adapter = NativeAdapter(NativeSettings(adapter="native", path="tiny"), context(tmp_path, {}))
    with pytest.raises(ConfigError, match=r"backends\.native\.path: .*forebay model pull tiny"):
        asyncio.run(adapter.start())
    (pulled / "config.json").write_text("{}")
    assert adapter._config().model == str(pulled)
    (tmp_path / "config.json").write_text("{}")
    assert NativeAdapter(
        NativeSettings(adapter="native", path=str(tmp_path)), context(tmp_path, {})
    )._config().model == str(tmp_path)


def test_a_path_may_be_a_gguf_file_or_hold_one(tmp_path: Path) -> None:
    def found(path: Path) -> Path:
        settings = NativeSettings(adapter="native", path=str(path))
        return Path(NativeAdapter(settings, context(tmp_path, {}))._config().model)

    file = tmp_path / "tiny.gguf"
    for path in (file, tmp_path):
        with pytest.raises(ConfigError, match="no model at"):
            found(path)
    file.write_bytes(b"GGUF")
    assert found(file) == file
    assert found(tmp_path) == tmp_path


async def test_what_was_not_started_has_no_engine() -> None:
    adapter = NativeAdapter(NativeSettings(adapter="native", path="x"), context(FAKES, {}))
    with pytest.raises(ConnectFailed):
        await adapter.probe()
    with pytest.raises(ConnectFailed):
        await collect(adapter, completion("a"))
    with pytest.raises(ConnectFailed):
        await adapter.perform(detokenize(1), Attempt())
    await adapter.aclose()


def test_the_plugin_offers_one_kind() -> None:
    (kind,) = adapters()
    build: Callable[[Any, AdapterContext], object] = kind.build
    settings = msgspec.convert({"adapter": "native", "path": "p"}, kind.settings)
    assert isinstance(build(settings, context(FAKES, {})), NativeAdapter)
