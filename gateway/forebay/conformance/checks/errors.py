"""Errors: the client's mistake is a 4xx that names it, in OpenAI's shape, and harms nobody else."""

from __future__ import annotations

from msgspec import Struct

from forebay.conformance.answer import Broken, Lacking, shaped
from forebay.conformance.check import check
from forebay.conformance.talk import CHAT, COMPLETIONS, Talk


class Error(Struct, frozen=True):
    """What OpenAI's SDKs read of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


@check("errors.shape", "An error has `message`, `type`, `param` and `code`")
async def shape(talk: Talk) -> None:
    shaped((await talk.ask(CHAT, {"model": talk.model})).body["error"], Error)


@check("errors.unknown-model", "An unknown model is a 404 with `model_not_found`")
async def unknown_model(talk: Talk) -> None:
    answer = await talk.refusal(model="no-such-model")
    answer.refused(status=404)
    if answer.error.get("code") != "model_not_found":
        raise Broken(f"the code is {answer.error.get('code')!r}")


@check("errors.invalid-json", "A body that is not JSON is a 400")
async def invalid_json(talk: Talk) -> None:
    (await talk.ask(CHAT, b'{"model": ')).refused()


@check("errors.no-messages", "Chat without messages is a 400 that names them")
async def no_messages(talk: Talk) -> None:
    (await talk.ask(CHAT, talk.body({}))).refused("messages")


@check("errors.empty-messages", "So is chat with an empty list of them")
async def empty_messages(talk: Talk) -> None:
    (await talk.ask(CHAT, talk.body({"messages": []}))).refused("messages")


@check("errors.no-prompt", "Completions without a prompt are a 400 that names it")
async def no_prompt(talk: Talk) -> None:
    (await talk.ask(COMPLETIONS, talk.body({}))).refused("prompt")


@check("errors.role", "An unknown role is a 400 that names the messages")
async def role(talk: Talk) -> None:
    messages = [{"role": "nobody", "content": "hello"}]
    (await talk.ask(CHAT, talk.body({"messages": messages}))).refused("messages", "role")


@check("errors.wrong-type", "A field of the wrong type is a 400 that names it")
async def wrong_type(talk: Talk) -> None:
    (await talk.refusal(max_tokens="many")).refused("max_tokens")


@check("errors.max-tokens-zero", "`max_tokens: 0` is a 400 that names it")
async def max_tokens_zero(talk: Talk) -> None:
    (await talk.refusal(max_tokens=0)).refused("max_tokens")


@check("errors.max-tokens-huge", "So is one beyond all bounds")
async def max_tokens_huge(talk: Talk) -> None:
    (await talk.refusal(max_tokens=10**9)).refused("max_tokens")


@check("errors.stop-empty", "An empty stop string is a 400 that names it")
async def stop_empty(talk: Talk) -> None:
    (await talk.refusal(stop=[""])).refused("stop")


@check("errors.streamed", "A mistake in a streaming request is no stream, but a 400")
async def streamed(talk: Talk) -> None:
    answer = await talk.refusal(temperature=-1)
    answer.refused("temperature")
    if answer.streamed:
        raise Broken("the error came as a stream")


@check("errors.too-long", "A prompt beyond the context is a 400 with `context_length_exceeded`")
async def too_long(talk: Talk) -> None:
    if not talk.claims.max_context:
        raise Lacking("the backend does not tell its context, so there is no telling what is long")
    answer = await talk.refusal("word " * (talk.claims.max_context + 100), max_tokens=4)
    answer.refused()
    if answer.error.get("code") != "context_length_exceeded":
        raise Broken(f"the code is {answer.error.get('code')!r}")


@check("errors.empty-prompt", "An empty prompt is answered, or refused; never a failure")
async def empty_prompt(talk: Talk) -> None:
    answer = await talk.complete("")
    if answer.status not in (400, 422):
        answer.expect()


@check("errors.surrogate", "A lone surrogate is answered, or refused; never a failure")
async def surrogate(talk: Talk) -> None:
    body = b'{"model": "%s", "max_tokens": 2, "prompt": "a\\ud800b"}' % talk.model.encode()
    answer = await talk.ask(COMPLETIONS, body)
    if answer.status not in (400, 422):
        answer.expect()


@check("errors.route", "An unknown route is a 404 in JSON")
async def route(talk: Talk) -> None:
    answer = await talk.ask("/v1/no/such/route", {})
    answer.refused(status=404)
    if not isinstance(answer.body, dict):
        raise Broken("the body is no JSON object")


@check("errors.method", "GET where POST belongs is a 405")
async def method(talk: Talk) -> None:
    (await talk.ask(CHAT, method="GET")).refused(status=405)
