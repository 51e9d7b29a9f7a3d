"""What a page shows in place of an interactive figure without JavaScript: a few of its steps."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .blocks import Block, slotted_block, table
from .drawing import Drawing


class _Step(NamedTuple):
    """A step of the block table's story: what happens, the tables by name, and the blocks in use."""

    what: str
    tables: dict[str, Sequence[int]]
    blocks: dict[int, tuple[Block, str]]


HUES = {"A": "blue", "B": "orange"}
STEPS = (
    _Step(
        "B is a fork of A: one more reference to each block",
        {"A": [0, 1], "B": [0, 1]},
        {
            0: (Block("blue orange", note="2 refs"), "a0 a1 a2 a3"),
            1: (Block("blue orange", note="2 refs"), "a4 a5"),
        },
    ),
    _Step(
        "B appends 1 token: block 1 is copied to block 2 first",
        {"A": [0, 1], "B": [0, 2]},
        {
            0: (Block("blue orange", note="2 refs"), "a0 a1 a2 a3"),
            1: (Block("blue", note="1 ref"), "a4 a5"),
            2: (Block("orange", note="1 ref, copy of 1"), "a4 a5 b6"),
        },
    ),
    _Step(
        "A releases its blocks: block 1 has no holder left",
        {"B": [0, 2]},
        {
            0: (Block("orange", note="1 ref"), "a0 a1 a2 a3"),
            2: (Block("orange", note="1 ref"), "a4 a5 b6"),
        },
    ),
)


def _block_table() -> Drawing:
    """A fork, a copy on write and a release, with the tokens in each block."""
    drawing = Drawing(
        640,
        372,
        "Fork, copy on write and release",
        "B, a fork of A, holds A's blocks 0 and 1. When B appends a token, block 1 is copied to block 2. "
        "When A ends, block 1 is free.",
    )
    for row, (what, tables, blocks) in enumerate(STEPS):
        y = 20 + row * 124
        drawing.label(2, y, what, "text")
        for line, (name, ids) in enumerate(tables.items()):
            table(drawing, 2, y + 18 + line * 36, name, HUES[name], ids)
        x = 210.0
        for block_id in range(4):
            block, texts = blocks.get(block_id, (Block(), ""))
            slots = [*texts.split(), *[""] * 4][:4]
            x = slotted_block(drawing, x, y + 30, block_id, block, slots)
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {"block_table": _block_table}
