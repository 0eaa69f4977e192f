"""The engine's real process around a runner without a model: the prompt, repeated, is its answer.

Run as a program in place of ``python -m forebay_engine.process``. ``FAKE_ENGINE`` in the
environment chooses how it behaves; everything but the runner is the engine's own code.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable

import numpy as np

from forebay_engine.cache import CacheGroup
from forebay_engine.config import EngineConfig
from forebay_engine.costs import StepCosts
from forebay_engine.guided import is_allowed
from forebay_engine.process import main
from forebay_engine.step import Guide, Pooled, PromptToken, Row, Sampled, StepPlan, StepResult

EOS = 1


class EchoRunner:
    """Token ``k`` of the answer is token ``k`` of the prompt; seconds ``pause`` a step."""

    vocab_size = 261
    max_model_len = 4096
    generates = True
    eos_token_ids = frozenset({EOS})
    step_costs = StepCosts((1,), (1.0,))
    draft_costs = None
    runs_ahead = False

    def __init__(self, config: EngineConfig, progress: Callable[[float], None]) -> None:
        self.block_size = config.block_size
        self.cache_groups = (CacheGroup(config.num_blocks or 64),)
        self.max_model_len = config.max_model_len or self.max_model_len
        self.mode = os.environ.get("FAKE_ENGINE", "")
        self.drawn = 0
        progress(0.4)
        if self.mode == "loading":
            time.sleep(600)

    def warm_up(self) -> None:
        pass

    def execute(self, plan: StepPlan) -> StepResult:
        if self.mode == "fails":
            raise ArithmeticError("nothing works")
        if not gc.isenabled():
            raise AssertionError("garbage of requests would never be collected")
        if self.mode == "slow":
            time.sleep(0.02)
        if self.mode == "dies" and self.drawn == 10:
            # After what was sent has gone out.
            time.sleep(0.2)
            os._exit(1)
        sampled = tuple(self.echo(row) for row in plan.rows if row.sample)
        self.drawn += len(sampled)
        # Of each text, how many tokens it has, beside a 1.
        pooled = tuple(
            Pooled(row.seq_id, row.start, np.array([row.count, 1], np.float32))
            for row in plan.rows
            if row.pooling
        )
        scored = tuple(
            PromptToken(row.seq_id, at, row.token_ids[at], -at, 1, ((row.token_ids[at], -at),))
            for row in plan.rows
            if row.sampling.prompt_logprobs is not None
            for at in range(row.start + 1, min(row.start + row.count + 1, row.num_prompt))
        )
        return StepResult(sampled, pooled, prompt=scored)

    def echo(self, row: Row) -> Sampled:
        token = row.token_ids[(len(row.token_ids) - row.num_prompt) % row.num_prompt]
        if row.guide is not None:
            token = guided(row.guide, token)
        if row.sampling.logprobs is None:
            return Sampled(row.seq_id, token)
        top = ((token, -0.25), (token + 1, -2.5))[: row.sampling.logprobs]
        return Sampled(row.seq_id, token, -0.25, top)


def guided(guide: Guide, token: int) -> int:
    """The token, or the first one that the guide allows in its place."""
    (mask,) = guide.masks(())
    if is_allowed(mask, token):
        return token
    return next(other for other in range(EchoRunner.vocab_size) if is_allowed(mask, other))


if __name__ == "__main__":
    main(EchoRunner)
