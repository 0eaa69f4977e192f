"""``echo``: each answer begins with its prompt, and with the log probabilities of its tokens.

The engine scores a prompt once, for the first of its choices. So what comes earlier of the others
is held back until that is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import structs

from forebay.api import Delta, Event, GenerateRequest, PromptLogprob, TokenLogprob
from forebay_engine.client import Accepted, Done, Output, Prompt

__all__ = ["Echo"]


class Echo:
    """Of one request.

    :param scored: the field ``prompt_logprobs``, so many of the likeliest tokens; None: not said.
    """

    def __init__(self, request: GenerateRequest, scored: int | None) -> None:
        self._n = request.n
        self._likeliest = request.sampling.logprobs
        self._scored = scored
        self._prompts: Sequence[Prompt] = ()
        #: By the number of the prompt, as soon as they are known.
        self._logprobs: dict[int, tuple[TokenLogprob, ...]] = {}
        self._held: dict[int, list[Delta]] = {}
        self._begun: set[int] = set()

    def pieces(self, event: Accepted | Output | Done, found: Event) -> Iterable[Event]:
        """What can be passed on of what the engine has said; ``found``: what that is to others."""
        if isinstance(event, Accepted):
            self._prompts = event.prompts
        return self._deltas(found) if isinstance(found, Delta) else (found,)

    def _deltas(self, delta: Delta) -> Iterable[Delta]:
        number = delta.index // self._n
        if delta.index % self._n == 0 and delta.index not in self._begun:
            self._logprobs[number] = self._of_prompt(number, delta.prompt_logprobs)
        if number not in self._logprobs and self._likeliest is not None:
            self._held.setdefault(number, []).append(delta)
            return ()
        return map(self._behind_prompt, (delta, *self._held.pop(number, ())))

    def _of_prompt(
        self, number: int, places: Sequence[Sequence[PromptLogprob]]
    ) -> tuple[TokenLogprob, ...]:
        """Nothing is known of the first token."""
        if self._likeliest is None:
            return ()
        prompt = self._prompts[number]
        known = [(None, ()), *((own.logprob, best) for own, *best in places)]
        return tuple(
            TokenLogprob(
                token,
                logprob,
                tuple((other.token, other.logprob) for other in best[: self._likeliest]),
                offset,
            )
            for token, offset, (logprob, best) in zip(
                prompt.tokens, prompt.offsets, known, strict=True
            )
        )

    def _behind_prompt(self, delta: Delta) -> Delta:
        if delta.index in self._begun:
            return delta
        self._begun.add(delta.index)
        number = delta.index // self._n
        text = self._prompts[number].text
        places = delta.prompt_logprobs if self._scored is not None else ()
        first = tuple(structs.replace(one, offset=len(text)) for one in delta.logprobs[:1])
        return structs.replace(
            delta,
            text=text + delta.text,
            logprobs=(*self._logprobs.get(number, ()), *first, *delta.logprobs[1:]),
            prompt_logprobs=tuple(place[: 1 + (self._scored or 0)] for place in places),
        )
