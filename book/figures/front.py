"""The figures of the pages before the weeks: the overlay, MLX arrays, layouts, the states of a block."""

from collections.abc import Callable

from .blocks import CELL, GAP
from .drawing import Drawing


def _overlay() -> Drawing:
    """Two folders on one path: an import takes the learner's file if there is one."""
    drawing = Drawing(
        720,
        290,
        "The overlay",
        "The package tiny_llm searches two folders. The import of paged_attention finds the file "
        "in src/tiny_llm, "
        "which is yours. The imports of kv_pool and model find nothing there and take the reference's files.",
    )
    drawing.label(16, 26, "an import in the engine", "small")
    drawing.label(262, 26, "src/tiny_llm: yours, searched first", "small")
    drawing.label(506, 26, "src/tiny_llm_ref: the reference", "small")
    drawing.box(250, 36, 214, 238, "zone")
    drawing.box(494, 36, 210, 238, "zone")
    for place, (name, is_yours) in enumerate(
        (("paged_attention", True), ("kv_pool", False), ("model", False))
    ):
        y = 58 + place * 72
        drawing.box(16, y, 196, 52, "panel", ["from tiny_llm import", f"  {name}"])
        if is_yours:
            drawing.box(266, y, 182, 52, "green", [f"{name}.py", "runs"])
            drawing.box(510, y, 178, 52, "panel dim", [f"{name}.py", "not used"])
            drawing.arrow([(212, y + 26), (264, y + 26)])
        else:
            drawing.cell(266, y + 8, 182, 36, "free", "no such file")
            drawing.box(510, y, 178, 52, "blue", [f"{name}.py", "runs"])
            drawing.arrow([(212, y + 26), (264, y + 26)])
            drawing.arrow([(448, y + 26), (508, y + 26)])
    return drawing


def _axis_order() -> Drawing:
    """The shape of pool[b, :, o], axis by axis."""
    drawing = Drawing(
        640,
        250,
        "The axes of pool[b, :, o]",
        "The pool has the axes N, Hkv, block_size and D. The index arrays b and o, of T entries, "
        "replace N and "
        "block_size. Their common axis T comes first in the result, which is T, Hkv, D.",
    )
    names, indices = ("N", "Hkv", "block_size", "D"), ("b", ":", "o", "")
    drawing.label(16, 50, "the pool", "small")
    drawing.label(16, 120, "the index", "small")
    drawing.label(16, 220, "the result", "small")
    for place, (name, index) in enumerate(zip(names, indices, strict=True)):
        x = 130 + place * 124
        hue = "orange" if index in ("b", "o") else "blue"
        drawing.cell(x, 28, 108, 36, hue, name)
        if index:
            drawing.cell(x, 98, 108, 36, hue, index, "T ids" if index in ("b", "o") else "all heads")
            drawing.arrow([(x + 54, 64), (x + 54, 96)])
    drawing.cell(130, 198, 108, 36, "orange", "T")
    drawing.cell(254, 198, 108, 36, "blue", "Hkv")
    drawing.cell(378, 198, 108, 36, "blue", "D")
    drawing.arrow([(184, 134), (184, 196)])
    drawing.arrow([(308, 134), (308, 196)])
    drawing.arrow([(432, 134), (432, 164), (214, 164), (214, 196)])
    drawing.arrow([(556, 64), (556, 178), (432, 178), (432, 196)])
    drawing.label(502, 206, "token t is at", "small")
    drawing.label(502, 223, "block b[t], offset o[t]", "small")
    return drawing


def _lazy_read() -> Drawing:
    """A write that happens in place, and one that copies because a reader waits."""
    drawing = Drawing(
        700,
        274,
        "A write with and without an unevaluated reader",
        "Without a reader, evaluating the write changes the old memory. With an unevaluated reader "
        "of the old array, "
        "MLX copies the whole array and writes into the copy; the reader then gets the old data.",
    )
    drawing.label(16, 26, "nothing else needs the old pool", "head")
    drawing.box(16, 42, 130, 46, "teal", ["pool", "memory A"])
    drawing.box(196, 42, 130, 46, "teal", ["pool, written", "memory A"])
    drawing.arrow([(146, 65), (194, 65)])
    drawing.label(16, 118, "in place: as cheap as what is written", "small")
    drawing.label(370, 26, "a lazy read waits", "head")
    drawing.box(370, 42, 130, 46, "teal", ["pool", "memory A"])
    drawing.box(554, 42, 130, 46, "teal", ["pool, written", "memory B"])
    drawing.box(370, 138, 130, 46, "violet", ["reader", "old data, from A"])
    drawing.arrow([(500, 65), (552, 65)])
    drawing.arrow([(435, 88), (435, 136)])
    drawing.label(516, 118, "copies the whole pool", "small")
    drawing.line((350, 14), (350, 214), "grid")
    drawing.label(370, 208, "correct, but it costs a copy", "small")
    drawing.label(
        16,
        244,
        "This is how MLX's own operators write. The compiled kernel always writes in place: a",
        "small",
    )
    drawing.label(16, 261, "lazy read that is evaluated after the kernel's write gets the new data.", "small")
    return drawing


