"""The figures of day 1.2: a pair that turns, which numbers form a pair, and scores by distance."""

import math
from collections.abc import Callable

from .blocks import legend
from .drawing import Drawing
from .stills import dial

PAIRS = ("blue", "orange", "green", "violet")
DEGREE = "\N{DEGREE SIGN}"


def _turn() -> Drawing:
    """A pair that turns by 30 degrees per position: key and query 2 apart, at three places."""
    drawing = Drawing(
        660,
        196,
        "A pair that turns by 30 degrees per position",
        "At positions 1 and 3 the key points to 30 degrees and the query to 90, at 4 and 6 to 120 and 180, "
        "at 9 and 11 to 270 and 330. The angle between them is 60 degrees each time.",
    )
    for place, key in enumerate((1, 4, 9)):
        x = 110 + place * 220
        drawing.label(x, 20, f"key at {key}, query at {key + 2}", "head", "middle")
        dial(drawing, x, 84, math.radians(30 * key), math.radians(30 * (key + 2)))
        drawing.label(
            x, 152, f"{30 * key}{DEGREE} and {30 * (key + 2)}{DEGREE}: 60{DEGREE} apart", "small", "middle"
        )
    legend(drawing, 16, 186, {"orange": "key", "blue": "query"})
    drawing.label(
        180, 186, f"each pair is (1, 0) at position 0; the dot product is cos 60{DEGREE} = 0.5", "small"
    )
    return drawing


def _pairs() -> Drawing:
    """A head of eight numbers: pairs half a head apart, and pairs of neighbours."""
    drawing = Drawing(
        660,
        196,
        "Which numbers form a pair",
        "In Hugging Face's layout the pairs of a head of 8 are 0 and 4, 1 and 5, 2 and 6, 3 and 7. In the "
        "interleaved layout they are 0 and 1, 2 and 3, 4 and 5, 6 and 7.",
    )
    rows = (
        ("half a head apart: Hugging Face, and today", (0, 1, 2, 3, 0, 1, 2, 3)),
        ("neighbours (interleaved): RoFormer, many GGUF files", (0, 0, 1, 1, 2, 2, 3, 3)),
    )
    for row, (title, pairs) in enumerate(rows):
        y = 36 + row * 76
        drawing.label(16, y - 12, title, "head")
        for index, pair in enumerate(pairs):
            drawing.cell(16 + index * 66, y, 62, 34, PAIRS[pair], f"x[{index}]")
    legend(drawing, 16, 182, {hue: f"pair {pair}" for pair, hue in enumerate(PAIRS)})
    return drawing


def _distance() -> Drawing:
    """What pairs add to the score by distance, for heads of 64 with base 100,000."""
    width, height, left, top = 660, 320, 64, 22
    frequencies = [100_000 ** (-2 * pair / 64) for pair in range(32)]
    drawing = Drawing(
        width,
        height,
        "Scores by distance",
        "The first pair repeats every 6.3 tokens. Pair 8 repeats every 112 tokens. The last pair hardly "
        "changes. The mean of all 32 pairs is 1 at distance 0, falls quickly, and then slowly.",
    )
    bottom, right = height - 76, width - 20

    def x_of(distance: float) -> float:
        return left + (right - left) * distance / 64

    def y_of(value: float) -> float:
        return top + (bottom - top) * (1 - value) / 2

    for value in (-1, 0, 1):
        drawing.line((left, y_of(value)), (right, y_of(value)), "grid")
        text = f"{value}".replace("-", "\N{MINUS SIGN}")
        drawing.label(left - 8, y_of(value) + 4, text, "small", "end")
    for distance in range(0, 65, 16):
        drawing.line((x_of(distance), bottom), (x_of(distance), bottom + 5))
        drawing.label(x_of(distance), bottom + 20, f"{distance}", "small", "middle")
    drawing.label((left + right) / 2, bottom + 38, "distance in tokens", "small", "middle")
    places = [place / 4 for place in range(64 * 4 + 1)]
    for hue, chosen in (
        ("orange", frequencies[:1]),
        ("green", frequencies[8:9]),
        ("violet", frequencies[-1:]),
        ("blue", frequencies),
    ):
        points = [
            (x_of(place), y_of(sum(math.cos(place * one) for one in chosen) / len(chosen)))
            for place in places
        ]
        drawing.curve(points, hue, has_dots=False)
    legend(
        drawing,
        left,
        height - 12,
        {"orange": "pair 0", "green": "pair 8", "violet": "pair 31", "blue": "mean of all 32 pairs"},
    )
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {"turn": _turn, "pairs": _pairs, "distance": _distance}
