"""The figures of day 3.2: packed steps, gathering, partitions, stacked pages, beams, compaction, the loop."""

from collections.abc import Callable, Mapping, Sequence

from .blocks import Block, legend, pool, table
from .drawing import Drawing

HUES = ("blue", "orange", "teal")  # sequences 0, 1 and 2


def _row(drawing: Drawing, y: float, name: str, values: Sequence[str], hues: Sequence[str]) -> None:
    """Draw one row of numbers of a packed step, a cell for each token, with its name on the left."""
    drawing.label(16, y + 18, name, "name")
    for place, (value, hue) in enumerate(zip(values, hues, strict=True)):
        drawing.cell(150 + place * 58, y, 56, 26, hue, value)


def _packed() -> Drawing:
    """Eight tokens of three sequences as one row, and the arrays that describe them."""
    drawing = Drawing(
        720,
        424,
        "A packed step",
        "Four tokens of sequence 0, three of sequence 1 and one of sequence 2 in one row, with their "
        "positions, slots and rows of tables. Tables are padded with 0. Slots point into the pool.",
    )
    hues = [HUES[0]] * 4 + [HUES[1]] * 3 + [HUES[2]]
    drawing.label(150, 20, "a chunk of sequence 0", "small")
    drawing.label(382, 20, "prompt of sequence 1", "small")
    drawing.label(556, 20, "a decode of 2", "small")
    _row(drawing, 30, "positions", ["5", "6", "7", "8", "0", "1", "2", "5"], hues)
    _row(drawing, 64, "slots", ["13", "14", "15", "20", "4", "5", "6", "17"], hues)
    _row(drawing, 98, "row_of_token", ["0", "0", "0", "0", "1", "1", "1", "2"], hues)
    _row(drawing, 132, "logit rows", ["", "", "", "yes", "", "", "yes", "yes"], hues)
    drawing.label(16, 194, "tables", "name")
    rows = (("0", "3", "5"), ("1", "0", "0"), ("2", "4", "0"))
    used = (3, 1, 2)
    for number, (ids, count) in enumerate(zip(rows, used, strict=True)):
        y = 176 + number * 34
        drawing.label(150, y + 18, f"row {number}", "small")
        for place, text in enumerate(ids):
            hue = HUES[number] if place < count else "free"
            drawing.cell(196 + place * 46, y, 44, 28, hue, text)
    drawing.label(360, 194, "spans", "name")
    for number, text in enumerate(("start 5, stop 9", "start 0, stop 3", "start 5, stop 6")):
        drawing.cell(430, 176 + number * 34, 170, 28, HUES[number], text)
    drawing.label(
        16,
        326,
        "the pool: six blocks of four places; the slots written in this step are below each block",
        "small",
    )
    held = {0: 0, 1: 1, 2: 2, 3: 0, 4: 2, 5: 0}
    after = {0: "0 to 3", 1: "0 to 2", 2: "0 to 3", 3: "4 to 7", 4: "4, 5", 5: "8"}
    written = {1: "4 5 6", 3: "13 14 15", 4: "17", 5: "20"}
    for block, number in held.items():
        x = 16 + block * 92
        drawing.label(x + 43, 348, f"block {block}", "note", "middle")
        drawing.cell(x, 354, 86, 34, HUES[number], after[block])
        drawing.label(x + 43, 406, written.get(block, ""), "chip", "middle")
    legend(drawing, 580, 366, {"blue": "sequence 0"})
    legend(drawing, 580, 386, {"orange": "sequence 1"})
    legend(drawing, 580, 406, {"teal": "sequence 2"})
    return drawing


