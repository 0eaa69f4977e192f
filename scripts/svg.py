"""A drawing of boxes, lines and words, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

INK, FAINT = "#222", "#888"


class Drawing:
    """An SVG of rectangles, lines and texts."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._head = (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' "
            f"font-family='system-ui, sans-serif' font-size='13'>\n<title>{escape(title)}</title>\n"
            f"<rect width='{width}' height='{height}' fill='white'/>\n"
        )
        self._parts: list[str] = []
        self.text(20, 26, title, size=16, weight=600)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        *,
        stroke: str = "white",
        opacity: float = 1,
        dashed: bool = False,
    ) -> None:
        more = f" fill-opacity='{opacity}'" if opacity != 1 else ""
        more += " stroke-dasharray='3 2'" if dashed else ""
        self._parts.append(
            f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' fill='{fill}' "
            f"stroke='{stroke}'{more}/>"
        )

    def text(
        self,
        x: float,
        y: float,
        text: object,
        *,
        anchor: str = "start",
        size: int = 13,
        weight: int = 400,
        fill: str = INK,
    ) -> None:
        self._parts.append(
            f"<text x='{x:g}' y='{y:g}' text-anchor='{anchor}' font-size='{size}' "
            f"font-weight='{weight}' fill='{fill}'>{escape(str(text))}</text>"
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, *, dashed: bool = False) -> None:
        more = " stroke-dasharray='5 3'" if dashed else ""
        self._parts.append(
            f"<line x1='{x1:g}' y1='{y1:g}' x2='{x2:g}' y2='{y2:g}' stroke='{FAINT}'{more}/>"
        )

    def legend(self, x: float, y: float, entries: Sequence[tuple[str, str, bool]]) -> None:
        """Colour, words, and whether the box is a pale one."""
        for colour, words, pale in entries:
            self.box(x, y - 11, 14, 14, colour, stroke=FAINT, opacity=0.3 if pale else 1)
            self.text(x + 20, y, words, size=12)
            x += 34 + 6.6 * len(words)

    def svg(self) -> str:
        return self._head + "\n".join(self._parts) + "\n</svg>\n"
