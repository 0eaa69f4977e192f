"""From what a client sends to token ids, with every refusal on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from forebay_engine.chat import ChatTemplate
from forebay_engine.detokenizer import Detokenizer
from forebay_engine.errors import RequestRefused
from forebay_engine.sequence import SamplingParams
from forebay_engine.tokenizer import Tokenizer
from forebay_engine.watermark import Marks
from forebay_engine.wire import Detokenize, Generate, Prompt, Tokenize

#: Each costs a name and a number for every token sent.
MAX_LOGPROBS = 20
#: OpenAI's bound of a logit bias: enough to force a token, or to keep it out.
MAX_BIAS = 100.0


class PromptEncoder:
    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        vocab_size: int,
        marks: Marks | None = None,
    ) -> None:
        self._marks = marks or Marks()
        self._tokenizer = tokenizer
        self._template = template
        self._vocab_size = vocab_size

    def settle(self, command: Generate) -> tuple[list[list[int]], SamplingParams, list[Prompt]]:
        """A valid command's prompts and sampling, and for ``echo`` the prompts as they stand.

        Slow for long texts: call it in a thread.

        :raises RequestRefused: naming the field that is wrong.
        """
        sampling, prompts = self.sampling(command), self.encode(command)
        return prompts, sampling, self._shown(command, prompts) if command.echo else []

    def encode(self, command: Generate) -> list[list[int]]:
        """Token ids of each prompt of a valid command.

        :raises RequestRefused: naming the field that is wrong.
        """
        if command.n < 1:
            raise RequestRefused(f"n is {command.n}; it must be at least 1", "n")
        if command.messages is not None:
            return [self._chat(command.messages, special=False)]
        if not command.prompts:
            raise RequestRefused("there is no prompt", "prompt")
        return [self._prompt(prompt, "prompt") for prompt in command.prompts]

    def _shown(self, command: Generate, prompts: Sequence[list[int]]) -> list[Prompt]:
        """:raises RequestRefused: it has messages, of which the client never sees the template."""
        if command.messages is not None:
            raise RequestRefused("a chat has no prompt to repeat", "echo")
        return [self._as_it_stands(*pair) for pair in zip(command.prompts, prompts, strict=True)]

    def _as_it_stands(self, prompt: str | list[int], ids: list[int]) -> Prompt:
        tokens = list(map(self._tokenizer.token_text, ids))
        if isinstance(prompt, str):
            return Prompt(prompt, tokens, self._tokenizer.offsets(prompt))
        pieces = Detokenizer(self._tokenizer.spell, ())
        text, offsets = "", []
        for token_id in ids:
            offsets.append(len(text))
            text += pieces.push(token_id)
        return Prompt(text, tokens, offsets)

    def sampling(self, command: Generate) -> SamplingParams:
        """The command's sampling, checked, with its bad words as tokens, and its mark.

        :raises RequestRefused: naming the field that is wrong.
        """
        asked = command.sampling
        check(asked)
        self._check_ids(asked.stop_token_ids, "stop_token_ids")
        self._check_ids(list(asked.logit_bias), "logit_bias")
        self._check_ids(asked.allowed_token_ids, "allowed_token_ids")
        words = tuple(form for word in command.bad_words for form in self._bad_word(word))
        banned = {word[0] for word in words if len(word) == 1}
        if asked.allowed_token_ids and banned.issuperset(asked.allowed_token_ids):
            raise RequestRefused(
                "every one of allowed_token_ids is among bad_words: no token is left", "bad_words"
            )
        mark = self._marks.of(command.watermark, asked.temperature)
        return replace(asked, bad_words=words, watermark=mark)

    def _bad_word(self, word: str | list[int]) -> list[tuple[int, ...]]:
        """A word's tokens; those of a text as it stands after a space, and at the very start."""
        if not word:
            raise RequestRefused("an empty bad word can't be kept out", "bad_words")
        if not isinstance(word, str):
            self._check_ids(word, "bad_words")
            return [tuple(word)]
        plain = word.lstrip() or word
        forms = (self._tokenizer.encode(text, special=False) for text in (plain, " " + plain))
        return list(dict.fromkeys(tuple(form) for form in forms if form))

    def inputs(self, inputs: Sequence[str | list[int]]) -> list[list[int]]:
        """Token ids of what is to be embedded.

        :raises RequestRefused: there is nothing, or a token that the vocabulary lacks.
        """
        if not inputs:
            raise RequestRefused("there is no input", "input")
        return [self._prompt(text, "input") for text in inputs]

    def tokens(self, command: Tokenize) -> tuple[list[int], list[str] | None]:
        """Token ids, and their texts if they are wanted. Slow for long texts.

        :raises RequestRefused: these messages can't be rendered.
        """
        if command.messages is not None:
            ids = self._chat(command.messages, special=command.special)
        else:
            ids = self._tokenizer.encode(command.text, special=command.special)
        return ids, list(map(self._tokenizer.token_text, ids)) if command.texts else None

    def text(self, command: Detokenize) -> str:
        """The text of the tokens. Slow for many.

        :raises RequestRefused: one of them is not in the vocabulary.
        """
        self._check_ids(command.token_ids, "tokens")
        return self._tokenizer.spell(command.token_ids)

    def _chat(self, messages: Sequence[dict[str, Any]], *, special: bool) -> list[int]:
        if not messages:
            raise RequestRefused("there are no messages", "messages")
        if self._template is None:
            raise RequestRefused(
                "this model has no chat template: use /v1/completions, "
                "or put a chat_template.jinja into its folder",
                "messages",
            )
        return self._tokenizer.encode(self._template.render(messages), special=special)

    def _prompt(self, prompt: str | list[int], param: str) -> list[int]:
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt, special=True)
        self._check_ids(prompt, param)
        return prompt

    def _check_ids(self, token_ids: Sequence[int], param: str) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self._vocab_size:
                raise RequestRefused(
                    f"token id {token_id} is outside the vocabulary of {self._vocab_size}", param
                )


