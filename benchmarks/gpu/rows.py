"""A line of the benchmark's table."""

from __future__ import annotations

from typing import Any

from msgspec import Struct, convert, to_builtins


class Row(Struct, frozen=True):
    """One figure; ``least``: less is better."""

    name: str
    #: None: there is none, and ``note`` says why.
    value: float | None
    unit: str
    #: What the ceilings allow; None: not said.
    bound: float | None = None
    #: In the unit; 0 or None: none.
    goal: float | None = None
    least: bool = False
    #: What else is to be known, such as how far the result is from the reference's.
    note: str = ""

    @property
    def reached(self) -> bool | None:
        if not self.goal or self.value is None:
            return None
        return self.value <= self.goal if self.least else self.value >= self.goal

    def line(self) -> str:
        """As a line of Markdown."""
        value = "–" if self.value is None else f"{self.value:,.4g} {self.unit}"
        share = f"{100 * self.value / self.bound:.0f} %" if self.value and self.bound else "–"
        goal = f"{self.goal:,.4g}" if self.goal else "–"
        verdict = {True: "reached", False: "**missed**", None: ""}[self.reached]
        return f"| {self.name} | {value} | {share} | {goal} | {verdict} | {self.note} |"


HEAD = "| what | measured | of the ceiling | goal | | note |\n|---|---|---|---|---|---|"


def encoded(rows: list[Row]) -> list[dict[str, Any]]:
    return [to_builtins(row) for row in rows]


def decoded(data: Any) -> list[Row]:
    return convert(data, list[Row])
