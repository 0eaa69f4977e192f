"""The steps that LangChain's chat models share, whatever dialect they speak."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from pydantic import BaseModel
from steps import ENDLESS, MODEL, TEXTS, TOOL, load_comes_to, raised, step, wait_for_load

QUESTION = [HumanMessage(TEXTS["question"])]
TOOLS: Any = [{"type": "function", "function": TOOL}]
IMAGE = {"type": "image", "base64": "bm90IGxvb2tlZCBhdA==", "mime_type": "image/png"}


class Place(BaseModel):
    """A place."""

    name: Literal["Oslo", "Rome"]
    warm: bool


def check_message(message: Any) -> Any:
    assert isinstance(message.text, str)
    assert message.usage_metadata["input_tokens"] > 0
    assert message.usage_metadata["output_tokens"] > 0
    return message.text


def check_call(message: Any) -> Any:
    (call,) = message.tool_calls
    assert call["name"] == TOOL["name"]
    assert call["id"]
    assert call["args"]["place"] in ("Oslo", "Rome")
    return call["args"]


def joined(chunks: list[Any]) -> Any:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return whole


def chat_steps(make: Callable[..., BaseChatModel], limit: str) -> None:
    """Defines those of talking, over `make`, which takes the model's own settings.

    `limit`: the finish reason of an answer that was cut.
    """
    llm = make()

    @step
    def chat() -> object:
        return check_message(llm.invoke(QUESTION))

    @step
    def chat_stream() -> object:
        whole = joined(list(llm.stream(QUESTION)))
        assert isinstance(whole.text, str)
        return whole.text

    @step
    async def chat_async() -> object:
        return check_message(await make().ainvoke(QUESTION))

    @step
    async def chat_stream_async() -> object:
        return joined([chunk async for chunk in make().astream(QUESTION)]).text

    @step
    def system() -> object:
        answer: Any = llm.invoke([SystemMessage(TEXTS["system"]), *QUESTION])
        plain: Any = llm.invoke(QUESTION)
        more = answer.usage_metadata["input_tokens"]
        assert more > plain.usage_metadata["input_tokens"]
        return more

    @step
    def parts() -> object:
        texts: Any = [{"type": "text", "text": TEXTS[name]} for name in ("prompt", "question")]
        return check_message(llm.invoke([HumanMessage(texts)]))

    @step
    def turns() -> object:
        return check_message(llm.invoke([*QUESTION, llm.invoke(QUESTION), *QUESTION]))

    @step
    def stop() -> object:
        answer = llm.invoke(TEXTS["until_stop"], stop=[TEXTS["stop"], " "], max_tokens=48)
        assert " " not in answer.text
        return answer.response_metadata

    @step
    def max_tokens() -> object:
        answer: Any = make(max_tokens=2).invoke(QUESTION)
        found = answer.response_metadata
        assert limit in (found.get("finish_reason"), found.get("stop_reason"))
        assert answer.usage_metadata["output_tokens"] == 2
        return limit

    @step
    def stream_usage() -> object:
        return check_message(joined(list(make(stream_usage=True).stream(QUESTION))))


def tool_steps(make: Callable[..., BaseChatModel]) -> None:
    """Defines those of tools, objects and images."""
    calling = make(max_tokens=60).bind_tools(TOOLS, tool_choice=TOOL["name"])
    parsing = make(max_tokens=100).with_structured_output(Place, method="json_schema")

    @step
    def tool() -> object:
        return check_call(calling.invoke(QUESTION))

    @step
    def tool_stream() -> object:
        return check_call(joined(list(calling.stream(QUESTION))))

    @step
    async def tool_async() -> object:
        again = make(max_tokens=60).bind_tools(TOOLS, tool_choice=TOOL["name"])
        return check_call(await again.ainvoke(QUESTION))

    @step
    def tool_result() -> object:
        call: Any = calling.invoke(QUESTION)
        result = ToolMessage("Rain.", tool_call_id=call.tool_calls[0]["id"])
        answer = make().bind_tools(TOOLS).invoke([*QUESTION, call, result])
        assert isinstance(answer, AIMessage)
        return answer.text

    @step
    def structured() -> object:
        answer = parsing.invoke(QUESTION)
        assert isinstance(answer, Place)
        return answer

    @step
    def image() -> object:
        return make().invoke([HumanMessage([{"type": "text", "text": "What?"}, IMAGE])])


def leaving_steps(make: Callable[..., BaseChatModel], timed_out: type[Exception]) -> None:
    """Defines those of clients that go; `timed_out`: the class for a timeout."""

    @step
    def leave() -> object:
        stream: Any = make(max_tokens=2000).stream(ENDLESS)
        next(stream)
        wait_for_load(1)
        stream.close()
        wait_for_load(0)
        return "freed"

    @step
    async def leave_async() -> object:
        stream: Any = make(max_tokens=2000).astream(ENDLESS)
        await anext(stream)
        await load_comes_to(1)
        await stream.aclose()
        await load_comes_to(0)
        return "freed"

    @step
    def timeout() -> object:
        hasty = make(max_tokens=2000, timeout=1, max_retries=0)
        raised(timed_out, lambda: hasty.invoke(ENDLESS))
        wait_for_load(0)
        return "freed"

    @step
    def defaults() -> object:
        """As a newcomer writes it, without any setting of ours."""
        return check_message(make(max_tokens=6).invoke(TEXTS["question"]))


def error_steps(make: Callable[..., BaseChatModel], errors: Any) -> None:
    """`errors`: the module of the client below, whose classes LangChain lets through."""

    @step
    def unknown_model() -> object:
        strange = make(model="nonesuch")
        return raised(errors.NotFoundError, lambda: strange.invoke(QUESTION)).message

    @step
    def bad_key() -> object:
        stranger = make(api_key="wrong")
        return raised(errors.AuthenticationError, lambda: stranger.invoke(QUESTION)).message

    @step
    def bad_field() -> object:
        wrong = make()
        error = raised(errors.BadRequestError, lambda: wrong.invoke(QUESTION, top_p=7))
        assert "top_p" in error.message
        return error.message


def model_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What every model is made with, but for the settings of one step."""
    return {"model": MODEL, "max_tokens": 6, **settings}
