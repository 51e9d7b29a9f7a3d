"""The figures of day 3.5: how far windows reach, a table that starts in the middle, groups, and a hit."""

from collections.abc import Callable, Collection

from .blocks import legend, table
from .drawing import Drawing

GROUPS = ("blue", "orange", "teal")  # the group with full attention, then those with windows
NO_BLOCK = "\N{MINUS SIGN}1"


def _reach() -> Drawing:
    """What one output depends on, layer by layer, with windows of three tokens."""
    drawing = Drawing(
        640,
        222,
        "How far three layers with windows of three tokens reach",
        "The output of layer 3 at position 9 depends on positions 7 to 9 after layer 2, on 5 to 9 after "
        "layer 1, and on 3 to 9 of the embeddings.",
    )
    rows = (("after layer 3", 9), ("after layer 2", 7), ("after layer 1", 5), ("embeddings", 3))
    for line, (name, first) in enumerate(rows):
        y = 16 + line * 44
        drawing.label(16, y + 19, name, "small")
        for position in range(10):
            hue = "blue" if position >= first else "free"
            drawing.cell(130 + position * 48, y, 44, 28, hue, str(position))
        if line:
            for position in (first, 9):
                drawing.line((152 + position * 48, y), (152 + min(9, position + 2) * 48, y - 16))
    legend(drawing, 130, 212, {"blue": "seen by position 9 of layer 3", "free": "out of reach"})
    return drawing


def _window() -> Drawing:
    """A chunk of two tokens with a window of five: what is stored, what the table says, and the mask."""
    drawing = Drawing(
        680,
        282,
        "A chunk with a window of five tokens",
        "Blocks of four tokens. Positions 0 to 7 were released; 8 to 11 are in block 7, 12 to 14 in block 2. "
        "The table of indices is -1, -1, 7, 2. Position 13 sees 9 to 13, position 14 sees 10 to 14.",
    )
    width, left = 36, 16

    def x_of(position: int) -> float:
        return left + position * (width + 3) + position // 4 * 8

    drawing.label(left, 22, "positions of the text; the step computes 13 and 14", "small")
    drawing.label(x_of(8), 22, "start = 8", "small")
    for position in range(16):
        hue = "blue" if 8 <= position <= 14 else "free"
        drawing.cell(x_of(position), 32, width, 28, hue, str(position) if position <= 14 else "")
    drawing.label(left, 92, "physical_indices(): one entry for each block of the text", "small")
    for block, entry in enumerate((NO_BLOCK, NO_BLOCK, "7", "2")):
        hue = "free" if entry == NO_BLOCK else "blue"
        drawing.cell(x_of(4 * block), 102, 4 * width + 9, 28, hue, entry)
    drawing.label(left, 150, "not read, and not held", "small")
    drawing.label(x_of(8), 162, "read: 7 tokens, so the mask is [2, 7]", "small")
    for line, (query, first) in enumerate(((13, 9), (14, 10))):
        y = 174 + line * 34
        drawing.label(x_of(8) - 12, y + 19, f"query {query}", "small", "end")
        for position in range(8, 15):
            seen = first <= position <= query
            drawing.cell(x_of(position), y, width, 28, "teal" if seen else "zone", "0" if seen else "-inf")
    legend(drawing, left, 268, {"blue": "stored", "free": "released, or empty", "teal": "seen"})
    return drawing


