"""The figures of day 1.7: three filters on two distributions, a draw, and two sources of random numbers."""

from collections.abc import Callable, Sequence

from tiny_llm_ref.sampler import uniform

from .blocks import legend
from .drawing import Drawing

BAR, STEP, TALL = 40, 50, 130  # of a chart: a bar's width, the distance of two bars, and the height of 100%
CHARTS: Sequence[tuple[float, str, Sequence[float], Sequence[int]]] = (
    (96, "a clear answer", (0.8, 0.1, 0.05, 0.03, 0.02), (2, 1, 1)),
    (416, "many continuations", (0.3, 0.25, 0.2, 0.15, 0.1), (2, 5, 3)),
)
RULES = ("top_k: the first k", "min_p: at least p times the first", "top_p: until the sum is at least p")
FILTERS = (("top_k 2", "blue"), ("min_p 0.2", "orange"), ("top_p 0.7", "green"))


def _cuts() -> Drawing:
    """Two sorted distributions; each filter keeps some of the likeliest tokens."""
    drawing = Drawing(
        680,
        350,
        "Three filters cut a sorted list",
        "The first distribution has 80, 10, 5, 3 and 2 percent. top_k 2 keeps two tokens, min_p 0.2 and "
        "top_p 0.7 keep one. The second has 30, 25, 20, 15 and 10 percent. top_k 2 keeps two, min_p 0.2 "
        "keeps all five, top_p 0.7 keeps three.",
    )
    bottom = 38 + TALL
    for left, title, probabilities, kept in CHARTS:
        drawing.label(left, 22, title, "head")
        drawing.line((left - 6, bottom), (left + 5 * STEP, bottom), "grid")
        total = 0.0
        for place, share in enumerate(probabilities):
            x = left + place * STEP
            total += share
            drawing.cell(x, bottom - share * TALL, BAR, share * TALL, "teal")
            drawing.label(x + BAR / 2, bottom + 18, f"{share:.2f}", "text", "middle")
            drawing.label(x + BAR / 2, bottom + 36, f"{total:.2f}", "small", "middle")
        limit = bottom - 0.2 * probabilities[0] * TALL
        drawing.curve([(left - 6, limit), (left + 5 * STEP, limit)], "orange", dashed=True)
        for row, ((_, hue), count) in enumerate(zip(FILTERS, kept, strict=True)):
            y = bottom + 48 + row * 34
            drawing.cell(
                left - 4, y, (count - 1) * STEP + BAR + 8, 26, hue, f"{count} of 5" if count > 1 else "1"
            )
    drawing.label(16, bottom + 18, "probability", "small")
    drawing.label(16, bottom + 36, "sum so far", "small")
    for row, (name, _) in enumerate(FILTERS):
        drawing.label(16, bottom + 65 + row * 34, name, "small")
    for x, text in zip((16, 190, 440), RULES, strict=True):
        drawing.label(x, 340, text, "small")
    return drawing


SEED = 7
IDS: Sequence[tuple[int, float, str]] = ((0, 0.25, "blue"), (1, 0.5, "orange"), (3, 0.25, "green"))


def _draw() -> Drawing:
    """The unit line, cut by probabilities in the order of ids, and the thresholds of four draws."""
    left, width, top = 40, 600, 96
    numbers = [1 - uniform(SEED, index) for index in range(4)]
    drawing = Drawing(
        680,
        208,
        "A draw inverts the cumulative sum",
        "Tokens 0, 1, 2 and 3 have the probabilities 0.25, 0.5, 0 and 0.25. They take the parts of a line "
        "from 0 to 0.25, to 0.75, and to 1; token 2 has no part. The thresholds 0.15 and 0.21 are in the "
        "part of token 0, 0.67 in that of token 1, and 0.83 in that of token 3.",
    )
    drawing.label(left, 22, "1 - uniform(7, index), for four indices", "small")
    for index, number in enumerate(numbers):
        x = left + number * width
        y = 44 if index != 0 else 62
        drawing.label(x, y, f"index {index}: {number:.2f}", "note", "middle")
        drawing.arrow([(x, y + 6), (x, top - 2)])
    start = 0.0
    for token, share, hue in IDS:
        x = left + start * width
        drawing.cell(x, top, share * width, 44, hue, f"token {token}", f"probability {share:g}")
        start += share
    for at, text in ((0.0, "0"), (0.25, "0.25"), (0.75, "0.75"), (1.0, "1")):
        x = left + at * width
        drawing.line((x, top + 44), (x, top + 52))
        drawing.label(x, top + 68, text, "small", "middle")
    drawing.label(
        left + 0.75 * width, top + 86, "token 2 has probability 0: no number leads to it", "small", "middle"
    )
    return drawing


ONE_GENERATOR = (0.32, 0.15, 0.65, 0.07, 0.54, 0.37)  # Random(7)


def _seeds() -> Drawing:
    """Random numbers of A, without and with a neighbour B: from one generator, and by seed and index."""
    drawing = Drawing(
        680,
        330,
        "Two sources of random numbers",
        "One generator for the batch: without a neighbour A gets 0.32, 0.15 and 0.65; with B, which draws "
        "in between, A gets 0.32, 0.65 and 0.54. A function of seed and index: A gets 0.85, 0.79 and 0.17 "
        "in both cases.",
    )
    by_seed = {seed: [uniform(seed, index) for index in range(3)] for seed in (7, 9)}
    alone, shared = ONE_GENERATOR[:3], (ONE_GENERATOR[::2], ONE_GENERATOR[1::2])
    panels = (
        (40, "one generator for the batch", alone, shared),
        (200, "uniform(seed, index), with seed 7 for A and 9 for B", by_seed[7], (by_seed[7], by_seed[9])),
    )
    for y, title, first, (mine, other) in panels:
        drawing.label(16, y - 18, title, "head")
        drawing.label(16, y + 22, "A without a neighbour", "small")
        drawing.label(16, y + 66, "A and B in one batch", "small")
        for index in range(3):
            x = 176 + index * 164
            drawing.label(x + 72, y - 1, f"step {index + 1}", "note", "middle")
            drawing.cell(x, y + 6, 70, 28, "blue", f"{first[index]:.2f}")
            same = first[index] == mine[index]
            drawing.cell(x, y + 50, 70, 28, "blue" if same else "rose", f"{mine[index]:.2f}")
            drawing.cell(x + 74, y + 50, 70, 28, "free", f"{other[index]:.2f}")
    legend(drawing, 16, 316, {"blue": "A's number", "rose": "A's number, changed by B", "free": "B's number"})
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {"cuts": _cuts, "draw": _draw, "seeds": _seeds}
