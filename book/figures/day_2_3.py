"""The figures of day 2.3: external fragmentation, a cache of blocks, and the order of a gather."""

from collections.abc import Callable, Sequence

from .blocks import Block, legend, pool, tokens
from .drawing import Drawing

HUES = {"A": "blue", "B": "orange", "C": "green", "D": "violet", "E": "rose"}


def _blocks(names: str) -> list[Block]:
    """One block for each letter; a dot is a free block."""
    return [Block(HUES[name], name) if name != "." else Block() for name in names]


def _external() -> Drawing:
    """Four users of two blocks each; two leave, and a fifth user needs three blocks."""
    drawing = Drawing(
        660,
        330,
        "External fragmentation",
        "A, B, C and D hold two blocks each. A and C leave: blocks 0, 1, 4 and 5 are free. E needs three "
        "blocks. No three adjacent blocks are free, but three anywhere are.",
    )
    rows: Sequence[tuple[str, str, str]] = (
        ("all blocks are held", "AABBCCDD", ""),
        ("A and C leave", "..BB..DD", "4 blocks free, longest run 2"),
        ("E needs 3 adjacent blocks", "..BB..DD", "refused"),
        ("E needs any 3 blocks", "EEBBE.DD", "E's list: [0, 1, 4]"),
    )
    for row, (what, names, result) in enumerate(rows):
        y = 32 + row * 76
        drawing.label(16, y + 18, what, "text")
        drawing.label(16, y + 38, result, "small")
        pool(drawing, 250, y, _blocks(names))
    return drawing


def _cache() -> Drawing:
    """A cache of the blocks [5, 2] of four tokens, with six tokens."""
    drawing = Drawing(
        660,
        256,
        "A sequence in blocks 5 and 2",
        "Tokens 0 to 3 are in block 5, tokens 4 and 5 in block 2 at offsets 0 and 1. The next token goes to "
        "block 2 at offset 2.",
    )
    drawing.label(16, 24, "the sequence: current_len = 6", "small")
    tokens(drawing, 16, 34, "blue", ["0", "1", "2", "3", "4", "5", "", ""])
    drawing.label(16, 92, "blocks", "small")
    for place, block in enumerate((5, 2)):
        drawing.cell(70 + place * 38, 74, 34, 28, "blue", str(block))
    drawing.arrow([(87, 102), (87, 142), (284, 142), (284, 168)])
    drawing.arrow([(125, 102), (125, 120), (140, 120), (140, 168)])
    drawing.label(16, 248, "the pool: eight blocks of four tokens, shared by all sequences", "small")
    held = Block("orange", "B")
    blocks = [
        held,
        Block(),
        Block("blue", "A", "2 of 4"),
        held,
        Block(),
        Block("blue", "A", "4 of 4"),
        Block(),
        held,
    ]
    pool(drawing, 16, 186, blocks)
    legend(drawing, 430, 92, {"blue": "A", "orange": "B", "free": "free"})
    return drawing


def _gather() -> Drawing:
    """Two blocks of two tokens and two heads: the order in the pool, and the order that attention needs."""
    drawing = Drawing(
        660,
        236,
        "The order of a gather",
        "Gathered, the numbers are in the order block, head, token: 0 and 1 of head 0, then 0 and 1 of head "
        "1, then 2 and 3 of head 0, then 2 and 3 of head 1. Attention needs tokens 0 to 3 of head 0, then "
        "those of head 1.",
    )
    gathered = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3))
    wanted = tuple((head, token) for head in range(2) for token in range(4))
    rows = (
        ("gathered from the pool: block, head, token", gathered),
        ("what attention needs: head, token", wanted),
    )
    for row, (what, order) in enumerate(rows):
        y = 54 + row * 92
        drawing.label(16, y - 30, what, "head")
        for place, (head, token) in enumerate(order):
            hue = "teal" if head else "violet"
            drawing.cell(16 + place * 58 + (place // 4) * 16, y, 54, 34, hue, f"h{head} t{token}")
        if row == 0:
            drawing.label(130, y - 8, "block 5", "note", "middle")
            drawing.label(378, y - 8, "block 2", "note", "middle")
        else:
            drawing.label(130, y - 8, "head 0", "note", "middle")
            drawing.label(378, y - 8, "head 1", "note", "middle")
    legend(drawing, 16, 216, {"violet": "head 0", "teal": "head 1"})
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {"external": _external, "cache": _cache, "gather": _gather}