def _groups() -> Drawing:
    """Six layers in three groups, the tables of one sequence, and the pool with two layers of arrays."""
    drawing = Drawing(
        680,
        330,
        "Layer groups on one pool",
        "Layers 2 and 5 have full attention and table 0, 3, 5, 8, 9. Layers 0 and 1 share the table -1, -1, "
        "-1, 1, 7; layers 3 and 4 share -1, -1, -1, 2, 6. The pool has two layers: in block 1 they hold the "
        "keys of layers 0 and 1, in block 2 those of layers 3 and 4.",
    )
    drawing.label(16, 22, "the model", "small")
    for layer, hue in enumerate(("orange", "orange", "blue", "teal", "teal", "blue")):
        window = "all" if hue == "blue" else "window 6"
        drawing.cell(16, 32 + layer * 28, 130, 24, hue, f"layer {layer}: {window}")
    drawing.label(206, 22, "one sequence: five blocks of text, three tables", "small")
    tables = (
        ("group 0, layers 2 5", ["0", "3", "5", "8", "9"]),
        ("group 1, layers 0 1", [*[NO_BLOCK] * 3, "1", "7"]),
        ("group 2, layers 3 4", [*[NO_BLOCK] * 3, "2", "6"]),
    )
    for line, (name, ids) in enumerate(tables):
        y = 36 + line * 52
        held = [one for one in ids if one != NO_BLOCK]
        left = table(drawing, 206, y, name, GROUPS[line], [])
        for place, block in enumerate(ids):
            hue = GROUPS[line] if block in held else "free"
            drawing.cell(left + place * 36, y, 34, 30, hue, block)
    drawing.label(
        16, 232, "the pool: ten blocks, two layers of arrays. Which layer's keys are there?", "small"
    )
    owners = (0, 1, 2, 0, None, 0, 2, 1, 0, 0)
    layers = ((2, 5), (0, 1), (3, 4))
    for number, group in enumerate(owners):
        x = 130 + number * 54
        drawing.label(x + 24, 254, str(number), "note", "middle")
        for row in range(2):
            text = "" if group is None else f"L{layers[group][row]}"
            hue = "free" if group is None else GROUPS[group]
            drawing.cell(x, 262 + row * 32, 48, 28, hue, text)
    drawing.label(16, 281, "pool layer 0", "small")
    drawing.label(16, 313, "pool layer 1", "small")
    return drawing


def _hit() -> Drawing:
    """The search for the longest hit of two groups: 8, 6, then 4 blocks."""
    drawing = Drawing(
        700,
        330,
        "The longest hit of two groups",
        "The group with full attention has kept blocks 0 to 5, the windowed group 2, 3, 5, 6 and 7. Eight "
        "blocks fail because the first group lacks 6; six fail because the windowed group needs 4 and 5 and "
        "lacks 4; four blocks work.",
    )
    kept = ({0, 1, 2, 3, 4, 5}, {2, 3, 5, 6, 7})
    _kept_row(drawing, 44, "kept", kept, (range(8), range(8)))
    drawing.label(90, 22, "full attention", "small")
    drawing.label(400, 22, "window of 6 tokens", "small")
    rows = (
        (8, (range(8), ()), "full attention lacks block 6: try 6 blocks"),
        (6, (range(6), (4, 5)), "the window needs blocks 4 and 5, and lacks 4: try 4 blocks"),
        (4, (range(4), (2, 3)), "both groups have what they need: the hit is 4 blocks"),
    )
    for line, (hit, needed, text) in enumerate(rows):
        y = 106 + line * 70
        _kept_row(drawing, y, f"n = {hit}", kept, needed)
        drawing.label(90, y + 48, text, "small")
    meaning = {"blue teal": "needed, kept", "rose": "needed, missing", "free": "missing, or not asked for"}
    legend(drawing, 90, 318, meaning)
    return drawing


def _kept_row(
    drawing: Drawing,
    y: float,
    name: str,
    kept: tuple[Collection[int], ...],
    needed: tuple[Collection[int], ...],
) -> None:
    """Draw both groups' blocks: those that are needed, in colour if they are kept."""
    drawing.label(16, y + 19, name, "small")
    for group, hue in enumerate(("blue", "teal")):
        for block in range(8):
            style = "free"
            if block in needed[group]:
                missing = "free" if name == "kept" else "rose"
                style = hue if block in kept[group] else missing
            drawing.cell(90 + group * 310 + block * 35, y, 32, 28, style, str(block))


FIGURES: dict[str, Callable[[], Drawing]] = {
    "reach": _reach,
    "window": _window,
    "groups": _groups,
    "hit": _hit,
}
