"""Text: every script arrives whole, in both directions; prompts may have any form OpenAI's may."""

from __future__ import annotations

from typing import Any

from forebay.conformance.answer import Answer, Broken, Lacking
from forebay.conformance.check import check
from forebay.conformance.talk import CHAT, PROMPT, Talk

#: Which models go on with in kind.
_SCRIPTS = ("東京 大阪 京都 名古屋 札幌 福岡", "Привет мир привет мир", "😀 😁 😂 🤣 😃 😄 😅")
_EMOJI = "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \U0001f1f3\U0001f1f4"
_NO_TEXT = "no text beyond ASCII could be drawn from the model"


@check("text.multibyte", "Characters of several bytes are never cut between two chunks")
async def multibyte(talk: Talk) -> None:
    seen = False
    for prompt in _SCRIPTS:
        answer = await talk.generate(prompt, stream=True, max_tokens=16)
        for piece in answer.expect().choice.pieces:
            if "\ufffd" in piece:
                raise Broken(f"a piece is {piece!r} of {answer.text!r}")
            piece.encode()  # a lone surrogate has no UTF-8
        seen = seen or not answer.text.isascii()
    if not seen:
        raise Lacking(_NO_TEXT)


@check("text.multibyte-whole", "Streamed or whole, they are the same", alone=True)
async def multibyte_whole(talk: Talk) -> None:
    for _ in range(3):
        for prompt in _SCRIPTS:
            whole = (await talk.generate(prompt, max_tokens=12)).expect().text
            streamed = (await talk.generate(prompt, stream=True, max_tokens=12)).expect().text
            if whole == streamed and not whole.isascii():
                return
    raise Lacking(_NO_TEXT if whole.isascii() else "its answers differ from time to time")


@check("text.emoji", "A prompt may have characters of many code points")
async def emoji(talk: Talk) -> None:
    _finished(await talk.generate(_EMOJI))


@check("text.escapes", "A prompt may have quotes, backslashes and line ends")
async def escapes(talk: Talk) -> None:
    _finished(await talk.generate('"\\" \\n \n\t\r\n {"a": "\\u0041"} \u2028 data: [DONE]\n\n'))


@check("text.long-prompt", "A prompt of a thousand words is read whole")
async def long_prompt(talk: Talk) -> None:
    words = min(1000, (talk.claims.max_context or 4096) // 4)
    answer = (await talk.generate("word " * words, max_tokens=2)).expect()
    if answer.usage.prompt_tokens < words * 0.9:
        raise Broken(f"{words} words are {answer.usage.prompt_tokens} tokens")


@check("text.token-ids", "The prompt of a completion may be token ids")
async def token_ids(talk: Talk) -> None:
    answer = (await talk.complete([100, 200, 300, 400])).expect("prompt")
    if not 4 <= answer.usage.prompt_tokens <= 6:  # some add what begins a text
        raise Broken(f"4 ids are {answer.usage.prompt_tokens} tokens")


@check("text.several-prompts", "There may be several prompts, each with its choice")
async def several_prompts(talk: Talk) -> None:
    answer = (await talk.complete(["one two", "three four"])).expect("prompt")
    if sorted(answer.choices) != [0, 1]:
        raise Broken(f"choices have index {sorted(answer.choices)}")


@check("text.echo", "With `echo` a completion begins with its prompt")
async def echo(talk: Talk) -> None:
    answer = (await talk.complete(echo=True)).expect("echo")
    if not answer.text.strip().startswith(PROMPT):
        raise Broken(f"it begins {answer.text[:40]!r}")


@check("text.parts", "A message may come in parts of text")
async def parts(talk: Talk) -> None:
    halves = [{"type": "text", "text": half} for half in (PROMPT[:9], PROMPT[9:])]
    await _messages(talk, {"role": "user", "content": halves})


@check("text.system", "A system message is read")
async def system(talk: Talk) -> None:
    user = {"role": "user", "content": PROMPT}
    without = await _messages(talk, user)
    within = await _messages(talk, {"role": "system", "content": "Answer in French."}, user)
    if within.usage.prompt_tokens <= without.usage.prompt_tokens:
        raise Broken(f"the prompt has {within.usage.prompt_tokens} tokens with and without")


@check("text.developer", "A developer's message is taken, or refused by name")
async def developer(talk: Talk) -> None:
    developer = {"role": "developer", "content": "Answer in French."}
    user = {"role": "user", "content": PROMPT}
    answer = await talk.ask(CHAT, talk.body({"messages": [developer, user]}))
    _finished(answer, "developer", "role", "messages")


@check("text.conversation", "A conversation goes on")
async def conversation(talk: Talk) -> None:
    said = [("user", "one two"), ("assistant", "three four"), ("user", "five six")]
    await _messages(talk, *({"role": role, "content": text} for role, text in said))


@check("text.harmless", "Fields that mean nothing to a model are taken")
async def harmless(talk: Talk) -> None:
    _finished(await talk.generate(user="somebody", metadata={"a": "b"}, store=False))


@check("text.image", "An image is taken, or refused clearly")
async def image(talk: Talk) -> None:
    if talk.claims.multimodal:
        raise Lacking("not tried: what an image must be depends on the model")
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]
    body = talk.body({"messages": [{"role": "user", "content": parts}]})
    answer = await talk.ask(CHAT, body)
    if answer.status == 200:
        raise Broken("an image is taken by a backend that claims to take text only")
    if not answer.refuses("messages", "image"):
        raise Broken(answer.told())


async def _messages(talk: Talk, *messages: dict[str, Any]) -> Answer:
    answer = await talk.ask(CHAT, talk.body({"messages": messages}))
    return _finished(answer, "messages", *{str(message["role"]) for message in messages})


def _finished(answer: Answer, *needs: str) -> Answer:
    if not answer.expect(*needs).choice.finish:
        raise Broken("the answer is not finished")
    return answer
