"""The figures of day 2.4: a group of weights and its codes, bits in words, and the integer product."""

from collections.abc import Callable

from .blocks import legend
from .drawing import Drawing

WEIGHTS = (-0.70, -0.32, -0.06, 0.00, 0.14, 0.28, 0.51, 0.80)
BIAS, SCALE = -0.70, 0.10


def _group() -> Drawing:
    """Eight weights on a line with the 16 values that four bits can store."""
    drawing = Drawing(
        690,
        250,
        "A group of eight weights in four bits",
        "The 16 values from -0.7 to 0.8, in steps of 0.1, have the codes 0 to 15. The weights -0.70, -0.32, "
        "-0.06, 0.00, 0.14, 0.28, 0.51 and 0.80 get the codes 0, 4, 6, 7, 8, 10, 12 and 15.",
    )

    def place(value: float) -> float:
        return 40 + 610 * (value - BIAS) / (15 * SCALE)

    drawing.label(16, 24, "weights, and the nearest value that has a code", "small")
    codes = [round((weight - BIAS) / SCALE) for weight in WEIGHTS]
    drawing.line((place(BIAS), 96), (place(BIAS + 15 * SCALE), 96))
    for code in range(16):
        value = BIAS + code * SCALE
        drawing.line((place(value), 90), (place(value), 102))
        drawing.cell(place(value) - 16, 108, 32, 26, "blue" if code in codes else "free", str(code))
        drawing.label(place(value), 152, f"{value:.1f}".replace("-0.0", "0.0"), "small", "middle")
    for weight, code in zip(WEIGHTS, codes, strict=True):
        x, target = place(weight), place(BIAS + code * SCALE)
        drawing.cell(x - 5, 50, 10, 10, "orange")
        drawing.arrow([(x, 62), (target, 88)])
    drawing.label(16, 192, "one word, code 0 in the lowest bits:", "text")
    for position, code in enumerate(reversed(codes)):
        drawing.cell(270 + position * 46, 174, 42, 28, "blue", f"{code:04b}")
    legend(
        drawing,
        16,
        236,
        {"orange": "a weight", "blue": "a code that is used", "free": "a code that is not used"},
    )
    return drawing


def _bits() -> Drawing:
    """Numbers of 4 bits and of 3 bits in words of 32."""
    drawing = Drawing(
        690,
        262,
        "Numbers in words of 32 bits",
        "With 4 bits, eight numbers fill a word exactly. With 3 bits, number 10 has the bits 30, 31 and 32: "
        "two in word 0 and one in word 1.",
    )
    drawing.label(16, 24, "4 bits: eight numbers fill a word", "head")
    for number in range(8):
        hue = ("orange", "blue")[number % 2]
        drawing.cell(16 + number * 82, 48, 78, 30, hue, f"number {number}")
        drawing.label(16 + number * 82, 42, f"bit {4 * number}", "note")
    drawing.label(16, 118, "3 bits: number 10 is in two words", "head")
    for bit in range(24, 40):
        left = 16 + (bit - 24) * 38 + (24 if bit >= 32 else 0)
        number = bit // 3
        hue = "violet" if number == 10 else ("orange", "blue")[number % 2]
        drawing.label(left + 17, 142, str(bit), "note", "middle")
        drawing.cell(left, 148, 34, 30, hue, f"{number}")
    drawing.label(16, 202, "word 0, its last eight bits", "small")
    drawing.label(16 + 8 * 38 + 24, 202, "word 1, its first eight bits", "small")
    drawing.label(
        16,
        240,
        "each cell is a bit, and shows the number it belongs to; the lowest bit of a word is at the left",
        "small",
    )
    return drawing


def _product() -> Drawing:
    """One output for one row: integers within each group, floats from group to group."""
    drawing = Drawing(
        690,
        292,
        "One output of the integer matrix product",
        "In group 0 the codes 0, 4, 6, 15 and the integers 4, -2, 8, 1 give I = 55 and S = 11, and with the "
        "scales the float -0.55. Groups are added in order, starting with group 0.",
    )
    drawing.label(16, 24, "group 0: integers, exact in any order", "head")
    for row, (name, values, hue) in enumerate(
        (("codes q", (0, 4, 6, 15), "blue"), ("inputs x", (4, -2, 8, 1), "orange"))
    ):
        y = 38 + row * 36
        drawing.label(16, y + 20, name, "small")
        for position, value in enumerate(values):
            drawing.cell(90 + position * 50, y, 46, 30, hue, str(value))
    drawing.box(330, 36, 150, 70, "green", ["I = 55", "sum of q times x", "S = 11, sum of x"])
    drawing.arrow([(292, 70), (326, 70)])
    drawing.arrow([(484, 70), (518, 70)])
    drawing.box(522, 36, 152, 70, "violet", ["-0.55", "a (s I + b S)", "one float"])
    drawing.label(16, 152, "all groups of the row: floats, in one fixed order", "head")
    for position, name in enumerate(("group 0", "group 1", "group 2", "last group")):
        left = 16 + position * 140
        drawing.cell(left, 166, 112, 34, "violet", name)
        drawing.label(left + 56, 246, "+" if position else "0 +", "head", "middle")
        drawing.arrow([(left + 56, 204), (left + 56, 228)])
        if position < 3:
            drawing.arrow([(left + 76, 241), (left + 174, 241)], dashed=position == 2)
    drawing.arrow([(510, 241), (574, 241)])
    drawing.cell(580, 226, 94, 32, "teal", "output")
    drawing.label(16, 280, "the same order for every row, in every batch and every thread", "small")
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {"group": _group, "bits": _bits, "product": _product}
