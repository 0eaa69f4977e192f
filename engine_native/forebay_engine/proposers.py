"""Which proposer the configuration asks for."""

from __future__ import annotations

from forebay_engine.config import EngineConfig
from forebay_engine.costs import StepCosts
from forebay_engine.errors import StartRefused
from forebay_engine.prompt_lookup import PromptLookup
from forebay_engine.speculation import Speculation


def settle_speculation(
    config: EngineConfig, costs: StepCosts, eos_token_ids: frozenset[int]
) -> Speculation | None:
    """None: nothing is guessed.

    :raises StartRefused: there is no such way to guess.
    """
    if config.speculation == "none":
        return None
    if config.speculation != "ngram":
        raise StartRefused(f"speculation is {config.speculation!r}; it must be none or ngram")
    if config.speculation_tokens < 1:
        raise StartRefused(
            f"speculation_tokens is {config.speculation_tokens}; it must be at least 1 "
            "(speculation: none switches it off)"
        )
    return Speculation(PromptLookup(), costs, config.speculation_tokens, eos_token_ids)
