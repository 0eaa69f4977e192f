"""Executing a step again so that a row that can't be executed takes no other along.

A step that fails is executed once more, then in halves, these again, until what fails is a single
row. That is sound because rows do not depend on each other within a step, and because each writes
its own slots of the cache only: what a failed try has left there is written again, or never read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from forebay_engine.step import StepPlan, StepResult

log = logging.getLogger("forebay_engine")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step came to."""

    #: Of the rows that were executed.
    result: StepResult
    #: Why a row could not be, by ``seq_id``.
    failed: dict[int, Exception]
    #: No row could.
    nothing: bool = False


def execute(run: Callable[[StepPlan], StepResult], plan: StepPlan) -> Outcome:
    """Execute all of the plan's rows that can be; ``2 n - 1`` tries if none of ``n`` can."""
    if not plan.rows:
        return Outcome(StepResult(()), {})
    try:
        return Outcome(run(plan), {})
    except Exception as error:
        if len(plan.rows) == 1:
            log.exception("sequence %d could not be computed", plan.rows[0].seq_id)
            return Outcome(StepResult(()), {plan.rows[0].seq_id: error}, nothing=True)
        log.warning("a step of %d rows failed, trying halves: %s", len(plan.rows), error)
    half = len(plan.rows) // 2
    first, second = (execute(run, StepPlan(rows)) for rows in (plan.rows[:half], plan.rows[half:]))
    one, other = first.result, second.result
    result = StepResult(
        one.sampled + other.sampled,
        one.pooled + other.pooled,
        one.guessed + other.guessed,
        one.prompt + other.prompt,
    )
    return Outcome(result, first.failed | second.failed, first.nothing and second.nothing)
