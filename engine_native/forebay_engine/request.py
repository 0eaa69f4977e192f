"""A request as the engine knows it: its choices, their text so far, and its times."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b

from forebay_engine.detokenizer import Detokenizer, StopStrings
from forebay_engine.errors import RequestRefused
from forebay_engine.scheduler import MAX_PRIORITY
from forebay_engine.sequence import Sequence
from forebay_engine.step import PromptToken
from forebay_engine.tokenizer import Tokenizer
from forebay_engine.wire import Done, Event, Generate, Logprob, Output, Scored


@dataclass(slots=True, eq=False)
class Choice:
    """One sequence of a request, and its text so far."""

    request: Request
    index: int
    sequence: Sequence
    text: Detokenizer
    stops: StopStrings
    #: Tokens whose text is still held back.
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    #: What was likely in the prompt, by position; None: not asked, or sent with the first piece.
    prompt: dict[int, PromptToken] | None = None
    #: When the last token came.
    last_token: float | None = None


@dataclass(slots=True, eq=False)
class Request:
    """A generation; the times are :func:`time.monotonic`, None: not reached."""

    command: Generate
    emit: Callable[[Event], None]
    prompt_tokens: int
    submitted: float
    choices: list[Choice] = field(default_factory=list)
    open: int = 0
    admitted: float | None = None
    first_token: float | None = None
    ended: float | None = None

    @property
    def completion_tokens(self) -> int:
        return sum(choice.sequence.num_output for choice in self.choices)

    @property
    def cached_tokens(self) -> int:
        """Each prompt counts once, by its first choice."""
        return sum(choice.sequence.num_cached for choice in self.choices[:: self.command.n])

    @property
    def drafted_tokens(self) -> int:
        """Guesses that were verified."""
        return sum(choice.sequence.num_drafted for choice in self.choices)

    @property
    def accepted_tokens(self) -> int:
        """Guesses that came true."""
        return sum(choice.sequence.num_accepted for choice in self.choices)


def output(choice: Choice, text: str, tokenizer: Tokenizer) -> Output:
    """The next piece of a choice, which takes what was held back for it."""
    prompt: list[list[Scored]] = []
    if choice.prompt:
        name, found = tokenizer.token_text, sorted(choice.prompt.items())
        prompt = [_scored(token, name) for _, token in found]
    piece = Output(
        id=choice.request.command.id,
        index=choice.index,
        text=text,
        token_ids=choice.token_ids,
        logprobs=choice.logprobs,
        prompt_logprobs=prompt,
        finish_reason=choice.sequence.finish_reason,
    )
    choice.token_ids, choice.logprobs, choice.prompt = [], [], None
    return piece


def _scored(token: PromptToken, name: Callable[[int], str]) -> list[Scored]:
    best = [Scored(id, name(id), value, rank) for rank, (id, value) in enumerate(token.top, 1)]
    return [Scored(token.token_id, name(token.token_id), token.logprob, token.rank), *best]


def durations(request: Request) -> tuple[float, float, float]:
    """Seconds in the queue, until the first token, and until the end, of an ended request."""
    ended = request.ended if request.ended is not None else request.submitted
    admitted = request.admitted if request.admitted is not None else ended
    first = request.first_token if request.first_token is not None else ended
    return admitted - request.submitted, max(0.0, first - admitted), ended - first


def done(request: Request) -> Done:
    """The last event of a request that has ended."""
    queue, prefill, decode = durations(request)
    return Done(
        id=request.command.id,
        prompt_tokens=request.prompt_tokens,
        completion_tokens=request.completion_tokens,
        cached_tokens=request.cached_tokens,
        queue=queue,
        prefill=prefill,
        decode=decode,
    )


def refuse_priority(priority: int) -> None:
    """:raises RequestRefused: it is out of range; without one, no bound on waiting would hold."""
    if abs(priority) > MAX_PRIORITY:
        raise RequestRefused(
            f"priority is {priority}; it must be within -{MAX_PRIORITY} and {MAX_PRIORITY}",
            "priority",
        )


def seed_of(seed: int | None, index: int) -> int:
    """The seed of a choice, 63 bits: choices differ, and are the same in every run of a seed."""
    if seed is None:
        return secrets.randbits(63)
    digest = blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