def _gather() -> Drawing:
    """The blocks of one span become one row of keys, with the shape after each operation."""
    drawing = Drawing(
        720,
        330,
        "Gathering a span's keys",
        "keys[blocks] picks blocks 2 and 4 from the pool. Heads are moved first, blocks and places joined to "
        "one axis of eight places, and the first six are kept.",
    )
    drawing.label(16, 22, "keys, the pool of one layer: [6, Hkv, 4, D]", "name")
    others = Block("orange"), Block("blue")
    blocks = [others[1], others[0], Block("teal", "0 - 3"), others[1], Block("teal", "4 5"), others[1]]
    pool(drawing, 16, 48, blocks)
    drawing.label(330, 66, "one span of sequence 2:", "small")
    drawing.label(330, 84, "its row of tables is 2, 4 and a padding 0; stop = 6", "small")
    steps = (
        ("keys[blocks]", "[2, Hkv, 4, D]", "the two blocks, in the table's order, each with all heads"),
        ("heads first", "[Hkv, 2, 4, D]", "for each head: two blocks of four places"),
        ("one axis of places", "[1, Hkv, 8, D]", "for each head: eight places in a row"),
        ("cut", "[1, Hkv, 6, D]", "positions 0 to 5; two empty places are gone"),
    )
    for number, (what, shape, meaning) in enumerate(steps):
        y = 112 + number * 34
        drawing.label(16, y + 18, what, "name")
        drawing.cell(222, y, 132, 26, "panel", shape)
        drawing.label(370, y + 18, meaning, "small")
    drawing.label(16, 276, "keys", "name")
    for place in range(8):
        hue = "teal" if place < 6 else "free"
        drawing.cell(80 + place * 46, 256, 44, 30, hue, str(place) if place < 6 else "")
    drawing.line((80 + 4 * 46 - 1, 250), (80 + 4 * 46 - 1, 292))
    drawing.label(80 + 2 * 46, 308, "from block 2", "note", "middle")
    drawing.label(80 + 5 * 46, 308, "from block 4", "note", "middle")
    drawing.label(470, 276, "the query at position 5 sees all six", "small")
    return drawing


def _partitions() -> Drawing:
    """A sum over 400 positions: cut by the number of free processors, and cut at fixed positions."""
    drawing = Drawing(
        720,
        316,
        "Splitting a sum by load, and at fixed positions",
        "Split by load: alone, the positions are cut in four parts, in a batch in two, so partial sums "
        "differ. Fixed partitions of 128 positions: the same partial sums alone and in a batch.",
    )
    by_load = {"alone": [100] * 4, "in a batch": [200] * 2}
    _cuts(drawing, 16, "the number of parts follows the load: different sums", by_load, "rose")
    fixed = [128, 128, 128, 16]
    _cuts(
        drawing,
        174,
        "the size of a part is fixed: the same sums",
        {"alone": fixed, "in a batch": fixed},
        "green",
    )
    return drawing


def _cuts(drawing: Drawing, y: float, title: str, rows: Mapping[str, Sequence[int]], hue: str) -> None:
    """Draw how the 400 positions of one query are cut into parts, and in which order the parts are added."""
    drawing.label(16, y + 8, title, "text")
    for number, (name, sizes) in enumerate(rows.items()):
        top, start = y + 38 + number * 56, 0
        drawing.label(16, top + 20, name, "small")
        for place, size in enumerate(sizes):
            left = 110 + start * 1.1
            drawing.cell(left, top, size * 1.1 - 3, 32, hue, f"s{place}" if size > 20 else "")
            drawing.label(left + 1, top - 5, str(start), "note")
            start += size
        total = "s0"
        for place in range(1, len(sizes)):
            total = f"({total}+s{place})"
        drawing.label(566, top + 20, total[1:-1], "chip")


