"""A line chart as SVG, without a library: axes from zero, round ticks, names at the lines' ends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from msgspec import Struct

__all__ = ["Chart", "Series", "ticks"]

_WIDTH, _HEIGHT = 760, 430
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 170, 48, 56
#: Told apart by those who see colours differently too (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_FONT = "font-family='system-ui, sans-serif'"


class Series(Struct, frozen=True):
    name: str
    points: Sequence[tuple[float, float]]
    #: Dots for what was measured, a line for what was computed.
    dots: bool = False


class Chart(Struct, frozen=True):
    title: str
    x: str
    y: str
    series: Sequence[Series]

    def svg(self) -> str:
        rows = "\n".join(self._elements())
        return (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {_HEIGHT}' "
            f"{_FONT} font-size='13'>\n<title>{escape(self.title)}</title>\n"
            f"<rect width='{_WIDTH}' height='{_HEIGHT}' fill='white'/>\n{rows}\n</svg>\n"
        )

    def _elements(self) -> Iterator[str]:
        points = [point for line in self.series for point in line.points]
        across, up = ticks(max(x for x, _ in points)), ticks(max(y for _, y in points))
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

        def at(x: float, y: float) -> tuple[float, float]:
            return (
                round(_LEFT + x / across[-1] * (right - _LEFT), 1),
                round(bottom - y / up[-1] * (bottom - _TOP), 1),
            )

        yield _text(_LEFT, 26, self.title, "start", " font-size='16' font-weight='600'")
        for value in up:
            _, height = at(0, value)
            yield f"<line x1='{_LEFT}' y1='{height}' x2='{right}' y2='{height}' stroke='#ddd'/>"
            yield _text(_LEFT - 8, height + 4, f"{value:,g}", "end")
        for value in across:
            yield _text(at(value, 0)[0], bottom + 20, f"{value:,g}", "middle")
        yield _text((_LEFT + right) / 2, _HEIGHT - 12, self.x, "middle")
        middle = (_TOP + bottom) / 2
        yield _text(20, middle, self.y, "middle", f" transform='rotate(-90 20 {middle})'")
        ends = _spread([at(*line.points[-1])[1] for line in self.series])
        for number, (line, end) in enumerate(zip(self.series, ends, strict=True)):
            colour = _COLOURS[number % len(_COLOURS)]
            placed = [at(*point) for point in line.points]
            yield from _dots(placed, colour) if line.dots else _line(placed, colour)
            yield _text(right + 10, end + 4, line.name, "start", f" fill='{colour}'")


def ticks(most: float) -> list[float]:
    """Four to eight round values from 0 to ``most`` or a little beyond."""
    if most <= 0:
        return [0.0, 1.0]
    raw = most / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * power for unit in (1, 2, 2.5, 5, 10) if unit * power >= raw * 0.999999)
    return [round(i * step, 10) for i in range(math.ceil(most / step - 1e-9) + 1)]


def _spread(heights: Sequence[float], least: float = 17) -> list[float]:
    """The same heights, moved apart so that names don't overlap."""
    placed: dict[int, float] = {}
    previous = -math.inf
    for index in sorted(range(len(heights)), key=lambda i: heights[i]):
        previous = max(heights[index], previous + least)
        placed[index] = previous
    return [placed[index] for index in range(len(heights))]


def _line(points: Sequence[tuple[float, float]], colour: str) -> Iterator[str]:
    path = " ".join(f"{x},{y}" for x, y in points)
    yield f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2.5'/>"


def _dots(points: Sequence[tuple[float, float]], colour: str) -> Iterator[str]:
    for x, y in points:
        yield f"<circle cx='{x}' cy='{y}' r='4.5' fill='{colour}'/>"


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f"<text x='{x}' y='{y}' text-anchor='{anchor}'{more}>{escape(text)}</text>"
