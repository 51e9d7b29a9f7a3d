"""The figures of day 2.5: scores in tiles, the online softmax by hand, and what a tile hides."""

from collections.abc import Callable

from .blocks import legend
from .drawing import Drawing

CELL, STEP = 24, 26


def _tiles() -> Drawing:
    """Eight queries and eight keys: all scores at once, and one tile of two keys with the running results."""
    drawing = Drawing(
        660,
        316,
        "All scores at once, and one tile",
        "On the left, 8 queries have scores for 8 keys, 64 numbers at a time. On the right, only the scores "
        "for keys 4 and 5 exist; each query also has its largest score, its total and its weighted values.",
    )
    for left, title, tile in ((16, "all at once", range(8)), (290, "in tiles of two keys", range(4, 6))):
        drawing.label(left, 24, title, "head")
        for key in range(8):
            drawing.label(left + 62 + key * STEP, 48, str(key), "note", "middle")
        for query in range(8):
            y = 56 + query * STEP
            drawing.label(left, y + 17, f"query {query}", "small")
            for key in range(8):
                style = "free" if key not in tile else "orange" if key <= query else "panel"
                drawing.cell(left + 50 + key * STEP, y, CELL, CELL, style)
            if len(tile) < 8:
                for place, width in enumerate((22, 22, 46)):
                    drawing.cell(562 + (0, 26, 52)[place] - 4, y, width, CELL, "teal")
    drawing.label(562 - 4, 48, "m", "note")
    drawing.label(562 + 22, 48, "l", "note")
    drawing.label(562 + 48, 48, "o", "note")
    drawing.label(16, 282, "keys from left to right; the scores above the diagonal are hidden", "small")
    legend(
        drawing,
        16,
        306,
        {
            "orange": "score",
            "panel": "hidden, -inf",
            "free": "not in memory",
            "teal": "carried on, tile to tile",
        },
    )
    return drawing


def _by_hand() -> Drawing:
    """Two tiles of two keys: e^score, weights, the running results, and the rescaling between them."""
    drawing = Drawing(
        690,
        300,
        "An online softmax by hand",
        "Tile 1 has scores 0 and ln 2 and values 4 and 10: largest ln 2, total 3/2, weighted 12. Tile 2 has "
        "scores ln 4 and 0 and values 8 and 16. The largest becomes ln 4, the old sums are halved to 3/4 and "
        "6, and the new ones are total 2 and weighted 18. The output is 9.",
    )
    drawing.label(16, 24, "tile 1", "head")
    drawing.label(252, 24, "tile 2", "head")
    for left, rows in (
        (16, (("score", "0", "ln 2"), ("weight", "1/2", "1"), ("value", "4", "10"))),
        (252, (("score", "ln 4", "0"), ("weight", "1", "1/4"), ("value", "8", "16"))),
    ):
        for row, (name, first, second) in enumerate(rows):
            y = 36 + row * 32
            drawing.label(left, y + 19, name, "small")
            hue = ("orange", "violet", "blue")[row]
            drawing.cell(left + 56, y, 56, 28, hue, first)
            drawing.cell(left + 116, y, 56, 28, hue, second)
    boxes = (
        (16, "after tile 1", ("largest ln 2", "total 3/2", "weighted 12"), "teal"),
        (252, "the same, relative to ln 4", ("times 1/2", "total 3/4", "weighted 6"), "panel"),
        (500, "after tile 2", ("largest ln 4", "total 2", "weighted 18"), "teal"),
    )
    for left, title, lines, hue in boxes:
        drawing.label(left, 176, title, "small")
        drawing.box(left, 184, 172, 80, hue, lines)
    drawing.arrow([(102, 134), (102, 160)])
    drawing.arrow([(190, 224), (248, 224)])
    drawing.arrow([(426, 224), (496, 224)])
    drawing.arrow([(426, 82), (586, 82), (586, 160)])
    drawing.label(436, 72, "3/4 + 1 + 1/4 and 6 + 8 + 4", "small")
    drawing.label(16, 288, "12 / (3/2) = 8", "text")
    drawing.label(500, 288, "18 / 2 = 9", "text")
    return drawing


def _positions() -> Drawing:
    """The last 3 of 10 positions in tiles of 4 keys: what each tile shows to each query."""
    drawing = Drawing(
        660,
        200,
        "Three queries and ten keys in tiles of four",
        "The queries have the positions 7, 8 and 9. Tiles 0 to 3 and 4 to 7 are visible to all. Of the last "
        "tile, keys 8 and 9, the query at 7 sees nothing, the one at 8 sees key 8, the one at 9 both.",
    )
    for key in range(10):
        left = 158 + key * 42 + key // 4 * 20
        drawing.label(left + 18, 48, str(key), "note", "middle")
        for row, position in enumerate((7, 8, 9)):
            style = "orange" if key <= position else "panel"
            text = "" if key <= position else "-inf"
            drawing.cell(left, 56 + row * 34, 38, 30, style, text)
    for place, name in enumerate(("tile 1", "tile 2", "tile 3")):
        drawing.label(158 + place * (4 * 42 + 20), 26, name, "head")
    for row, position in enumerate((7, 8, 9)):
        drawing.label(16, 76 + row * 34, f"query {row}, position {position}", "small")
    legend(
        drawing, 16, 186, {"orange": "visible: the key's position is at most the query's", "panel": "hidden"}
    )
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {"tiles": _tiles, "by_hand": _by_hand, "positions": _positions}
