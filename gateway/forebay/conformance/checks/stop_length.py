"""Where answers end: stop strings and length limits.

Stop strings are taken from what the model says without them, since nobody knows what it will say.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from forebay.conformance.answer import Answer, Broken, Lacking
from forebay.conformance.check import check
from forebay.conformance.talk import COMPLETIONS, PROMPT, Talk

#: Tried in turn, as a model may have nothing to say to one.
PROMPTS = (PROMPT, "The sea is", "Tell me a long story about a river and a stone.")
_TOKENS = 16
_TRIES = 3

Pick = Callable[[list[str]], list[str]]


@check("stop.string", "A stop string ends the answer, with `stop`, and is not in it", alone=True)
async def string(talk: Talk) -> None:
    await _stopped(talk, _middle)


@check("stop.several", "So does whichever of several comes first", alone=True)
async def several(talk: Talk) -> None:
    await _stopped(talk, lambda pieces: ["\x02never\x03", *_middle(pieces), "nor this"])


@check("stop.across-tokens", "So does one that begins in one token and ends in another", alone=True)
async def across_tokens(talk: Talk) -> None:
    await _stopped(talk, _border)


@check("stop.streamed", "Nothing of a stop string is streamed", alone=True)
async def streamed(talk: Talk) -> None:
    await _stopped(talk, _border, stream=True)


@check("stop.completion", "Completions stop as well", alone=True)
async def completion(talk: Talk) -> None:
    pieces = (await talk.complete(stream=True, max_tokens=_TOKENS)).expect().choice.pieces
    stop = _middle(pieces)
    for _ in range(_TRIES):
        if _ended_by(stop, (await talk.complete(stop=stop, max_tokens=_TOKENS)).expect("stop")):
            return
    raise Lacking("its answers differ so much that no stop string came up")


@check("stop.unicode", "A stop string may be of any script")
async def unicode(talk: Talk) -> None:
    if (
        not (await talk.generate(stop=["…水\U0001f30a", "\n\n\n\u2028"]))
        .expect("stop")
        .choice.finish
    ):
        raise Broken("the answer is not finished")


async def _stopped(talk: Talk, pick: Pick, stream: bool = False) -> None:
    """Ask for the same again, with stop strings picked from the pieces of the answer.

    Some engines' answers differ a little from one time to the next: so a stop string that did not
    come up is looked for anew.
    """
    for _ in range(_TRIES):
        for prompt in PROMPTS:
            said = (await talk.generate(prompt, stream=True, max_tokens=_TOKENS)).expect()
            if len(said.choice.pieces) > 2:
                break
        else:
            raise Lacking("the model has too little to say to be stopped")
        stop = pick(said.choice.pieces)
        answer = await talk.generate(prompt, stop=stop, stream=stream, max_tokens=_TOKENS)
        if _ended_by(stop, answer.expect("stop")):
            return
    raise Lacking("its answers differ so much that no stop string came up")


def _ended_by(stop: list[str], answer: Answer) -> bool:
    """False if none came up. :raises Broken: one did, and the answer is not as it should be."""
    text, finish = answer.text, answer.choice.finish
    if any(string in text for string in stop):
        raise Broken(f"{stop!r} is in {text!r}, which ends by {finish!r}")
    return finish == "stop"


def _middle(pieces: list[str]) -> list[str]:
    """What is in the middle of the text, without white space around it."""
    for piece in pieces[len(pieces) // 2 :] + pieces:
        if piece.strip():
            return [piece.strip()]
    raise Lacking("the model says nothing but white space")


def _border(pieces: list[str]) -> list[str]:
    """The end of one piece and the begin of the next."""
    for left, right in pairwise(pieces[1:]):
        if (left + right).strip():
            return [left[-2:] + right[:2]]
    raise Lacking("the model says nothing but white space")


@check("length.max-tokens", "`max_tokens` bounds the answer, which ends by `length`")
async def max_tokens(talk: Talk) -> None:
    await _bounded(talk, 5, max_tokens=5)


@check("length.max-completion-tokens", "So does `max_completion_tokens` of chat")
async def max_completion_tokens(talk: Talk) -> None:
    if "chat" not in talk.claims.endpoints:
        raise Lacking("it does not serve chat, and completions have no such field")
    await _bounded(talk, 5, max_tokens=None, max_completion_tokens=5)


@check("length.one", "An answer may be one token long")
async def one(talk: Talk) -> None:
    await _bounded(talk, 1, max_tokens=1)


@check("length.stream", "A stream is bounded as well")
async def stream(talk: Talk) -> None:
    options = {"include_usage": True}
    await _bounded(talk, 5, max_tokens=5, stream=True, stream_options=options)


@check("length.completion-default", "A completion without a limit has 16 tokens at most")
async def completion_default(talk: Talk) -> None:
    body = talk.body({"prompt": PROMPT, "max_tokens": None, "stream": True})
    raw = b""
    async with talk.opened(COMPLETIONS, body) as pieces:
        async for piece in pieces:
            raw += piece
            if raw.count(b"\n\n") > 24:  # some servers never end
                raise Broken("it has more")


async def _bounded(talk: Talk, limit: int, **fields: object) -> None:
    for prompt in PROMPTS:
        answer = (await talk.generate(prompt, **fields)).expect("max_tokens", *fields)
        if answer.usage.completion_tokens > limit:
            raise Broken(f"it has {answer.usage.completion_tokens} tokens instead of {limit}")
        if answer.choice.finish == "length":
            return
    raise Broken(f"never ended by `length`, but by {answer.choice.finish!r}")
