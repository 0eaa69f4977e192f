"""What the engine is asked for, and the record of one sequence. No tensors here."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from forebay_engine.step import Guide

from forebay_engine.watermark import Watermark

#: Which hidden states make the vector of a text.
Pooling = Literal["last", "mean"]


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    #: Its time was over.
    DEADLINE = "deadline"
    #: The step could not be executed.
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn; the neutral value of each field leaves the logits alone."""

    #: 0: nothing is drawn, as where the prompt alone is to be scored.
    max_tokens: int = 16
    min_tokens: int = 0
    #: 0: greedy.
    temperature: float = 1.0
    #: 0: off.
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    #: Mass of the tokens nearest to the entropy in surprise that are kept.
    typical_p: float = 1.0
    #: Added to the logits of these tokens.
    logit_bias: dict[int, float] = field(default_factory=dict)
    #: Only these may come; empty: any.
    allowed_token_ids: tuple[int, ...] = ()
    #: None of these runs of tokens may come: the last is banned where the others stand before it.
    bad_words: tuple[tuple[int, ...], ...] = ()
    #: Subtracted per occurrence in / presence in the answer so far.
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    #: Divides (positive) or multiplies (negative) logits of tokens seen in prompt or answer.
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    #: The text ends with the stop string or token that ended it, not before.
    include_stop: bool = False
    #: Tokens such as ``<end_of_turn>`` are no part of the text.
    skip_special_tokens: bool = True
    #: None: no mark.
    watermark: Watermark | None = None
    #: None: none; N: the chosen token's and the N likeliest tokens' logprobs (0: chosen alone).
    logprobs: int | None = None
    #: The same of the prompt's tokens; each is then computed, whatever is in the prefix cache.
    prompt_logprobs: int | None = None

    def ends(self, eos_token_ids: frozenset[int]) -> set[int]:
        """Tokens that end an answer, once it has ``min_tokens``."""
        return {*self.stop_token_ids, *(() if self.ignore_eos else eos_token_ids)}


@dataclass(slots=True)
class Sequence:
    """One choice of one request: its tokens, and how far they are computed."""

    id: int
    prompt_ids: list[int]
    sampling: SamplingParams
    #: Smaller ones run earlier.
    priority: int = 0
    #: Seconds, as the deadline, on one clock for all sequences.
    arrival: float = 0.0
    #: When it ends at the latest; None: whenever it is done.
    deadline: float | None = None
    #: None: any token may come. It stays where it is when a preemption takes the cache away.
    guide: Guide | None = None
    #: Prompt and answer.
    token_ids: list[int] = field(init=False)
    #: Of them there are so many where nothing ends the answer before.
    most_tokens: int = field(init=False)
    #: Tokens are wanted of it; without, it ends with its prompt.
    draws: bool = field(init=False)
    #: Tokens whose keys and values are in the cache; token ``num_computed`` is the next to run.
    num_computed: int = 0
    #: Prompt tokens found in the prefix cache at first admission.
    num_cached: int = 0
    #: Guessed tokens that were verified, and those of them that came true.
    num_drafted: int = 0
    num_accepted: int = 0
    finish_reason: FinishReason | None = None
    #: Its last token is what ended it, and no part of the text.
    ended_by_token: bool = False
    #: Hidden states are wanted, and no answer. None: an answer.
    pooling: Pooling | None = None

    @property
    def needs_whole_prompt(self) -> bool:
        """Something is wanted of every token of the prompt, so cached ones are of no use."""
        return self.pooling == "mean" or self.sampling.prompt_logprobs is not None

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_ids)
        self.most_tokens = len(self.prompt_ids) + self.sampling.max_tokens
        self.draws = self.pooling is None and self.sampling.max_tokens > 0

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - len(self.prompt_ids)

    def take(self, token_id: int, eos_token_ids: frozenset[int]) -> None:
        """Add a token that was drawn, and find out whether the answer ends with it."""
        self.token_ids.append(token_id)
        # Most tokens are neither.
        named = token_id in eos_token_ids or token_id in self.sampling.stop_token_ids
        if named and self._is_end(token_id):
            self.finish_reason = FinishReason.STOP
            self.ended_by_token = True
        elif self.guide is not None and self.guide.take(token_id):
            self.finish_reason = FinishReason.STOP
        elif len(self.token_ids) >= self.most_tokens:
            self.finish_reason = FinishReason.LENGTH

    def _is_end(self, token_id: int) -> bool:
        """Whether a token that ends answers ends this one."""
        if self.num_output < self.sampling.min_tokens:
            return False
        if self.guide is not None and not self.guide.may_end:
            return False
        return not self.sampling.ignore_eos or token_id in self.sampling.stop_token_ids