def check(sampling: SamplingParams) -> None:
    """:raises RequestRefused: a sampling parameter is out of range."""
    limits = [
        ("temperature", sampling.temperature, 0.0, math.inf),
        ("top_p", sampling.top_p, 0.0, 1.0),
        ("min_p", sampling.min_p, 0.0, 1.0),
        ("typical_p", sampling.typical_p, 0.0, 1.0),
        ("top_k", sampling.top_k, 0, math.inf),
        ("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0),
        ("presence_penalty", sampling.presence_penalty, -2.0, 2.0),
        ("repetition_penalty", sampling.repetition_penalty, 0.0, math.inf),
        ("logprobs", sampling.logprobs or 0, 0, MAX_LOGPROBS),
        ("prompt_logprobs", sampling.prompt_logprobs or 0, 0, MAX_LOGPROBS),
        ("min_tokens", sampling.min_tokens, 0, math.inf),
    ]
    for name, value, low, high in limits:
        if not (low <= value <= high and math.isfinite(value)):
            raise RequestRefused(
                f"{name} is {value:g}; it must be within {low:g} and {high:g}", name
            )
    for name in ("top_p", "typical_p", "repetition_penalty"):
        if getattr(sampling, name) == 0:
            raise RequestRefused(f"{name} is 0; it must be greater", name)
    for token_id, value in sampling.logit_bias.items():
        if not -MAX_BIAS <= value <= MAX_BIAS:
            raise RequestRefused(
                f"the bias of token {token_id} is {value:g}; "
                f"it must be within -{MAX_BIAS:g} and {MAX_BIAS:g}",
                "logit_bias",
            )
    if "" in sampling.stop:
        raise RequestRefused("an empty stop string would stop before the first token", "stop")