def _states() -> Drawing:
    """The states of a block, and what moves it from one to the next."""
    drawing = Drawing(
        720,
        420,
        "The states of a block",
        "A free block becomes held by allocate. Held blocks become shared by fork, "
        "and cached when "
        "they are full and the prefix cache adds them. When the last table releases a cached block "
        "it is idle; "
        "eviction makes it free, a hit makes it held again. Swapping copies held blocks to the host.",
    )
    drawing.box(16, 156, 150, 76, "panel", ["free", "in the free queue", "0 holders"])
    drawing.box(276, 156, 168, 76, "blue", ["held", "one table", "1 holder"])
    drawing.box(536, 156, 168, 76, "blue", ["shared", "k tables", "k holders"])
    drawing.box(276, 326, 168, 76, "teal", ["held and cached", "k tables + the cache", "k + 1 holders"])
    drawing.box(16, 326, 150, 76, "green", ["idle", "the cache only", "1 holder"])
    drawing.box(
        276, 20, 168, 76, "violet", ["swapped out", "a copy in the host's", "pool; this block is free"]
    )
    drawing.arrow([(166, 180), (274, 180)])
    drawing.label(220, 172, "allocate", "small", "middle")
    drawing.arrow([(276, 212), (168, 212)])
    drawing.label(220, 228, "release", "small", "middle")
    drawing.arrow([(444, 180), (534, 180)])
    drawing.label(489, 172, "fork", "small", "middle")
    drawing.arrow([(536, 212), (446, 212)])
    drawing.label(489, 228, "release,", "small", "middle")
    drawing.label(489, 244, "copy on write", "small", "middle")
    drawing.arrow([(336, 232), (336, 324)])
    drawing.label(344, 276, "full: the cache adds it", "small")
    drawing.arrow([(620, 232), (620, 364), (446, 364)])
    drawing.label(628, 304, "full: added", "small")
    drawing.arrow([(276, 350), (168, 350)])
    drawing.label(220, 342, "last release", "small", "middle")
    drawing.arrow([(166, 384), (274, 384)])
    drawing.label(220, 400, "prefix hit", "small", "middle")
    drawing.arrow([(66, 326), (66, 234)])
    drawing.label(74, 284, "evict", "small")
    drawing.arrow([(336, 156), (336, 98)])
    drawing.label(328, 130, "preempted: copied to the host", "small", "end")
    drawing.arrow([(390, 96), (390, 154)])
    drawing.label(398, 130, "runs again: copied into free blocks", "small")
    return drawing


def _layouts() -> Drawing:
    """One head's tokens in a contiguous cache and in a block of the pool; a packed row of two sequences."""
    drawing = Drawing(
        720,
        360,
        "Layouts of keys and values",
        "In a contiguous cache, each head has all its tokens in a row. In the pool, each block has "
        "for each head the "
        "tokens of the block in a row. A packed row has the step's tokens of all sequences, one "
        "after another.",
    )
    drawing.label(16, 26, "week 2, one sequence: [Hkv, S, D]", "head")
    for head in range(2):
        y = 38 + head * 34
        drawing.label(16, y + 18, f"head {head}", "small")
        for token in range(8):
            drawing.cell(
                74 + token * 40, y, 38, 28, "blue" if token < 6 else "free", str(token) if token < 6 else ""
            )
    drawing.label(410, 56, "a head's tokens are next to each other:", "small")
    drawing.label(410, 73, "a query reads them in one run", "small")
    drawing.label(16, 140, "the pool: [N, Hkv, block_size, D]", "head")
    owners = (("orange", "0123"), ("", ""), ("blue", "45"), ("blue", "0123"))
    for block, (hue, texts) in enumerate(owners):
        x = 74 + block * (4 * 34 + 14)
        drawing.label(x + 68, 166, f"block {block}", "note", "middle")
        for head in range(2):
            y = 172 + head * 34
            for offset in range(4):
                text = texts[offset : offset + 1]
                drawing.cell(x + offset * 34, y, 32, 28, hue if text else "free", text)
    drawing.label(16, 190, "head 0", "small")
    drawing.label(16, 224, "head 1", "small")
    drawing.label(
        74, 258, "the blue sequence's block table is [3, 2]: block 3 has its first four tokens", "small"
    )
    drawing.label(16, 292, "a packed step: [1, T]", "head")
    row = [("blue", "6"), *(("orange", str(token)) for token in range(4, 9)), ("violet", "31")]
    for place, (hue, text) in enumerate(row):
        drawing.cell(74 + place * (CELL + GAP), 304, CELL, 30, hue, text)
    drawing.label(16, 323, "tokens", "small")
    drawing.label(422, 315, "one decode, a prompt chunk of 5,", "small")
    drawing.label(422, 332, "another decode: no padding", "small")
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {
    "overlay": _overlay,
    "axis_order": _axis_order,
    "lazy_read": _lazy_read,
    "states": _states,
    "layouts": _layouts,
}
