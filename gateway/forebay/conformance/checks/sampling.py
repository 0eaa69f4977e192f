"""Sampling: a field that is taken has its effect; one that cannot have it is refused."""

from __future__ import annotations

from typing import Any

from forebay.conformance.answer import Broken, Lacking
from forebay.conformance.check import check
from forebay.conformance.talk import Talk

_TRIES = 3
_HOT = {"temperature": 1.3, "max_tokens": 12}


@check("sampling.temperature-zero", "At temperature 0 the same is said again", alone=True)
async def temperature_zero(talk: Talk) -> None:
    for _ in range(_TRIES):
        if len({await _text(talk) for _ in range(2)}) == 1:
            return
    raise Lacking("answers differ from one request to the next, three times")


@check("sampling.seed", "With the same seed the same is said again", alone=True)
async def seed(talk: Talk) -> None:
    for number in range(_TRIES):
        if len({await _text(talk, "seed", seed=number + 7, **_HOT) for _ in range(2)}) == 1:
            return
    raise Lacking("answers of one seed differ, three times")


@check("sampling.seeds-differ", "Different seeds say different things")
async def seeds_differ(talk: Talk) -> None:
    texts = {await _text(talk, "seed", seed=number, **_HOT) for number in range(4)}
    if len(texts) == 1:
        await _sampled(talk)
        raise Broken("four seeds at temperature 1.3 say one thing")


@check("sampling.top-k", "`top_k: 1` leaves one choice, whatever the seed")
async def top_k(talk: Talk) -> None:
    await _narrows(talk, top_k=1)


@check("sampling.top-p", "A tiny `top_p` leaves one choice, whatever the seed")
async def top_p(talk: Talk) -> None:
    await _narrows(talk, top_p=0.0001)


@check("sampling.min-p", "`min_p: 1` leaves one choice, whatever the seed")
async def min_p(talk: Talk) -> None:
    await _narrows(talk, min_p=1.0)


async def _narrows(talk: Talk, **field: float) -> None:
    """Engines that are not quite deterministic may say two things, but not four."""
    fields: dict[str, Any] = {"temperature": 1.3, "max_tokens": 5, **field}
    texts = {await _text(talk, "seed", *field, seed=number, **fields) for number in range(4)}
    if len(texts) > 2:
        raise Broken(f"four seeds at temperature 1.3 say {len(texts)} things")


@check("sampling.top-p-one", "`top_p: 1` is taken: it is OpenAI's default")
async def top_p_one(talk: Talk) -> None:
    (await talk.generate(top_p=1, temperature=0.5)).expect("top_p")


@check("sampling.penalties", "`frequency_penalty` and `presence_penalty` are taken")
async def penalties(talk: Talk) -> None:
    (await talk.generate(frequency_penalty=1.5, presence_penalty=-0.5)).expect(
        "frequency_penalty", "presence_penalty"
    )


@check("sampling.frequency-penalty", "A high `frequency_penalty` changes what is said")
async def frequency_penalty(talk: Talk) -> None:
    """A greedy model that counts on and on repeats itself soon."""
    fields = {"max_tokens": 24}
    plain = await _text(talk, **fields)
    if await _text(talk, "frequency_penalty", frequency_penalty=2, **fields) != plain:
        return
    again = "la la la la la la la la la la la la"
    answers = [
        (await talk.generate(again, max_tokens=24, **penalty)).expect("frequency_penalty").text
        for penalty in ({}, {"frequency_penalty": 2})
    ]
    if answers[0] == answers[1]:
        await _sampled(talk)
        raise Broken("it has no effect on two prompts")


@check("sampling.repetition-penalty", "`repetition_penalty` is taken")
async def repetition_penalty(talk: Talk) -> None:
    (await talk.generate(repetition_penalty=1.3)).expect("repetition_penalty")


@check("sampling.logit-bias", "`logit_bias` of 100 makes a token the only one")
async def logit_bias(talk: Talk) -> None:
    fields = {"logit_bias": {"1000": 100}}
    one = await _text(talk, "logit_bias", max_tokens=1, **fields)
    three = await _text(talk, "logit_bias", max_tokens=3, **fields)
    if not one.strip() or three.replace(" ", "") != one.replace(" ", "") * 3:
        raise Broken(f"one token is {one!r}, three are {three!r}")


@check("sampling.choices", "`n: 2` gives two choices, numbered")
async def choices(talk: Talk) -> None:
    answer = (await talk.generate(n=2, temperature=0.8)).expect("n")
    if sorted(answer.choices) != [0, 1]:
        raise Broken(f"got those with index {sorted(answer.choices)}")


@check("sampling.temperature-bound", "A negative `temperature` is refused by name")
async def temperature_bound(talk: Talk) -> None:
    (await talk.refusal(temperature=-1)).refused("temperature")


@check("sampling.top-p-bound", "`top_p` above 1 is refused by name")
async def top_p_bound(talk: Talk) -> None:
    (await talk.refusal(top_p=1.5, temperature=0.5)).refused("top_p")


@check("sampling.penalty-bound", "A penalty beyond 2 is refused by name")
async def penalty_bound(talk: Talk) -> None:
    (await talk.refusal(frequency_penalty=3)).refused("frequency_penalty")


@check("sampling.choices-bound", "`n: 0` is refused by name")
async def choices_bound(talk: Talk) -> None:
    (await talk.refusal(n=0)).refused("n")


async def _sampled(talk: Talk) -> None:
    """:raises Lacking: the model says one thing at any temperature, so there is nothing to see."""
    if len({await _text(talk, **_HOT) for _ in range(4)}) == 1:
        raise Lacking("the model says one thing at any temperature: there is no effect to see")


async def _text(talk: Talk, *needs: str, **fields: Any) -> str:
    return (await talk.generate(**fields)).expect(*needs).text
