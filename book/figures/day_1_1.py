"""The figures of day 1.1: attention with three tokens, all numbers, and the rows of a causal mask."""

import math
from collections.abc import Callable, Sequence

from .blocks import legend
from .drawing import Drawing

TOKENS = ("Anna", "paints", "herself")
Q = ((0, 1, 0, 0), (1, 0, 0, 0), (1, 0, 0, 1))
K = ((2, 0, 0, 2), (0, 2, 0, 0), (0, 0, 2, 2))
V = ((8, 0, 0, 4), (0, 8, 0, 0), (0, 0, 8, 4))
SCALE = 0.5
MASKED = "\N{MINUS SIGN}inf"
Row = Sequence[float]


def _matrix(
    drawing: Drawing, x: float, y: float, rows: Sequence[Sequence[str]], style: str, width: float
) -> None:
    """Draw a matrix of texts; a masked score or an empty text is a dashed cell."""
    for line, row in enumerate(rows):
        for place, text in enumerate(row):
            hue = "free" if text in ("", MASKED) else style
            drawing.cell(x + place * (width + 2), y + line * 30, width, 28, hue, text)


def _names(drawing: Drawing, y: float) -> None:
    for line, name in enumerate(TOKENS):
        drawing.label(84, y + line * 30 + 19, name, "small", "end")


def _weights() -> list[list[float]]:
    """The weights of each query, 0 for later tokens."""
    rows = []
    for place, query in enumerate(Q):
        scores = [SCALE * sum(a * b for a, b in zip(query, key, strict=True)) for key in K[: place + 1]]
        total = sum(math.exp(score) for score in scores)
        rows.append([*(math.exp(score) / total for score in scores), *[0.0] * (len(K) - place - 1)])
    return rows


def _attention() -> Drawing:
    """Three tokens: q, k and v, the scores with the mask, the weights, and the outputs."""
    weights = _weights()
    outputs = [[sum(w * v[i] for w, v in zip(row, V, strict=True)) for i in range(4)] for row in weights]
    drawing = Drawing(
        680,
        318,
        "Attention with three tokens",
        "The query of herself scores 2, 0 and 1 with the keys of Anna, paints and herself. The weights are "
        "0.67, 0.09 and 0.24. The output is 5.32, 0.72, 1.96, 3.64.",
    )
    _names(drawing, 40)
    for left, title, rows, hue in (
        (96, "queries", Q, "blue"),
        (300, "keys", K, "orange"),
        (504, "values", V, "green"),
    ):
        drawing.label(left, 26, title, "head")
        _matrix(drawing, left, 40, [[f"{one}" for one in row] for row in rows], hue, 36)
    drawing.arrow([(172, 132), (172, 170)])
    drawing.line((376, 132), (376, 146))
    drawing.line((376, 146), (172, 146))
    drawing.arrow([(580, 132), (580, 170)])
    _names(drawing, 204)
    scores = [
        [
            f"{SCALE * sum(a * b for a, b in zip(query, key, strict=True)):g}" if place <= line else MASKED
            for place, key in enumerate(K)
        ]
        for line, query in enumerate(Q)
    ]
    drawing.label(96, 190, "scores: q \N{DOT OPERATOR} k / 2 + mask", "head")
    _matrix(drawing, 96, 204, scores, "violet", 46)
    drawing.arrow([(246, 248), (290, 248)])
    drawing.label(268, 240, "softmax", "note", "middle")
    drawing.label(300, 190, "weights", "head")
    _matrix(
        drawing, 300, 204, [[f"{one:.2f}" if one else "0" for one in row] for row in weights], "violet", 46
    )
    drawing.arrow([(450, 248), (478, 248)])
    drawing.label(484, 190, "outputs", "head")
    _matrix(
        drawing, 484, 204, [[f"{one:.2f}" if one else "0" for one in row] for row in outputs], "green", 44
    )
    drawing.label(96, 310, "columns: Anna, paints, herself", "small")
    drawing.label(300, 310, "each row sums to 1", "small")
    drawing.label(484, 310, "weights \N{DOT OPERATOR} values", "small")
    return drawing


def _mask() -> Drawing:
    """The mask for the last two of five tokens, and the mask whose rows are counted from the first token."""
    drawing = Drawing(
        680,
        204,
        "The causal mask for the last two of five tokens",
        "Rows are the queries at positions 3 and 4, columns the keys at positions 0 to 4. Row 3 has four "
        "zeros and one -inf, row 4 five zeros. With rows that are counted from the first token, position 3 "
        "would see only position 0.",
    )
    cases = (
        (16, "causal_mask(2, 5)", (3, 4), "teal"),
        (364, "counted from the first token: wrong", (0, 1), "rose"),
    )
    for left, title, last_seen, hue in cases:
        drawing.label(left, 24, title, "head")
        drawing.label(left, 56, "query at", "small")
        for column in range(5):
            drawing.label(left + 92 + column * 46, 56, f"key {column}", "note", "middle")
        for line, last in enumerate(last_seen):
            y = 66 + line * 36
            drawing.label(left, y + 20, f"position {3 + line}", "small")
            for column in range(5):
                seen = column <= last
                drawing.cell(
                    left + 70 + column * 46, y, 44, 30, hue if seen else "free", "0" if seen else MASKED
                )
    legend(drawing, 86, 166, {"teal": "seen", "free": "not seen"})
    drawing.label(434, 166, "earlier tokens are hidden", "small")
    drawing.label(
        16,
        194,
        "Row i belongs to position total \N{MINUS SIGN} length + i, here 5 \N{MINUS SIGN} 2 + i.",
        "small",
    )
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {"attention": _attention, "mask": _mask}
