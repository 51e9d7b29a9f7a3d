"""Draw a figure as SVG text: boxes, cells, arrows and labels, readable on light and dark backgrounds.

`svg` gives a file that paints its own background and follows the viewer's colour scheme
(`prefers-color-scheme`). `inline` gives an element for a page of the book, whose style sheet has the colours.
The viewer chooses the fonts, so labels leave a tenth of the width free. This module does not know any figure.
"""

from collections.abc import Iterable, Sequence
from html import escape
from zlib import crc32

from .palette import Palette, palettes

Point = tuple[float, float]

FONT = "font-family: system-ui, 'DejaVu Sans', sans-serif"
MONO = "font-family: ui-monospace, 'DejaVu Sans Mono', monospace"
LINE_HEIGHT = 17


class Drawing:
    """A figure of a given size in pixels; later marks are drawn over earlier ones."""

    def __init__(self, width: int, height: int, title: str, description: str) -> None:
        self._size = (width, height)
        self._head = f"head-{crc32(f'{title}{description}'.encode()):08x}"  # the arrowhead's id within a page
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
        """Draw a line of text on the baseline y. kind: "name", "text", "small", "note", "chip" or "head"."""
        self._marks.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def chip(self, x: float, y: float, width: float, style: str, text: str) -> None:
        """Draw a small tinted label, 20 pixels high."""
        self._marks.append(f'<g class="{style}">')
        self._marks.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="20" rx="5"/>')
        self.label(x + width / 2, y + 14, text, "chip", "middle")
        self._marks.append("</g>")

    def cell(
        self, x: float, y: float, width: float, height: float, style: str, text: str = "", note: str = ""
    ) -> None:
        """Draw a small box, such as a block or a token, with centred text and a smaller note below it.

        style: a hue, "panel", "zone", or "free" for an empty one. Two hues ("blue orange") draw a box that
        two sequences share, split from corner to corner.
        """
        first, *others = style.split()
        self._marks.append(f'<g class="{first} cell">')
        self._marks.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4"/>')
        if text:
            self.label(x + width / 2, y + height / 2 + (-1 if note else 4.5), text, "chip", "middle")
        if note:
            self.label(x + width / 2, y + height / 2 + 12, note, "note", "middle")
        self._marks.append("</g>")
        for place, other in enumerate(others):
            self._corner(x, y, width, height, other, place, len(others))

    def _corner(
        self, x: float, y: float, width: float, height: float, style: str, place: int, count: int
    ) -> None:
        """Draw a stripe in a second hue along the bottom of a cell, its part `place` of `count`."""
        part = width / count
        self._marks.append(
            f'<g class="{style} stripe"><rect x="{x + place * part:g}" y="{y + height - 6:g}" '
            f'width="{part:g}" height="6" rx="2"/></g>'
        )

    def line(self, start: Point, end: Point, kind: str = "arrow") -> None:
        """Draw a straight line without an arrowhead. kind: "arrow", or "grid" for faint lines of a chart."""
        path = f"M{start[0]:g} {start[1]:g} L{end[0]:g} {end[1]:g}"
        self._marks.append(f'<path class="{kind}" d="{path}"/>')

    def ring(self, x: float, y: float, radius: float) -> None:
        """Draw a faint circle around a centre, such as the edge of a dial."""
        self._marks.append(f'<circle class="ring" cx="{x:g}" cy="{y:g}" r="{radius:g}"/>')

    def curve(self, points: Sequence[Point], style: str, dashed: bool = False, has_dots: bool = True) -> None:
        """Draw a thick line of a chart through points, in a hue, with a dot at each point unless dashed."""
        path = " ".join(f"{'L' if place else 'M'}{x:.1f} {y:.1f}" for place, (x, y) in enumerate(points))
        self._marks.append(f'<g class="{style} curve{" dashed" if dashed else ""}"><path d="{path}"/>')
        if has_dots and not dashed:
            self._marks += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
        self._marks.append("</g>")

    def arrow(self, points: Iterable[Point], dashed: bool = False) -> None:
        """Draw a line through points with an arrowhead at the last one."""
        first, *rest = [f"{x:g} {y:g}" for x, y in points]
        path = f"M{first} " + " ".join(f"L{point}" for point in rest)
        kind = "arrow dashed" if dashed else "arrow"
        self._marks.append(f'<path class="{kind}" d="{path}" marker-end="url(#{self._head})"/>')

    def svg(self) -> str:
        """Return the whole SVG file."""
        opening = self._opening('xmlns="http://www.w3.org/2000/svg"')
        parts = [opening, *self._heading, _style(), '<rect class="paper" width="100%" height="100%"/>']
        return "\n".join([*parts, *self._body(), "</svg>"]) + "\n"

    def inline(self) -> str:
        """Return an element for an HTML page, without colours or fonts, and without empty lines."""
        return "\n".join([self._opening('class="figure"'), *self._heading, *self._body(), "</svg>"])

    def _opening(self, attributes: str) -> str:
        width, height = self._size
        return (
            f'<svg {attributes} role="img" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        )

    def _body(self) -> list[str]:
        head = (
            f'<defs><marker id="{self._head}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
            'markerHeight="8" orient="auto"><path class="head-shape" d="M0 0 L8 4 L0 8 z"/></marker></defs>'
        )
        return [head, *self._marks]


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
        ".grid { stroke-width: 1 }",
        ".ring { fill: none }",
        ".dashed { stroke-dasharray: 5 4 }",
        ".free > rect { stroke-dasharray: 3 3 }",
        ".stripe > rect { stroke: none }",
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
        f".free > rect {{ fill: {plain['cell']}; stroke: {plain['cell-line']} }}",
        f"text {{ fill: {plain['ink']} }}",
        f".small {{ fill: {plain['soft']} }}",
        f".arrow {{ stroke: {plain['soft']} }}",
        f".grid, .ring {{ stroke: {plain['line']} }}",
        f".head-shape {{ fill: {plain['soft']} }}",
    ]
    for name, tint in palette.tints.items():
        rules.append(f".{name} > rect {{ fill: {tint.fill}; stroke: {tint.edge} }}")
        rules.append(f".{name} > text {{ fill: {tint.ink} }}")
        rules.append(f".{name}.stripe > rect {{ fill: {tint.edge} }}")
    return rules
