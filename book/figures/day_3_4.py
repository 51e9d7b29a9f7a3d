"""The figures of day 3.4: shared tables, hashes, the states of a block, eviction, duplicates, adoption.

Green is the prefix cache; blue, orange and teal are sequences. A block has the hues of all its holders.
"""

from collections.abc import Callable, Sequence

from .blocks import CELL, GAP, Block, legend, pool, table, tokens
from .drawing import Drawing, Point

SYSTEM = ("You", "keep", "the", "light", "and", "reply", "in", "rhyme")
WHO = ("Who", "are", "you", "?")
MOON = ("What", "is", "the", "moon")


def _users() -> Drawing:
    """Three tables with a common system prompt: fourteen entries, eight blocks."""
    drawing = Drawing(
        640,
        252,
        "Three users of one system prompt",
        "The tables are [42, 87, 15, 23], [42, 87, 15, 64, 91] and [42, 87, 15, 33, 78]: 14 entries, 8 "
        "blocks. Blocks 42, 87 and 15 have three holders each.",
    )
    drawing.label(16, 24, "14 entries in three block tables", "small")
    rows: Sequence[tuple[str, str, list[int], str]] = (
        ("A", "blue", [23], "15 tokens"),
        ("B", "orange", [64, 91], "17 tokens"),
        ("C", "teal", [33, 78], "18 tokens"),
    )
    shared, own = [42, 87, 15], []
    for place, (name, hue, ids, length) in enumerate(rows):
        y = 36 + place * 38
        end = table(drawing, 16, y, name, hue, [*shared, *ids])
        drawing.label(end + 8, y + 20, length, "small")
        own += [(block, hue) for block in ids]
    drawing.label(16, 170, "8 blocks in the pool", "small")
    everyone = "blue orange teal"
    for place, (block, hues) in enumerate([*((block, everyone) for block in shared), *own]):
        x = 16 + place * (CELL + 8)
        drawing.label(x + CELL / 2, 190, str(block), "note", "middle")
        drawing.cell(x, 196, CELL, CELL, hues, "", "3 refs" if hues == everyone else "1 ref")
    drawing.label(350, 60, "the system prompt, 12 tokens:", "small")
    drawing.label(350, 78, "42, 87 and 15, in all three tables", "small")
    return drawing


def _chain() -> Drawing:
    """Two prompts in blocks of four; the hashes branch where the texts differ."""
    drawing = Drawing(
        716,
        300,
        "Chained hashes",
        "A: You keep the light, and reply in rhyme, Who are you ?. B has the same first two blocks, then "
        "What is the moon, and a single token. Each hash covers its block and the hash before it. h0 and h1 "
        "are equal for both; the third hashes differ.",
    )
    left, width, group = 86, 44, 192
    for y, name, hue, last in ((28, "A", "blue", WHO), (246, "B", "orange", MOON)):
        drawing.label(60, y + 18, name, "name")
        for place, words in enumerate((SYSTEM[:4], SYSTEM[4:], last)):
            tokens(drawing, left + place * group, y, hue, words, width)
    tokens(drawing, left + 3 * group, 246, "orange", ["?"], width)
    drawing.label(left + 3 * group + 22, 290, "no hash", "note", "middle")
    boxes: Sequence[tuple[float, float, float, str, str, str]] = (
        (4, 130, 74, "panel", "root", "of the salt"),
        (left + 12, 130, 158, "green", "h0", "root + You keep the light"),
        (left + group + 12, 130, 158, "green", "h1", "h0 + and reply in rhyme"),
        (left + 2 * group + 12, 82, 158, "green", "h2", "h1 + Who are you ?"),
        (left + 2 * group + 12, 178, 158, "green", "another h2", "h1 + What is the moon"),
    )
    for at, top, size, hue, name, note in boxes:
        drawing.cell(at, top, size, 40, hue, name, note)
    end = left + group + 170
    for points in (
        [(78, 150), (96, 150)],
        [(left + 170, 150), (left + group + 10, 150)],
        [(end, 150), (end + 16, 150), (end + 16, 102), (end + 32, 102)],
        [(end, 150), (end + 16, 150), (end + 16, 198), (end + 32, 198)],
    ):
        drawing.arrow(points)
    for place in (0, 1):
        middle = left + place * group + 91
        drawing.arrow([(middle, 56), (middle, 128)])
        drawing.arrow([(middle, 244), (middle, 172)])
    middle = left + 2 * group + 91
    drawing.arrow([(middle, 56), (middle, 80)])
    drawing.arrow([(middle, 244), (middle, 220)])
    return drawing


