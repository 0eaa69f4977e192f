"""A line of the benchmark's table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
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


def failed(name: str, why: str) -> Row:
    """What there is no figure of."""
    return Row(name, None, "", note=f"**{why[:200]}**")
