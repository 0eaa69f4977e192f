"""A runner that computes each step as late as one can: when its result is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from forebay_engine.sequence import SamplingParams
from forebay_engine.step import Row, StepPlan, StepResult


class LateRunner:
    """Runs ahead around a runner that does not; what a step needs of its rows is copied first."""

    runs_ahead = True

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        #: Tokens that the step executed last drew.
        self._drawn: dict[int, int] = {}
        #: Rows that were run behind a token which nobody knew when they were planned.
        self.unknown = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def takes_unknown(self, sampling: SamplingParams) -> bool:
        return not sampling.bad_words

    def launch(self, plan: StepPlan) -> Late:
        rows = tuple(copied(row) for row in plan.rows)
        return Late(lambda: self.compute(rows))

    def compute(self, rows: tuple[Row, ...]) -> StepResult:
        result = self.execute(StepPlan(tuple(self._known(row) for row in rows)))
        self._drawn = {item.seq_id: item.token_id for item in result.sampled}
        return result

    def execute(self, plan: StepPlan) -> StepResult:
        found: StepResult = self._runner.execute(plan)
        return found

    def _known(self, row: Row) -> Row:
        if not row.unknown:
            return row
        assert (row.start, row.count) == (len(row.token_ids), 1)
        assert row.guide is None
        assert self.takes_unknown(row.sampling)
        self.unknown += 1
        token = max(0, self._drawn[row.seq_id])
        return structs.replace(row, token_ids=[*row.token_ids, token], unknown=0)


@dataclass
class Late:
    result: Callable[[], StepResult]


def copied(row: Row) -> Row:
    tables = tuple(list(table) for table in row.block_tables)
    return structs.replace(row, token_ids=list(row.token_ids), block_tables=tables)