def _stacked() -> Drawing:
    """Three separate pages become a pool of three blocks; tables get the new numbers."""
    drawing = Drawing(
        720,
        250,
        "Separate pages as a small pool",
        "The pages 4711, 42 and 7 are stacked in that order and get the numbers 0, 1 and 2. The tables "
        "[4711, 42] and [4711, 7] become [0, 1] and [0, 2].",
    )
    drawing.label(16, 22, "tables, with the pages' ids", "small")
    _wide_table(drawing, 16, 32, "A", "blue", ["4711", "42"])
    _wide_table(drawing, 16, 72, "B", "orange", ["4711", "7"])
    drawing.label(250, 22, "page_blocks: separate arrays [Hkv, 4, D]", "small")
    pages = (("4711", "blue orange"), ("42", "blue"), ("7", "orange"))
    for place, (name, hues) in enumerate(pages):
        x = 250 + place * 110
        drawing.label(x + 45, 52, name, "note", "middle")
        drawing.cell(x, 58, 90, 44, hues, "keys, values")
        drawing.arrow([(x + 45, 106), (285 + place * 48, 166)])
    drawing.label(590, 84, "mx.stack", "name")
    drawing.label(590, 102, "each page once", "small")
    pool(drawing, 262, 188, [Block("blue orange"), Block("blue"), Block("orange")])
    drawing.label(424, 204, "a pool [3, Hkv, 4, D]", "small")
    drawing.label(424, 222, "its block numbers are places in the stack", "small")
    drawing.label(16, 152, "tables of the batch", "small")
    _wide_table(drawing, 16, 162, "0", "blue", ["0", "1"])
    _wide_table(drawing, 16, 202, "1", "orange", ["0", "2"])
    drawing.arrow([(62, 108), (62, 138)])
    return drawing


def _wide_table(drawing: Drawing, x: float, y: float, name: str, hue: str, ids: Sequence[str]) -> None:
    """Draw a table whose ids may have four digits."""
    drawing.label(x, y + 20, name, "name")
    for place, block in enumerate(ids):
        drawing.cell(x + 22 + place * 58, y, 54, 30, hue, block)


