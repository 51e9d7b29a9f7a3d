"""Draws the picture of a lab as a line chart: predicted lines are dashed, measured ones have dots.

A picture is the `picture` of a lab's JSON: title, axes and lines (labs/result.py, `Picture`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .drawing import Drawing
from .palette import HUES

WIDTH, HEIGHT = 660, 380
LEFT, RIGHT, TOP, BOTTOM = 78, 18, 24, 84  # margins of the plot area
TICKS = 5


class Axis(NamedTuple):
    """Maps the values low..high to the pixels start..stop. base: of a logarithmic axis, otherwise None."""

    low: float
    high: float
    start: float
    stop: float
    base: int | None
    is_share: bool

    def place(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = (self._scaled(one) for one in (self.low, self.high, value))
        return self.start + (self.stop - self.start) * (value - low) / ((high - low) or 1)

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.base else value

    def ticks(self) -> list[float]:
        """Round values within the axis."""
        if self.base:
            first, last = (math.log(one, self.base) for one in (self.low, self.high))
            powers = range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)
            stride = -(-len(powers) // (TICKS + 2)) or 1
            return [float(self.base) ** power for power in powers[::stride]]
        step = _round_step((self.high - self.low) / TICKS)
        first_tick = math.ceil(self.low / step - 1e-9)
        return [step * place for place in range(first_tick, math.floor(self.high / step + 1e-9) + 1)]

    def text(self, value: float) -> str:
        """A tick's label."""
        if self.is_share:
            return f"{value:.0%}"
        return f"{value:,.0f}" if value >= 10 or value == round(value) else f"{value:.3g}"


def svg(picture: Mapping[str, Any]) -> str:
    """The chart as an element for a page."""
    drawing = Drawing(WIDTH, HEIGHT, picture["title"], _description(picture))
    x = _axis(picture, "x", 0, LEFT, WIDTH - RIGHT)
    y = _axis(picture, "y", 1, HEIGHT - BOTTOM, TOP)
    for tick in y.ticks():
        drawing.line((LEFT, y.place(tick)), (WIDTH - RIGHT, y.place(tick)), "grid")
        drawing.label(LEFT - 8, y.place(tick) + 4, y.text(tick), "small", "end")
    for tick in x.ticks():
        drawing.line((x.place(tick), HEIGHT - BOTTOM), (x.place(tick), HEIGHT - BOTTOM + 5))
        drawing.label(x.place(tick), HEIGHT - BOTTOM + 20, x.text(tick), "small", "middle")
    drawing.label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM + 40, picture["x"], "small", "middle")
    drawing.label(LEFT - 60, TOP - 10, picture["y"], "small")
    names = list(dict.fromkeys(line["name"] for line in picture["lines"]))
    for line in picture["lines"]:
        hue = _hue(names.index(line["name"]))
        drawing.curve([(x.place(a), y.place(b)) for a, b in line["points"]], hue, line["is_predicted"])
    _legend(drawing, picture["lines"], names)
    return drawing.inline()


def _axis(picture: Mapping[str, Any], name: str, place: int, start: float, stop: float) -> Axis:
    values = [point[place] for line in picture["lines"] for point in line["points"]]
    base, is_share = picture[f"{name}_base"], picture[f"{name}_is_share"]
    low, high = min(values), max(values)
    if is_share:
        low, high = 0.0, 1.0
    elif not base and name == "y":
        low = min(0.0, low)
    if not is_share and high == low:
        high = low + 1
    return Axis(low, high, start, stop, base, is_share)


def _legend(drawing: Drawing, lines: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Write each line's name in a row below the chart; a predicted line has a dashed sample."""
    x = float(LEFT)
    y = HEIGHT - 24.0
    for line in lines:
        text = f"{line['name']}, predicted" if line["is_predicted"] else line["name"]
        if x + 30 + 7 * len(text) > WIDTH and x > LEFT:
            x, y = float(LEFT), y + 16
        drawing.curve([(x, y - 4), (x + 22, y - 4)], _hue(names.index(line["name"])), line["is_predicted"])
        drawing.label(x + 28, y, text, "small")
        x += 46 + 6.6 * len(text)


def _hue(place: int) -> str:
    return list(HUES)[place % len(HUES)]


def _round_step(step: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _description(picture: Mapping[str, Any]) -> str:
    """The chart in words: its axes, and the ends of each line."""
    ends = []
    for line in picture["lines"]:
        (x1, y1), (x2, y2) = line["points"][0], line["points"][-1]
        kind = "predicted" if line["is_predicted"] else "measured"
        ends.append(f"{line['name']} ({kind}): from {y1:.4g} at {x1:g} to {y2:.4g} at {x2:g}.")
    return f"{picture['y']} against {picture['x']}. {' '.join(ends)}"
