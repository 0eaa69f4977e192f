"""The steps by LangChain's models over OpenAI's client."""

from __future__ import annotations

from typing import Any

import openai
from langchain_chat import (
    QUESTION,
    Place,
    chat_steps,
    check_message,
    error_steps,
    joined,
    leaving_steps,
    model_settings,
    tool_steps,
)
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from steps import EMBEDDER, GIVEN, KEY, MODEL, TEXTS, main, step

URL = f"{GIVEN['url']}/v1"


def make(**settings: Any) -> ChatOpenAI:
    return ChatOpenAI(
        **model_settings({"base_url": URL, "api_key": KEY, "temperature": 0, **settings})
    )


chat_steps(make, "length")
tool_steps(make)
leaving_steps(make, openai.APITimeoutError)
error_steps(make, openai)
# Unless told not to, it cuts texts into OpenAI's tokens, for which it fetches their table.
vectors = OpenAIEmbeddings(
    base_url=URL, api_key=KEY, model=EMBEDDER, check_embedding_ctx_length=False
)


@step
def completions() -> object:
    llm = OpenAI(base_url=URL, api_key=KEY, model=MODEL, max_tokens=5, temperature=0)
    answer = llm.invoke(TEXTS["prompt"])
    assert isinstance(answer, str)
    assert answer
    return answer


@step
def n() -> object:
    answer = make(n=2, temperature=1).generate([QUESTION])
    assert len(answer.generations[0]) == 2
    return [one.text for one in answer.generations[0]]


@step
def logprobs() -> object:
    found = make(logprobs=True).invoke(QUESTION).response_metadata["logprobs"]["content"]
    assert found
    assert all(one["logprob"] <= 0 for one in found)
    return len(found)


@step
def seed() -> object:
    first, second = (make(seed=7, temperature=1).invoke(QUESTION).text for _ in range(2))
    assert first == second
    return first


@step
def structured_stream() -> object:
    *_, last = make(max_tokens=100).with_structured_output(Place).stream(QUESTION)
    assert isinstance(last, Place)
    return last


@step
async def structured_async() -> object:
    answer = await make(max_tokens=100).with_structured_output(Place).ainvoke(QUESTION)
    assert isinstance(answer, Place)
    return answer


@step
def embeddings() -> object:
    found = vectors.embed_documents(["sea", "land"])
    assert [len(vector) for vector in found] == [64, 64]
    assert vectors.embed_query("sea") == found[0]
    return len(found)


@step
async def embeddings_async() -> object:
    found = await vectors.aembed_documents(["sea", "land"])
    assert [len(vector) for vector in found] == [64, 64]
    return len(found)


@step
def responses() -> object:
    return check_message(make(use_responses_api=True, max_tokens=16).invoke(QUESTION))


@step
def responses_stream() -> object:
    llm = make(use_responses_api=True, max_tokens=16)
    return check_message(joined(list(llm.stream(QUESTION))))


main("langchain-openai", openai.BadRequestError)
