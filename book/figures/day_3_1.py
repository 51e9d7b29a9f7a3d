"""The figures of day 3.1: a sequence in a pool, and a fork with its copy on write."""

from collections.abc import Callable, Sequence

from .blocks import Block, legend, pool, table, tokens
from .drawing import Drawing

WORDS = ("The", "cat", "sat", "on", "the", "mat")


def _logical_and_physical() -> Drawing:
    """Six tokens in blocks of four: what the model sees, the table, and where they are."""
    drawing = Drawing(
        640,
        266,
        "One sequence in a pool of blocks",
        "The tokens The cat sat on are in block 7, the tokens the mat in block 4. The block table is [7, 4].",
    )
    drawing.label(16, 24, "what the model sees: positions 0 to 5", "small")
    tokens(drawing, 16, 34, "blue", [*WORDS, "", ""], 58)
    drawing.label(16, 92, "block table", "small")
    table(drawing, 16, 102, "A", "blue", [7, 4])
    drawing.label(16, 257, "the pool: eight blocks of four tokens each", "small")
    full, half = Block("blue", "A", "4 of 4"), Block("blue", "A", "2 of 4")
    others = Block("orange", "B")
    pool(drawing, 16, 194, [Block(), others, Block(), others, half, Block(), others, full])
    drawing.arrow([(53, 134), (53, 150), (372, 150), (372, 178)])
    drawing.arrow([(89, 134), (89, 142), (230, 142), (230, 178)])
    legend(drawing, 430, 110, {"blue": "A's", "orange": "another sequence's", "free": "free"})
    return drawing


def _fork() -> Drawing:
    """The four states of a fork, block ids and reference counts in each."""
    drawing = Drawing(
        560,
        440,
        "A fork and its copy on write",
        "Before: A holds blocks 0 and 1. After the fork: A and B hold both, with two references each. When B "
        "appends a token, block 1 is copied to block 2, and its table is [0, 2]. When A ends, 1 is free.",
    )
    rows: Sequence[tuple[str, dict[str, tuple[str, list[int]]], list[Block]]] = (
        (
            "A has 6 tokens",
            {"A": ("blue", [0, 1])},
            [Block("blue", "4/4", "1 ref"), Block("blue", "2/4", "1 ref"), Block(), Block()],
        ),
        (
            "B = A.fork()",
            {"A": ("blue", [0, 1]), "B": ("orange", [0, 1])},
            [Block("blue orange", "4/4", "2 refs"), Block("blue orange", "2/4", "2 refs"), Block(), Block()],
        ),
        (
            "B.append_tokens(1): copy block 1 to block 2, then write",
            {"A": ("blue", [0, 1]), "B": ("orange", [0, 2])},
            [
                Block("blue orange", "4/4", "2 refs"),
                Block("blue", "2/4", "1 ref"),
                Block("orange", "3/4", "1 ref"),
                Block(),
            ],
        ),
        (
            "A.release()",
            {"B": ("orange", [0, 2])},
            [Block("orange", "4/4", "1 ref"), Block(), Block("orange", "3/4", "1 ref"), Block()],
        ),
    )
    for place, (what, tables, blocks) in enumerate(rows):
        y = 20 + place * 108
        drawing.label(16, y, what, "text")
        for line, (name, (hue, ids)) in enumerate(tables.items()):
            table(drawing, 16, y + 14 + line * 36, name, hue, ids)
        pool(drawing, 330, y + 20, blocks)
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {"pool": _logical_and_physical, "fork": _fork}