def _states() -> Drawing:
    """The four states of a block, and the operations between them."""
    drawing = Drawing(
        700,
        330,
        "The four states of a block",
        "A table allocates a free block: private. The cache adds it when it is full: in use. Its last table "
        "releases it: idle. A new table shares it: in use again. The cache evicts it: free. A private block "
        "that its last table releases is free at once.",
    )
    for x, y, hues, name, who, count in (
        (20, 50, "free", "free", "no holder", "ref_count 0"),
        (470, 50, "blue", "private", "tables", "ref_count 1 or more"),
        (470, 230, "blue green", "in use", "tables and the cache", "ref_count 2 or more"),
        (20, 230, "green", "idle", "only the cache", "ref_count 1; queued"),
    ):
        drawing.box(x, y, 210, 78, "panel", ["", "", ""])
        drawing.cell(x + 12, y + 17, CELL, CELL, hues)
        drawing.label(x + 68, y + 26, name, "name")
        drawing.label(x + 68, y + 45, who, "small")
        drawing.label(x + 68, y + 63, count, "small")
    labelled: Sequence[tuple[Point, Point, float, float, str, str]] = (
        ((232, 74), (468, 74), 350, 66, "a table allocates it", "middle"),
        ((468, 108), (232, 108), 350, 124, "its last table releases it", "middle"),
        ((575, 130), (575, 228), 565, 172, "full: the cache", "end"),
        ((468, 254), (232, 254), 350, 246, "its last table releases it", "middle"),
        ((232, 288), (468, 288), 350, 304, "a new table shares it", "middle"),
        ((125, 228), (125, 130), 135, 172, "the cache", "start"),
    )
    for start, end, at, baseline, text, anchor in labelled:
        drawing.arrow([start, end])
        drawing.label(at, baseline, text, "small", anchor)
    drawing.label(565, 188, "adds it", "small", "end")
    drawing.label(135, 188, "evicts it", "small")
    drawing.label(20, 30, "not kept: no hash leads to it", "small")
    drawing.label(20, 216, "kept", "small")
    return drawing


def _queue(drawing: Drawing, y: float, ids: Sequence[int], gone: int) -> None:
    """A queue of idle blocks, the next to be evicted first; the first `gone` are evicted."""
    for place, block in enumerate(ids):
        hue = "free" if place < gone else "green"
        drawing.cell(220 + place * (CELL + GAP), y, CELL, 34, hue, str(block))


def _eviction() -> Drawing:
    """A tree of four kept blocks, evicted from the leaves and, wrongly, with a parent first."""
    drawing = Drawing(
        680,
        262,
        "Leaves first",
        "Block 7 is the parent of 2, and 2 is the parent of 5 and 9. In the queue 5, 9, 2, 7 two evictions "
        "leave 2 and 7, and the next prompt finds both. In the queue 5, 7, 2, 9 they leave 2 and 9, which "
        "cannot be found without 7.",
    )
    drawing.label(16, 24, "idle blocks", "small")
    tree: Sequence[tuple[float, float, int, str]] = (
        (66, 40, 7, "You keep the light"),
        (66, 118, 2, "and reply in rhyme"),
        (16, 196, 5, "Who …"),
        (116, 196, 9, "What …"),
    )
    for x, y, block, words in tree:
        drawing.cell(x, y, CELL, 34, "green", str(block))
        drawing.label(x + CELL / 2, y + 48, words, "note", "middle")
    drawing.arrow([(88, 92), (88, 116)])
    drawing.arrow([(76, 170), (42, 194)])
    drawing.arrow([(100, 170), (134, 194)])
    for y, name, ids, found in (
        (70, "each table's last block first", [5, 9, 2, 7], ["the next prompt", "finds 7 and 2"]),
        (176, "each table's first block first", [5, 7, 2, 9], ["the next prompt", "misses at 7: nothing"]),
    ):
        drawing.label(220, y - 12, name, "small")
        _queue(drawing, y, ids, 2)
        drawing.label(220 + CELL + GAP / 2, y + 52, "evicted", "small", "middle")
        drawing.arrow([(416, y + 17), (446, y + 17)])
        for line, text in enumerate(found):
            drawing.label(456, y + 13 + line * 18, text, "text")
    drawing.label(220, 30, "the queue, its front on the left", "small")
    return drawing


