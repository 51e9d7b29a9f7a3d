"""The figures of day 3.3: slots of a batch, and the axes of a gather."""

from collections.abc import Callable

from .blocks import Block, legend, pool, table
from .drawing import Drawing


def _slots() -> Drawing:
    """Two tables, and their tokens' slots as one array."""
    drawing = Drawing(
        680,
        300,
        "The slots of a batch as one array",
        "A has blocks 7 and 2 and six tokens, B has block 4 and three. Their slots are 28, 29, 30, 31, 8, 9 "
        "and 16, 17, 18, in one array.",
    )
    drawing.label(16, 24, "block tables, blocks of four tokens", "small")
    table(drawing, 16, 34, "A", "blue", [7, 2])
    table(drawing, 190, 34, "B", "orange", [4])
    drawing.label(120, 54, "6 tokens", "small")
    drawing.label(260, 54, "3 tokens", "small")
    drawing.label(16, 96, "slots of whole blocks: block id times 4, plus 0, 1, 2, 3", "small")
    rows = ((28, "blue", 4), (8, "blue", 2), (16, "orange", 3))
    for place, (first, hue, used) in enumerate(rows):
        for offset in range(4):
            style = hue if offset < used else "free"
            drawing.cell(16 + place * 212 + offset * 50, 108, 46, 28, style, str(first + offset))
    drawing.label(16, 166, "cut to each sequence's length, joined: int32 [9]", "small")
    slots = [("blue", slot) for slot in (28, 29, 30, 31, 8, 9)] + [("orange", slot) for slot in (16, 17, 18)]
    for place, (hue, slot) in enumerate(slots):
        drawing.cell(16 + place * 50, 178, 46, 28, hue, str(slot))
    drawing.label(16, 234, "the pool", "small")
    blocks = [Block(), Block(), Block("blue", "A", "2/4"), Block(), Block("orange", "B", "3/4")]
    pool(drawing, 90, 246, [*blocks, Block(), Block(), Block("blue", "A", "4/4")])
    legend(drawing, 500, 272, {"blue": "A", "orange": "B", "free": "no token"})
    return drawing


def _window() -> Drawing:
    """A window of four blocks that ends with token 500."""
    drawing = Drawing(
        680,
        150,
        "A window of four blocks",
        "Blocks of 16 tokens. Token 500 is in block 31 of the sequence at offset 4. The window is blocks "
        "28 to 31, tokens 448 to 500.",
    )
    drawing.label(16, 24, "blocks of the sequence (16 tokens each), by their place in the table", "small")
    for place, name in enumerate(("0", "1", "...", "27", "28", "29", "30", "")):
        hue = "blue" if place >= 4 else "zone"
        drawing.cell(16 + place * 80, 36, 74, 36, hue, name)
    drawing.cell(16 + 7 * 80 + 24, 36, 50, 36, "free", "31")
    drawing.label(16 + 4 * 80, 92, "token 448", "small")
    drawing.label(16 + 7 * 80 + 20, 92, "token 500", "small", "end")
    drawing.arrow(
        [(16 + 7 * 80 + 20, 98), (16 + 7 * 80 + 20, 112), (16 + 4 * 80 + 30, 112), (16 + 4 * 80 + 30, 98)]
    )
    drawing.label(16 + 4 * 80 + 50, 132, "read: 3 whole blocks, and 5 tokens of block 31", "small")
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {"slots": _slots, "window": _window}
