"""Draw a figure as SVG text: boxes, arrows and labels, readable on light and dark backgrounds.

A figure paints its own background and follows the viewer's colour scheme (`prefers-color-scheme`). The viewer
chooses the fonts, so labels leave a tenth of the width free. This module does not know any figure.
"""

from collections.abc import Iterable, Sequence
from html import escape

from palette import Palette, palettes

Point = tuple[float, float]

FONT = "font-family: system-ui, 'DejaVu Sans', sans-serif"
MONO = "font-family: ui-monospace, 'DejaVu Sans Mono', monospace"
LINE_HEIGHT = 17


class Drawing:
    """A figure of a given size in pixels; later marks are drawn over earlier ones."""

    def __init__(self, width: int, height: int, title: str, description: str) -> None:
        self._size = (width, height)
        self._heading = [f"<title>{escape(title)}</title>", f"<desc>{escape(description)}</desc>"]
        self._marks: list[str] = []

    def box(
        self, x: float, y: float, width: float, height: float, style: str = "panel", lines: Sequence[str] = ()
    ) -> None:
        """Draw a box with left-aligned text: a title in a fixed-width font, then plain lines.

        style: a hue of the palette, or "panel", or "zone" for an area that contains other boxes.
        """
        self._marks.append(f'<g class="{style}">')
        self._marks.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8"/>')
        for row, line in enumerate(lines):
            kind = "name" if row == 0 else "text"
            self.label(x + 14, y + 23 + row * LINE_HEIGHT, line, kind)
        self._marks.append("</g>")

    def label(self, x: float, y: float, text: str, kind: str = "text", anchor: str = "start") -> None:
        """Draw one line of text on the baseline y. kind: "name", "text", "small" or "head"."""
        self._marks.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def chip(self, x: float, y: float, width: float, style: str, text: str) -> None:
        """Draw a small tinted label, 20 pixels high."""
        self._marks.append(f'<g class="{style}">')
        self._marks.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="20" rx="5"/>')
        self.label(x + width / 2, y + 14, text, "chip", "middle")
        self._marks.append("</g>")

    def arrow(self, points: Iterable[Point], dashed: bool = False) -> None:
        """Draw a line through points with an arrowhead at the last one."""
        first, *rest = [f"{x:g} {y:g}" for x, y in points]
        path = f"M{first} " + " ".join(f"L{point}" for point in rest)
        kind = "arrow dashed" if dashed else "arrow"
        self._marks.append(f'<path class="{kind}" d="{path}" marker-end="url(#head)"/>')

    def svg(self) -> str:
        """Return the whole SVG file."""
        width, height = self._size
        opening = (
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}">'
        )
        parts = [opening, *self._heading, _style(), _HEAD, '<rect class="paper" width="100%" height="100%"/>']
        return "\n".join([*parts, *self._marks, "</svg>"]) + "\n"


_HEAD = (
    '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
    'orient="auto"><path class="head-shape" d="M0 0 L8 4 L0 8 z"/></marker></defs>'
)


def _style() -> str:
    """The style element: shapes and fonts, then the light and the dark colours."""
    light, dark = palettes()
    shapes = [
        "rect { stroke-width: 1 }",
        ".paper { stroke: none }",
        f"text {{ {FONT}; font-size: 13px }}",
        f".name {{ {MONO}; font-size: 13.5px; font-weight: 700 }}",
        ".head { font-size: 14px; font-weight: 650 }",
        ".small { font-size: 12px }",
        f".chip {{ {MONO}; font-size: 11.5px }}",
        ".arrow { fill: none; stroke-width: 1.5 }",
        ".dashed { stroke-dasharray: 5 4 }",
    ]
    darker = ["@media (prefers-color-scheme: dark) {", *_colours(dark), "}"]
    return "\n".join(["<style>", *shapes, *_colours(light), *darker, "</style>"])


def _colours(palette: Palette) -> list[str]:
    """The CSS rules of one colour scheme."""
    plain = palette.plain
    rules = [
        f".paper {{ fill: {plain['paper']} }}",
        f".panel > rect {{ fill: {plain['panel']}; stroke: {plain['line']} }}",
        f".zone > rect {{ fill: {plain['track']}; stroke: {plain['line']} }}",
        f"text {{ fill: {plain['ink']} }}",
        f".small {{ fill: {plain['soft']} }}",
        f".arrow {{ stroke: {plain['soft']} }}",
        f".head-shape {{ fill: {plain['soft']} }}",
    ]
    for name, tint in palette.tints.items():
        rules.append(f".{name} > rect {{ fill: {tint.fill}; stroke: {tint.edge} }}")
        rules.append(f".{name} > text {{ fill: {tint.ink} }}")
    return rules
