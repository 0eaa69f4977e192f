"""``echo`` on the native engine: the prompt stands before each answer, with what is known of it."""

from __future__ import annotations

from typing import Any

import msgspec

from forebay.api import (
    Attempt,
    Delta,
    Event,
    GenerateRequest,
    PromptLogprob,
    Sampling,
    TokenLogprob,
)
from forebay_engine.client import Accepted, Output, Prompt
from forebay_engine.wire import Logprob, Scored
from forebay_plugins.native import _event
from forebay_plugins.native_echo import Echo
from forebay_plugins.native_request import generate_command

PROMPTS = [Prompt("Hi", ["<bos>", "H", "i"], [0, 0, 1]), Prompt("x", ["x"], [0])]
#: Of the first prompt: its own token at each place but the first, and the two likeliest.
PLACES = [
    [Scored(5, "H", -1.0, 2), Scored(9, "a", -0.5, 1), Scored(5, "H", -1.0, 2)],
    [Scored(6, "i", -0.25, 1), Scored(6, "i", -0.25, 1), Scored(7, "o", -2.0, 2)],
]


def asking(n: int = 1, scored: int | None = None, **sampling: Any) -> GenerateRequest:
    fields = {} if scored is None else {"prompt_logprobs": msgspec.Raw(str(scored).encode())}
    return GenerateRequest(
        id="r",
        endpoint="completions",
        created=0,
        model="m",
        prompts=("Hi", "x"),
        echo=True,
        n=n,
        fields=fields,
        extra=tuple(fields),
        sampling=Sampling(**sampling),
    )


def passed_on(request: GenerateRequest, *outputs: Output, scored: int | None = None) -> list[Delta]:
    echo = Echo(request, scored)
    said: list[Event] = []
    for event in (Accepted(0, 4, PROMPTS), *outputs):
        said += echo.pieces(event, _event(event, "m"))
    return [event for event in said if isinstance(event, Delta)]


def test_without_logprobs_the_text_alone_comes_first_and_once() -> None:
    found = passed_on(asking(n=2), Output(0, 1, "b"), Output(0, 0, "a"), Output(0, 1, "c"))
    assert [(delta.index, delta.text) for delta in found] == [(1, "Hib"), (0, "Hia"), (1, "c")]
    assert not any(delta.logprobs for delta in found)


def test_logprobs_of_the_prompt_stand_before_those_of_the_answer() -> None:
    first = Output(0, 0, "a", [8], [Logprob("a", -0.1, [("a", -0.1)])], PLACES)
    (found,) = passed_on(asking(logprobs=1), first)
    assert found.text == "Hia"
    assert found.logprobs == (
        TokenLogprob("<bos>", None, (), 0),
        TokenLogprob("H", -1.0, (("a", -0.5),), 0),
        TokenLogprob("i", -0.25, (("i", -0.25),), 1),
        TokenLogprob("a", -0.1, (("a", -0.1),), 2),
    )
    assert found.token_ids == (8,)
    assert not found.prompt_logprobs  # which are another field's


def test_a_choice_waits_until_its_prompt_is_scored() -> None:
    token = [Logprob("a", -0.1, [])]
    early = [Output(0, 1, "b", [8], token), Output(0, 1, "c", [8], token), Output(0, 3, "d")]
    assert passed_on(asking(n=2, logprobs=0), *early) == []
    found = passed_on(asking(n=2, logprobs=0), *early, Output(0, 0, "a", [8], token, PLACES))
    assert [(delta.index, delta.text) for delta in found] == [(0, "Hia"), (1, "Hib"), (1, "c")]
    assert found[0].logprobs == found[1].logprobs
    assert [one.logprob for one in found[0].logprobs] == [None, -1.0, -0.25, -0.1]
    # A prompt of one token has no place that anything is known of.
    late = passed_on(asking(n=2, logprobs=0), *early, Output(0, 2, "e", [8], token))
    assert [(delta.index, delta.text) for delta in late] == [(2, "xe"), (3, "xd")]
    assert [one.logprob for one in late[0].logprobs] == [None, -0.1]


def test_both_fields_may_ask_for_the_prompts_logprobs_each_for_its_number() -> None:
    request = asking(scored=1, logprobs=2)
    assert generate_command(request, Attempt()).sampling.prompt_logprobs == 2
    assert generate_command(asking(scored=3, logprobs=2), Attempt()).sampling.prompt_logprobs == 3
    assert generate_command(asking(), Attempt()).sampling.prompt_logprobs is None
    (found,) = passed_on(request, Output(0, 0, "a", prompt_logprobs=PLACES), scored=1)
    assert [len(one.top) for one in found.logprobs] == [0, 2, 2]
    assert found.prompt_logprobs[0] == (
        PromptLogprob(5, "H", -1.0, 2),
        PromptLogprob(9, "a", -0.5, 1),
    )