def _duplicates() -> Drawing:
    """Two sequences have computed the same two blocks; `keep` stores them once."""
    drawing = Drawing(
        650,
        398,
        "One copy of equal blocks",
        "A has computed blocks 7, 2 and 5, B has 3, 6, 9 and 4; 3 holds the same tokens as 7, and 6 the "
        "same as 2. keep for A adds 7, 2 and 5 to the cache. keep for B exchanges 3 for 7 and 6 for 2, and "
        "adds 9. Blocks 3 and 6 are free.",
    )
    words = {2: "and…", 3: "You…", 4: "?", 5: "Who…", 6: "and…", 7: "You…", 8: "", 9: "What…"}
    own = dict.fromkeys((7, 2, 5), "blue") | dict.fromkeys((3, 6, 9, 4), "orange")
    after_a = own | dict.fromkeys((7, 2, 5), "blue green")
    after_b = {
        7: "blue orange green",
        2: "blue orange green",
        5: "blue green",
        9: "orange green",
        4: "orange",
    }
    rows: Sequence[tuple[str, list[int], dict[int, str]]] = (
        ("both have computed the system prompt", [3, 6, 9, 4], own),
        ("keep for A: all three hashes are new, so add 7, 2 and 5", [3, 6, 9, 4], after_a),
        ("keep for B: exchange 3 for 7 and 6 for 2, add 9", [7, 2, 9, 4], after_b),
    )
    for place, (text, other, hues) in enumerate(rows):
        y = 22 + place * 120
        drawing.label(16, y, text, "text")
        table(drawing, 16, y + 18, "A", "blue", [7, 2, 5])
        table(drawing, 16, y + 54, "B", "orange", other)
        blocks = [
            Block(hues[block], words[block], f"{count} ref{'s' * (count > 1)}")
            if (count := len(hues.get(block, "").split()))
            else Block()
            for block in words
        ]
        pool(drawing, 244, y + 30, blocks, first=2)
    legend(drawing, 16, 382, {"blue": "A", "orange": "B", "green": "the cache", "free": "free"})
    return drawing


def _adopt() -> Drawing:
    """What two prompts share and what they compute, when all their full blocks are kept."""
    drawing = Drawing(
        700,
        212,
        "The last token is always computed",
        "After adopt and before adopt_part: B has 13 tokens, of which 8 are shared and 5 remain. The system "
        "prompt itself has 8 tokens and both blocks are kept, but only 4 are shared, because the last token "
        "must be computed.",
    )
    width, step = 44, 46
    rows: Sequence[tuple[float, str, Sequence[str], int]] = (
        (44, "13 tokens; the first two blocks are kept; before adopt_part", (*SYSTEM, *MOON, "?"), 8),
        (142, "8 tokens; both blocks are kept; before adopt_part", SYSTEM, 4),
    )
    for y, text, words, shared in rows:
        drawing.label(16, y - 14, text, "text")
        for place, word in enumerate(words):
            x = 16 + place * step + place // 4 * 8
            drawing.cell(x, y, width, 26, "green" if place < shared else "orange", word)
        x = 16 + shared * step + shared // 4 * 8
        drawing.label(16, y + 44, f"shared: {shared}", "small")
        drawing.label(x, y + 44, f"left to compute: {len(words) - shared}", "small")
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {
    "users": _users,
    "chain": _chain,
    "states": _states,
    "eviction": _eviction,
    "duplicates": _duplicates,
    "adopt": _adopt,
}
