"""Draws pools, block tables and tokens, the shapes that most figures of the book consist of.

A sequence has one hue throughout a figure; a block that several sequences hold has a stripe for each of the
others. Coordinates are in pixels; each function returns the x coordinate to the right of what it drew.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .drawing import Drawing

CELL, GAP = 44, 4  # the size of a block or token, and the space between two
SLOT = 24  # the width of a token's place in a block that shows its tokens


class Block(NamedTuple):
    """A block as drawn. hues: of its holders, empty if it is free. text: in it. note: below the text."""

    hues: str = ""
    text: str = ""
    note: str = ""


def pool(drawing: Drawing, x: float, y: float, blocks: Sequence[Block], first: int = 0) -> float:
    """Draw blocks side by side with their ids above. first: the id of the first block."""
    for place, block in enumerate(blocks):
        left = x + place * (CELL + GAP)
        drawing.label(left + CELL / 2, y - 6, str(first + place), "note", "middle")
        drawing.cell(left, y, CELL, CELL, block.hues or "free", block.text, block.note)
    return x + len(blocks) * (CELL + GAP)


def slotted_block(
    drawing: Drawing, x: float, y: float, block_id: int, block: Block, slots: Sequence[str]
) -> float:
    """Draw a block that shows its tokens, with its id above and its note below; "" is a free place."""
    width = len(slots) * SLOT + 8
    drawing.label(x + width / 2, y - 6, str(block_id), "note", "middle")
    drawing.cell(x, y, width, 50, block.hues or "free")
    for place, text in enumerate(slots):
        drawing.cell(x + 5 + place * SLOT, y + 5, SLOT - 2, 20, "panel" if text else "free", text)
    drawing.label(x + width / 2, y + 38, block.note, "note", "middle")
    return x + width + GAP


def table(drawing: Drawing, x: float, y: float, name: str, hue: str, ids: Sequence[int | str]) -> float:
    """Draw a block table: the sequence's name, then the ids of its blocks, in the order of its tokens."""
    drawing.label(x, y + CELL / 2 - 4, name, "name")
    left = x + 9.5 * len(name) + 10
    for place, block in enumerate(ids):
        drawing.cell(left + place * (34 + 2), y, 34, 30, hue, str(block))
    return left + len(ids) * 36


def tokens(
    drawing: Drawing, x: float, y: float, hue: str, texts: Sequence[str], width: float = CELL
) -> float:
    """Draw a row of tokens; an empty text is a place that no token has filled."""
    for place, text in enumerate(texts):
        drawing.cell(x + place * (width + 2), y, width, 26, hue if text else "free", text)
    return x + len(texts) * (width + 2)


def legend(drawing: Drawing, x: float, y: float, entries: Mapping[str, str]) -> float:
    """Draw small squares with their meaning. entries: by hue or style."""
    for style, text in entries.items():
        drawing.cell(x, y - 11, 14, 14, style)
        drawing.label(x + 20, y, text, "small")
        x += 36 + 6.6 * len(text)
    return x
