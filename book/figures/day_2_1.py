"""The figures of day 2.1: passes with and without a cache, prefill and decode, and contexts."""

from collections.abc import Callable

from .blocks import legend
from .drawing import Drawing

CELL, STEP = 30, 34


def _passes() -> Drawing:
    """Three passes over a prompt of 3 tokens and 2 generated ones: the keys computed and read."""
    drawing = Drawing(
        660,
        232,
        "Keys computed in three passes",
        "Without a cache the passes compute 3, 4 and 5 keys, 12 in all. With a cache they compute 3, 1 "
        "and 1, and read the others.",
    )
    for left, title, is_cached in ((16, "without a cache", False), (356, "with a cache", True)):
        drawing.label(left, 24, title, "head")
        for row, length in enumerate((3, 4, 5)):
            y = 40 + row * 46
            drawing.label(left, y + 20, f"pass {row + 1}", "small")
            first = length - 1 if is_cached and row else 0
            for place in range(length):
                style = "blue" if place < first else "orange"
                drawing.cell(left + 56 + place * STEP, y, CELL, CELL, style, str(place))
            computed = length - first
            drawing.label(left + 56 + 5 * STEP + 8, y + 20, f"computes {computed}", "small")
    drawing.label(16, 192, "sum: 3 + 4 + 5 = 12", "text")
    drawing.label(356, 192, "sum: 3 + 1 + 1 = 5", "text")
    legend(drawing, 16, 220, {"orange": "key computed in this pass", "blue": "key read from the cache"})
    return drawing


def _phases() -> Drawing:
    """A prefill of 8 tokens and three decode passes: bytes of weights and operations of each."""
    drawing = Drawing(
        660,
        266,
        "Prefill and decode",
        "A prefill of 8 tokens reads the weights once and does 8 units of arithmetic. Three decode passes "
        "read the weights three times and do 3 units.",
    )
    unit = 14
    drawing.label(16, 24, "prefill: one pass over 8 prompt tokens", "head")
    drawing.label(16, 56, "bytes read", "small")
    drawing.cell(100, 40, 120, 24, "blue", "all weights")
    drawing.label(16, 88, "operations", "small")
    for place in range(8):
        drawing.cell(100 + place * (unit + 2), 76, unit, 16, "orange")
    drawing.label(240, 89, "8 tokens with the same weights", "small")
    drawing.label(16, 136, "decode: one pass for each new token", "head")
    for place in range(3):
        left = 100 + place * 176
        drawing.label(left, 160, f"pass {place + 2}", "small")
        drawing.cell(left, 168, 120, 24, "blue", "all weights")
        drawing.cell(left + 122, 168, 18 + 4 * place, 24, "teal")
        drawing.cell(left, 204, unit, 16, "orange")
    drawing.label(16, 184, "bytes read", "small")
    drawing.label(16, 216, "operations", "small")
    legend(
        drawing,
        16,
        252,
        {"blue": "weights", "teal": "cached keys and values", "orange": "one token's multiplications"},
    )
    return drawing


def _context() -> Drawing:
    """The model calls `attend` of the context once in each layer; contexts differ in where keys are."""
    drawing = Drawing(
        660,
        250,
        "The model and its context",
        "Each layer of the model gives q, k and v to the context's attend, with the layer's number, and gets "
        "the output back. NoCacheContext stores nothing, CachedContext stores keys and values by layer, "
        "PagedContext of week 3 stores them in pages.",
    )
    drawing.box(16, 16, 196, 218, "orange", ["Model"])
    for row, name in enumerate(("layer 0", "layer 1", "...", "layer 29")):
        y = 54 + row * 44
        drawing.cell(34, y, 160, 30, "panel", name)
        if name != "...":
            drawing.arrow([(196, y + 10), (330, y + 10)])
            drawing.arrow([(330, y + 22), (198, y + 22)], dashed=True)
    drawing.label(264, 56, "attend(0, q, k, v)", "note", "middle")
    drawing.label(264, 88, "output", "note", "middle")
    drawing.box(334, 16, 310, 218, "zone", ["context of this pass"])
    rows = (
        ("NoCacheContext", "stores nothing (1.3)", "panel"),
        ("CachedContext", "growing arrays for each layer (2.1)", "blue"),
        ("PagedContext", "pages of one pool (3.2)", "teal"),
    )
    for row, (name, what, style) in enumerate(rows):
        drawing.box(350, 56 + row * 58, 278, 48, style, [name, what])
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {"passes": _passes, "phases": _phases, "context": _context}
