"""The real openai client against each real backend, through Forebay."""

from __future__ import annotations

import time
from typing import Any

import httpx
import openai
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ALL = ["native", "llama", "vllm"]
MESSAGES: Any = [{"role": "user", "content": "Tell me about the water of mountain rivers."}]


@pytest.mark.parametrize("model", ALL)
class TestEachBackend:
    def test_chat(self, client: openai.OpenAI, model: str) -> None:
        answer = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=12)
        assert answer.model == model
        assert answer.object == "chat.completion"
        choice = answer.choices[0]
        assert choice.message.role == "assistant"
        assert choice.finish_reason in ("stop", "length")
        assert answer.usage is not None
        assert answer.usage.prompt_tokens > 10
        assert 1 <= answer.usage.completion_tokens <= 12
        total = answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert answer.usage.total_tokens == total

    def test_stream(self, client: openai.OpenAI, model: str) -> None:
        with client.chat.completions.create(
            model=model,
            messages=MESSAGES,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        ) as stream:
            chunks = list(stream)
        assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
        assert chunks[0].model == model
        *pieces, last = chunks
        roles = [piece.choices[0].delta.role for piece in pieces]
        assert roles == ["assistant"] + [None] * (len(pieces) - 1)
        reasons = [piece.choices[0].finish_reason for piece in pieces]
        assert reasons[-1] in ("stop", "length")
        assert set(reasons[:-1]) <= {None}
        assert last.choices == []
        assert last.usage is not None
        assert 1 <= last.usage.completion_tokens <= 12

    def test_stream_without_usage(self, client: openai.OpenAI, model: str) -> None:
        with client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=4, stream=True
        ) as stream:
            for chunk in stream:
                assert chunk.usage is None
                assert len(chunk.choices) == 1

    def test_stream_helper(self, client: openai.OpenAI, model: str) -> None:
        """The accumulator, which repeated roles and misplaced usage break.

        It raises for an answer that was cut by its length, so this one stops at a letter.
        """
        with client.chat.completions.stream(
            model=model, messages=MESSAGES, max_tokens=100, stop=["a", "e", "o", "t"]
        ) as stream:
            for _ in stream:
                pass
            final = stream.get_final_completion()
        assert final.choices[0].message.role == "assistant"
        assert final.choices[0].finish_reason == "stop"

    def test_completions(self, client: openai.OpenAI, model: str) -> None:
        answer = client.completions.create(
            model=model, prompt="The river rises in the mountains and", max_tokens=8, temperature=0
        )
        assert answer.object == "text_completion"
        assert answer.choices[0].text.strip()
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 8

    def test_completions_stream(self, client: openai.OpenAI, model: str) -> None:
        request: dict[str, Any] = {"prompt": "One, two, three,", "max_tokens": 8, "temperature": 0}
        whole = client.completions.create(model=model, **request).choices[0].text
        with client.completions.create(model=model, stream=True, **request) as stream:
            pieces = [choice.text for chunk in stream for choice in chunk.choices]
        assert "".join(pieces) == whole

    def test_n(self, client: openai.OpenAI, model: str) -> None:
        answer = client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=4, n=2, temperature=1.0, seed=1
        )
        assert [choice.index for choice in answer.choices] == [0, 1]

    def test_n_streamed(self, client: openai.OpenAI, model: str) -> None:
        finished: dict[int, str] = {}
        with client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=4, n=2, stream=True
        ) as stream:
            for chunk in stream:
                for choice in chunk.choices:
                    if choice.finish_reason is not None:
                        assert choice.index not in finished
                        finished[choice.index] = choice.finish_reason
        assert finished.keys() == {0, 1}

    def test_logprobs(self, client: openai.OpenAI, model: str) -> None:
        answer = client.chat.completions.create(
            model=model,
            messages=MESSAGES,
            max_tokens=4,
            temperature=0,
            logprobs=True,
            top_logprobs=2,
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content
        for token in logprobs.content:
            assert token.logprob <= 0
            assert len(token.top_logprobs) >= 2

    def test_stop(self, client: openai.OpenAI, model: str) -> None:
        stop = ["a", "e", "o", "t"]
        answer = client.completions.create(
            model=model, prompt="The river rises in", max_tokens=48, stop=stop
        )
        assert answer.choices[0].finish_reason == "stop"
        assert not any(letter in answer.choices[0].text for letter in stop)

    def test_prompt_longer_than_the_context(self, client: openai.OpenAI, model: str) -> None:
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model=model, prompt="water " * 6000, max_tokens=4)
        assert refused.value.body is not None
        assert "code" in refused.value.body

    def test_leaving_frees_the_slot(self, gateway: Any, client: openai.OpenAI, model: str) -> None:
        """The backend itself says that it runs one request, then none."""
        stream = client.completions.create(
            model=model, prompt="one two three four", max_tokens=2000, temperature=0, stream=True
        )
        for _, _chunk in zip(range(3), stream, strict=False):
            pass
        gateway.wait_until(model, 60, running=1, in_flight=1)
        stream.close()
        gateway.wait_until(model, 15, running=0, in_flight=0)

    def test_leaving_before_the_answer_frees_the_slot(self, gateway: Any, model: str) -> None:
        body = {"model": model, "prompt": "one two three four", "max_tokens": 2000, "seed": 1}
        with httpx.Client(timeout=2) as impatient, pytest.raises(httpx.ReadTimeout):
            impatient.post(f"{gateway.url}/v1/completions", json={**body, "temperature": 0})
        gateway.wait_until(model, 15, running=0, in_flight=0)


class TestErrors:
    def test_unknown_model(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as error:
            client.chat.completions.create(model="gpt-6", messages=MESSAGES)
        assert error.value.code == "model_not_found"
        assert error.value.param == "model"
        assert "/v1/models" in error.value.message

    @pytest.mark.parametrize(
        ("field", "value"),
        [("temperature", "hot"), ("max_tokens", -1), ("n", 1_000_000), ("stop", ["x"] * 100)],
    )
    def test_bad_field(self, client: openai.OpenAI, field: str, value: Any) -> None:
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(
                model="gemma-3-270m", messages=MESSAGES, extra_body={field: value}
            )
        assert error.value.param == field

    def test_models(self, client: openai.OpenAI) -> None:
        listed = {model.id for model in client.models.list()}
        assert {"gemma-3-270m", *ALL} <= listed
        assert client.models.retrieve("gemma-3-270m").id == "gemma-3-270m"


class TestDecision:
    def test_it_says_who_and_why(self, gateway: Any, client: openai.OpenAI) -> None:
        raw = client.chat.completions.with_raw_response.create(
            model="gemma-3-270m", messages=MESSAGES, max_tokens=2
        )
        backend = raw.headers["x-forebay-backend"]
        assert backend in ALL
        url = f"{gateway.admin}/decisions/{raw.headers['x-request-id']}"
        decision = httpx.get(url).json()
        while decision["outcome"] is None:  # written behind the request
            time.sleep(0.05)
            decision = httpx.get(url).json()
        assert decision["served_by"] == backend
        assert {candidate["backend"] for candidate in decision["candidates"]} == set(ALL)
        assert all(candidate["score"] is not None for candidate in decision["candidates"])
        assert decision["outcome"]["result"] == "ok"
