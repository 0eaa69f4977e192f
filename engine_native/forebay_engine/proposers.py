"""The speculation that the configuration asks for."""

from __future__ import annotations

from typing import Protocol

from forebay_engine.acceptance import Acceptance
from forebay_engine.config import EngineConfig
from forebay_engine.costs import StepCosts
from forebay_engine.errors import StartRefused
from forebay_engine.prompt_lookup import PromptLookup
from forebay_engine.speculation import DraftSpeculation, ImmediateSpeculation, Limits, Speculation


class Guessable(Protocol):
    """What must be known of a loaded model to guess its tokens."""

    eos_token_ids: frozenset[int]
    step_costs: StepCosts
    #: Of a guess of the draft model, by rows; None: there is none.
    draft_costs: StepCosts | None


def settle_speculation(config: EngineConfig, model: Guessable) -> Speculation | None:
    """None: nothing is guessed.

    :raises StartRefused: there is nothing to guess.
    """
    if config.speculation == "none":
        return None
    if config.speculation_tokens < 1:
        raise StartRefused(
            f"speculation_tokens is {config.speculation_tokens}; it must be at least 1 "
            "(speculation: none switches it off)"
        )
    limits = Limits(config.speculation_tokens, model.eos_token_ids)
    acceptance = Acceptance(model.step_costs, model.draft_costs)
    if config.draft_model is None:
        return ImmediateSpeculation(PromptLookup(), acceptance, limits)
    return DraftSpeculation(acceptance, limits, config.block_size)
