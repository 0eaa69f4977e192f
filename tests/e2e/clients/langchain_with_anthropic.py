"""The steps by LangChain's model over Anthropic's client."""

from __future__ import annotations

from typing import Any

import anthropic
from langchain_anthropic import ChatAnthropic
from langchain_chat import (
    QUESTION,
    chat_steps,
    error_steps,
    leaving_steps,
    model_settings,
    tool_steps,
)
from steps import GIVEN, KEY, main, step


def make(**settings: Any) -> ChatAnthropic:
    return ChatAnthropic(**model_settings({"base_url": GIVEN["url"], "api_key": KEY, **settings}))


chat_steps(make, "max_tokens")
tool_steps(make)
leaving_steps(make, anthropic.APITimeoutError)
error_steps(make, anthropic)


@step
def count_tokens() -> object:
    counted = make().get_num_tokens_from_messages(QUESTION)
    assert counted > 5
    return counted


main("langchain-anthropic", anthropic.BadRequestError)
