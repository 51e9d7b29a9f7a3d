"""The figures of day 3.6: admission, a preemption, host blocks, the copies of a swap, and coming back."""

from collections.abc import Callable, Mapping, Sequence

from .blocks import Block, legend, pool, table
from .drawing import Drawing

A, B, C = "blue", "orange", "teal"  # the sequences of the chapter's example
HUE_OF = {"A": A, "B": B, "C": C}


def _blocks(text: str) -> list[Block]:
    """Blocks from words such as `A`, `B:3/4`, and `-` for a free one."""
    parts = [word.partition(":") for word in text.split()]
    return [Block() if name == "-" else Block(HUE_OF[name], name, note) for name, _, note in parts]


def _admission() -> Drawing:
    """Three requests in a pool of nine blocks: what each reserves under two policies."""
    drawing = Drawing(
        660,
        190,
        "Reservations under two policies",
        "The pool has nine blocks. Reserving the longest answer takes four blocks for each of A, B and C, "
        "so C does not fit. Reserving the known tokens and one more block takes three each, and all fit.",
    )
    for row, (what, count) in enumerate((("longest answer", 4), ("known tokens + a block", 3))):
        y = 30 + row * 66
        drawing.label(16, y + 21, what, "small")
        for place in range(3 * count):
            name = "ABC"[place // count]
            drawing.cell(174 + place * 38, y, 34, 34, HUE_OF[name], name)
    end = 174 + 9 * 38 - 2
    drawing.line((end, 18), (end, 144))
    drawing.label(end, 162, "the pool ends here: 9 blocks", "small", "middle")
    drawing.label(174 + 12 * 38, 84, "C must wait", "small", "end")
    return drawing


def _pressure() -> Drawing:
    """The pool before a preemption, after it, and when the sequence runs again."""
    drawing = Drawing(
        680,
        486,
        "A preemption, step by step",
        "After step 7 all nine blocks are held. In step 8 A needs a fourth block: C is preempted, its "
        "blocks 4, 5 and 8 are released, and A takes block 8. In step 11, A has ended, and C runs again in "
        "blocks 4, 8 and 6.",
    )
    rows: Sequence[tuple[str, Mapping[str, tuple[str, Sequence[int]]], Sequence[Block]]] = (
        (
            "after step 7: A has 12 computed tokens, B and C have 11",
            {"A": (A, [0, 1, 6]), "B": (B, [2, 3, 7]), "C": (C, [4, 5, 8])},
            _blocks("A A B B C C A B:3/4 C:3/4"),
        ),
        (
            "step 8: A needs a block, C is the newest; C waits, A takes block 8",
            {"A": (A, [0, 1, 6, 8]), "B": (B, [2, 3, 7]), "C": (C, [])},
            _blocks("A A B B - - A B A:1/4"),
        ),
        (
            "step 11: A has ended, and C runs again; its blocks have another order",
            {"B": (B, [2, 3, 7, 5]), "C": (C, [4, 8, 6])},
            _blocks("- - B B C B:3/4 C B C"),
        ),
    )
    for place, (what, tables, blocks) in enumerate(rows):
        y = 24 + place * 154
        drawing.label(16, y, what, "text")
        for line, (name, (hue, ids)) in enumerate(tables.items()):
            table(drawing, 16, y + 14 + line * 36, name, hue, ids)
        if not tables.get("C", (C, [0]))[1]:
            drawing.label(38, y + 14 + 2 * 36 + 18, "waits: 11 tokens to recompute or swap in", "small")
        pool(drawing, 236, y + 34, blocks)
    legend(drawing, 16, 474, {A: "A", B: "B", C: "C", "free": "free"})
    return drawing


def _host() -> Drawing:
    """Two completions of a prompt on the host: two blocks with two holders, two with one."""
    drawing = Drawing(
        680,
        236,
        "Host blocks and their holders",
        "P/0 has blocks 3, 4 and 5 of the pool, P/1 has 3, 4 and 7. On the host, their common full blocks "
        "are stored once, in host blocks 0 and 1, with two holders each. Host blocks 2 and 3 have one.",
    )
    drawing.label(16, 24, "in the pool", "small")
    table(drawing, 16, 34, "P/0", "violet", [3, 4, 5])
    table(drawing, 16, 72, "P/1", "green", [3, 4, 7])
    drawing.label(16, 146, "on the host", "small")
    table(drawing, 16, 156, "P/0", "violet", ["h0", "h1", "h2"])
    table(drawing, 16, 194, "P/1", "green", ["h0", "h1", "h3"])
    both = "violet green"
    in_pool = [Block(both, "0-3"), Block(both, "4-7"), Block("violet", "8 9"), Block(), Block("green", "8 9")]
    pool(drawing, 220, 46, in_pool, first=3)
    drawing.label(482, 58, "0 to 7 are the prompt's tokens,", "small")
    drawing.label(482, 75, "8 and 9 each completion's own", "small")
    for place, (hues, text, holders) in enumerate(
        ((both, "0-3", "2"), (both, "4-7", "2"), ("violet", "8 9", "1"), ("green", "8 9", "1"))
    ):
        x = 220 + place * 48
        drawing.label(x + 22, 162, f"h{place}", "note", "middle")
        drawing.cell(x, 168, 44, 44, hues, text)
        drawing.label(x + 22, 226, holders, "note", "middle")
    drawing.label(212, 226, "holders", "note", "end")
    drawing.label(434, 184, "4 blocks instead of 6: the full ones", "small")
    drawing.label(434, 201, "are shared, the others are not", "small")
    return drawing


def _copies() -> Drawing:
    """The content of four blocks of the pool and three host blocks, from step 7 to step 11."""
    drawing = Drawing(
        660,
        352,
        "The copies of a swap",
        "Step 8 first copies blocks 4, 5 and 8 to host blocks 0, 1 and 2, then A writes into block 8. "
        "Step 11 copies the host blocks back, into blocks 4, 8 and 6.",
    )
    heads = ("after step 7", "8: swap out", "8: write", "after step 10", "11: swap in")
    first, second, third = (C, "C 0-3"), (C, "C 4-7"), (C, "C 8-10")
    empty, a_full, b_two = ("free", ""), (A, "A 8-11"), (B, "B 12 13")
    rows: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (
        ("4", (first, first, empty, empty, first)),
        ("5", (second, second, empty, b_two, b_two)),
        ("6", (a_full, a_full, a_full, empty, third)),
        ("8", (third, third, (A, "A 12"), empty, second)),
        ("h0", (empty, first, first, first, first)),
        ("h1", (empty, second, second, second, second)),
        ("h2", (empty, third, third, third, third)),
    )
    for column, head in enumerate(heads):
        drawing.label(128 + column * 114, 24, head, "small", "middle")
    for row, (name, contents) in enumerate(rows):
        y = 36 + row * 40 + (26 if row > 3 else 0)
        drawing.label(60, y + 21, name, "name", "end")
        for column, (style, text) in enumerate(contents):
            drawing.cell(80 + column * 114, y, 96, 32, style, text)
    drawing.label(16, 212, "host", "small")
    drawing.label(16, 40, "pool", "small")
    drawing.arrow([(290, 172), (299, 172), (299, 318), (291, 318)])
    drawing.arrow([(536, 278), (527, 278), (527, 172), (535, 172)])
    return drawing


def _sources() -> Drawing:
    """Where the blocks of two tables come from when a sequence is swapped in."""
    drawing = Drawing(
        680,
        226,
        "Where each block comes from",
        "18 tokens were computed, blocks of four. The prefix cache has found the first 8. The ordinary table "
        "has blocks 0 and 1 and gets 2, 3 and 4 from the host. The windowed table releases blocks 0 and 1, "
        "skips to position 12, and gets blocks 3 and 4 from the host.",
    )
    drawing.label(16, 34, "block of the text", "small")
    for place in range(5):
        x = 180 + place * 76
        drawing.label(x + 35, 34, str(place), "small", "middle")
    rows = (
        ("ordinary table", ("green", "green", "teal", "teal", "teal")),
        ("windowed table", ("free", "free", "free", "teal", "teal")),
    )
    for row, (name, styles) in enumerate(rows):
        y = 46 + row * 58
        drawing.label(16, y + 25, name, "text")
        for place, style in enumerate(styles):
            text = {"green": "found", "teal": "host"}.get(style, "" if place == 2 else "release")
            note = "2 of 4" if place == 4 else ""
            drawing.cell(180 + place * 76, y, 72, 40, style, text, note)
    drawing.label(568, 71, "continues at 8", "small")
    drawing.label(568, 129, "skips to 12", "small")
    drawing.arrow([(180 + 2 * 76 - 2, 178), (180 + 2 * 76 - 2, 148)])
    drawing.label(180 + 2 * 76, 194, "found = 8 tokens", "small", "middle")
    drawing.arrow([(180 + 4 * 76 + 36, 178), (180 + 4 * 76 + 36, 148)])
    drawing.label(180 + 4 * 76 + 36, 194, "old = 18 tokens", "small", "middle")
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {
    "admission": _admission,
    "pressure": _pressure,
    "host": _host,
    "copies": _copies,
    "sources": _sources,
}
