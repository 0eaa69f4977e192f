"""What the operator of a gateway is told of each request; only Forebay promises it."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from forebay.conformance.answer import Answer, Broken, Lacking
from forebay.conformance.check import check as any_check
from forebay.conformance.talk import Talk

check = partial(any_check, compared=False)


@check("operator.request-id", "The client's `x-request-id` comes back")
async def request_id(talk: Talk) -> None:
    body = talk.body({"messages": [{"role": "user", "content": "hi"}]})
    answer = await talk.ask("/v1/chat/completions", body, headers={"x-request-id": "conf-1"})
    if answer.headers.get("x-request-id") != "conf-1":
        raise Broken(f"it comes back as {answer.headers.get('x-request-id')!r}")


@check("operator.request-id-made", "Who gives none is given one")
async def request_id_made(talk: Talk) -> None:
    ids = {(await talk.generate(max_tokens=1)).headers.get("x-request-id") for _ in range(2)}
    if len(ids) != 2 or None in ids:
        raise Broken(f"they are {ids}")


@check("operator.backend", "`x-forebay-backend` names who answered")
async def backend(talk: Talk) -> None:
    named = (await talk.generate()).expect().headers.get("x-forebay-backend")
    (known,) = (await talk.operator("/backends"))["backends"]
    if named != known["name"]:
        raise Broken(f"it is {named!r}, not {known['name']!r}")


@check("operator.decision", "The decision record tells outcome, finish reason and usage")
async def decision(talk: Talk) -> None:
    answer = (await talk.generate()).expect()
    outcome = (await _decision(talk, answer))["outcome"]
    if outcome["result"] != "ok" or outcome["finish_reasons"] != [answer.choice.finish]:
        raise Broken(f"it is {outcome}")
    usage = outcome["usage"]
    if usage["completion_tokens"] != answer.usage.completion_tokens:
        raise Broken(f"the client was told {answer.usage}, the record {usage}")


@check("operator.decision-stream", "It knows a stream's usage even if the client asked for none")
async def decision_stream(talk: Talk) -> None:
    answer = (await talk.generate(stream=True)).expect()
    outcome = (await _decision(talk, answer))["outcome"]
    if not outcome["usage"] or not 1 <= outcome["usage"]["completion_tokens"] <= 8:
        raise Broken(f"of at most 8 tokens it says {outcome['usage']}")
    if outcome["finish_reasons"] != [answer.choice.finish] or outcome["ttft"] is None:
        raise Broken(f"it is {outcome}")


@check("operator.refusal", "A refusal by the backend's abilities is recorded as the client's")
async def refusal(talk: Talk) -> None:
    answer = await talk.generate(model="no-such-model")
    if "x-request-id" not in answer.headers or answer.headers.get("x-forebay-backend"):
        raise Broken(f"its headers are {dict(answer.headers)}")


@check("operator.usage-reported", "Usage is the backend's own, not counted by Forebay")
async def usage_reported(talk: Talk) -> None:
    usage = (await _decision(talk, (await talk.generate()).expect()))["outcome"]["usage"]
    if usage["source"] != "reported":
        raise Lacking("the backend does not report it: Forebay counts, and says so")


@check("operator.timings", "The backend tells how long it queued, read and wrote")
async def timings(talk: Talk) -> None:
    found = (await _decision(talk, (await talk.generate()).expect()))["outcome"]["timings"]
    if not found or found["decode"] is None:
        raise Lacking("it does not")


@check("operator.load", "The backend tells how many requests it works on")
async def load(talk: Talk) -> None:
    (await talk.generate(max_tokens=1)).expect()
    await asyncio.sleep(0.3)  # load is read every 0.2 s
    (known,) = (await talk.operator("/backends"))["backends"]
    if known["running"] is None:
        raise Lacking("it does not")


@check("operator.metrics", "`/metrics` counts the requests and the tokens of its answers")
async def metrics(talk: Talk) -> None:
    (await talk.generate()).expect()
    counted = (await talk.operator("/metrics")).splitlines()
    for name, label in (
        ("forebay_requests_total", 'outcome="ok"'),
        ("forebay_tokens_total", 'direction="output"'),
    ):
        if not any(line.startswith(f"{name}{{") and label in line for line in counted):
            raise Broken(f"{name} with {label} is not there")


async def _decision(talk: Talk, answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = await talk.operator(f"/decisions/{answer.headers['x-request-id']}")
    return found
