"""The speculation that the configuration asks for."""

from __future__ import annotations

from forebay_engine.acceptance import Acceptance
from forebay_engine.config import EngineConfig
from forebay_engine.costs import StepCosts
from forebay_engine.errors import StartRefused
from forebay_engine.prompt_lookup import PromptLookup
from forebay_engine.speculation import DraftSpeculation, ImmediateSpeculation, Limits, Speculation


def settle_speculation(
    config: EngineConfig,
    costs: StepCosts,
    draft_costs: StepCosts | None,
    eos_token_ids: frozenset[int],
) -> Speculation | None:
    """None: nothing is guessed.

    :param draft_costs: of the draft model, where there is one.
    :raises StartRefused: there is nothing to guess.
    """
    if config.speculation == "none":
        return None
    if config.speculation_tokens < 1:
        raise StartRefused(
            f"speculation_tokens is {config.speculation_tokens}; it must be at least 1 "
            "(speculation: none switches it off)"
        )
    limits = Limits(config.speculation_tokens, eos_token_ids)
    acceptance = Acceptance(costs, draft_costs)
    if config.draft_model is None:
        return ImmediateSpeculation(PromptLookup(), acceptance, limits)
    return DraftSpeculation(acceptance, limits, config.block_size)