def _beams() -> Drawing:
    """Three steps of a search of width 2: who continues whom, and the pages that the beams hold."""
    drawing = Drawing(
        720,
        500,
        "Two beams on shared pages",
        "A prompt of six tokens in blocks 0 and 1. Both first beams continue it and copy block 1. Then both "
        "second beams continue beam 1: four beams exist until the first two end, so beam_size is 4.",
    )
    rows: Sequence[tuple[str, str, Mapping[str, tuple[str, list[int]]], list[Block]]] = (
        (
            "the prompt: 6 tokens, beam 0",
            "a search of width 2, with beam_size 4",
            {"0": ("blue", [0, 1])},
            [Block("blue", "4/4"), Block("blue", "2/4"), Block(), Block(), Block(), Block()],
        ),
        (
            "fork 0 twice, add a token to each: both copy block 1",
            "prune 0: block 1 is free again",
            {"1": ("orange", [0, 2]), "2": ("teal", [0, 3])},
            [
                Block("orange teal", "4/4"),
                Block(),
                Block("orange", "3/4"),
                Block("teal", "3/4"),
                Block(),
                Block(),
            ],
        ),
        (
            "the best two both continue beam 1: fork 1 twice",
            "four beams at once; nothing is copied yet",
            {"1": ("orange", [0, 2]), "2": ("teal", [0, 3]), "3": ("violet", [0, 2]), "4": ("green", [0, 2])},
            [
                Block("orange teal violet green", "4/4"),
                Block(),
                Block("orange violet green", "3/4"),
                Block("teal", "3/4"),
                Block(),
                Block(),
            ],
        ),
        (
            "add a token to 3 and 4, then prune 1 and 2",
            "beam 2's token and its block are gone",
            {"3": ("violet", [0, 4]), "4": ("green", [0, 5])},
            [
                Block("violet green", "4/4"),
                Block(),
                Block(),
                Block(),
                Block("violet", "4/4"),
                Block("green", "4/4"),
            ],
        ),
    )
    y = 22.0
    for what, note, tables, blocks in rows:
        drawing.label(16, y, what, "text")
        drawing.label(420, y, note, "small")
        for line, (name, (hue, ids)) in enumerate(tables.items()):
            table(drawing, 16 + line % 2 * 190, y + 14 + line // 2 * 36, f"beam {name}", hue, ids)
        pool(drawing, 420, y + 26, blocks)
        y += 122
    return drawing


def _compaction() -> Drawing:
    """Eight blocks, of which 0, 2, 5 and 7 are in use, before and after compaction, and after the cut."""
    drawing = Drawing(
        640,
        330,
        "Compaction",
        "Blocks 0, 2, 5 and 7 are in use. 5 moves to 1 and 7 to 3; 0 and 2 stay. Tables [2, 5] and [2, 7] "
        "become [2, 1] and [2, 3]. Then the last four blocks are cut off.",
    )
    used = {0: "teal", 2: "blue orange", 5: "blue", 7: "orange"}
    moved = {0: "teal", 1: "blue", 2: "blue orange", 3: "orange"}
    states = (
        ("4 of 8 blocks are in use; the new end is 4", used, {"A": [2, 5], "B": [2, 7], "C": [0]}, 8),
        ("after the moves {5: 1, 7: 3}", moved, {"A": [2, 1], "B": [2, 3], "C": [0]}, 8),
        ("after resize(4)", moved, {"A": [2, 1], "B": [2, 3], "C": [0]}, 4),
    )
    hues = {"A": "blue", "B": "orange", "C": "teal"}
    for number, (what, blocks, tables, size) in enumerate(states):
        y = 20 + number * 106
        drawing.label(16, y, what, "text")
        x = 16.0
        for name, ids in tables.items():
            if name != "C":
                table(drawing, x, y + 14 + (name == "B") * 36, name, hues[name], ids)
        table(drawing, 130, y + 14, "C", hues["C"], tables["C"])
        pool(drawing, 236, y + 24, [Block(blocks.get(block, "")) for block in range(size)])
    drawing.label(448, 252 + 28, "four blocks of memory", "small")
    drawing.label(448, 252 + 46, "are released", "small")
    return drawing


def _loop() -> Drawing:
    """The calls of one step, and what passes between the manager and its caller."""
    drawing = Drawing(
        720,
        392,
        "One step of the batch manager",
        "add_request puts a leader in the queue. process_batch shrinks the pool, schedules, runs the plan, "
        "reports it as computed and concludes it with forks. The caller samples and commits tokens, and the "
        "loop repeats.",
    )
    drawing.box(16, 40, 168, 74, "panel", ["the caller", "has requests,", "samples tokens"])
    drawing.box(
        16, 250, 168, 92, "panel", ["waiting, running", "sequences with", "their tables;", "no arrays"]
    )
    drawing.box(250, 16, 300, 340, "zone", ["process_batch"])
    steps = (
        ("shrink_pool", "moves blocks: before any plan", "blue"),
        ("_schedule", "chunks, pages, copies", "blue"),
        ("run_plan", "resize, swap, copy, forward pass", "orange"),
        ("computed", "full blocks may be shared now", "blue"),
        ("conclude", "assigns rows; forks leaders", "violet"),
    )
    for number, (name, what, hue) in enumerate(steps):
        y = 52 + number * 60
        drawing.box(266, y, 268, 48, hue, [name, what])
    drawing.box(586, 160, 118, 74, "teal", ["KVPool", "keys, values"])
    drawing.arrow([(534, 196), (582, 196)])
    drawing.arrow([(100, 114), (100, 246)])
    drawing.label(108, 170, "add_request,", "small")
    drawing.label(108, 187, "commit", "small")
    drawing.arrow([(184, 296), (232, 296), (232, 136), (262, 136)])
    drawing.arrow([(400, 340), (400, 376), (8, 376), (8, 77), (13, 77)], dashed=True)
    drawing.label(412, 380, "StepLogits: the logits of ready sequences", "small")
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {
    "packed": _packed,
    "gather": _gather,
    "partitions": _partitions,
    "stacked": _stacked,
    "beams": _beams,
    "compaction": _compaction,
    "loop": _loop,
}
