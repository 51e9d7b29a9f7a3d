"""The figures of week 3's overview: what happens to one pool, and which day uses which idea."""

from collections.abc import Callable, Sequence

from .blocks import Block, legend, pool
from .drawing import Drawing, Point

A, B, BOTH = Block("blue", "A"), Block("orange", "B"), Block("blue orange", "A, B")
IDLE, FREE = Block("green", "idle"), Block()

ROWS: Sequence[tuple[str, Sequence[str], Sequence[Block]]] = (
    (
        "3.1, 3.2 c",
        ("B is a fork of A: they share", "two blocks and copied one"),
        (BOTH, BOTH, A, FREE, B, FREE, B, FREE),
    ),
    ("3.2 d", ("compaction: used blocks move to", "the front, the end is released"), (BOTH, BOTH, A, B, B)),
    (
        "3.4",
        ("A ended, the pool has grown. Only", "the cache holds A's last full block"),
        (B, B, IDLE, B, B, FREE, FREE, FREE),
    ),
    (
        "3.5",
        ("B's window has passed its first two", "blocks: they are idle now"),
        (IDLE, IDLE, IDLE, B, B, FREE, FREE, FREE),
    ),
    (
        "3.6",
        ("B is preempted: its blocks are on", "the host, the pool is for others"),
        (IDLE, IDLE, IDLE, FREE, FREE, FREE, FREE, FREE),
    ),
)


def _pool() -> Drawing:
    """The states of one pool from day 3.1 to 3.6."""
    drawing = Drawing(
        720,
        456,
        "One pool through the week",
        "After a fork, A and B share blocks 0 and 1. Compaction moves used blocks to the front. "
        "When A has ended, "
        "its full block is idle. A window frees B's first blocks. When B is preempted, its blocks "
        "are on the host.",
    )
    for place, (day, lines, blocks) in enumerate(ROWS):
        y = 30 + place * 80
        drawing.label(16, y + 10, day, "name")
        for line, text in enumerate(lines):
            drawing.label(16, y + 29 + line * 17, text, "small")
        pool(drawing, 290, y, blocks)
    legend(drawing, 290, 442, {"blue": "A's", "orange": "B's", "green": "only the cache's", "free": "free"})
    return drawing


DAYS = (
    ("3.1", ("allocator, tables,", "forks"), 16, 130, "green"),
    ("3.2", ("kernel, beams,", "batch manager"), 200, 30, "orange"),
    ("3.3", ("slots, a named", "cache"), 200, 130, "teal"),
    ("3.4", ("prefix caching", ""), 200, 230, "blue"),
    ("3.5", ("sliding windows", ""), 384, 230, "blue"),
    ("3.6", ("preemption,", "swap"), 384, 130, "blue"),
    ("3.7", ("the engine", ""), 568, 130, "blue"),
)
USES: Sequence[Sequence[Point]] = (
    ((152, 150), (176, 150), (176, 66), (198, 66)),
    ((152, 166), (198, 166)),
    ((152, 182), (176, 182), (176, 266), (198, 266)),
    ((336, 266), (382, 266)),
    ((336, 66), (452, 66), (452, 128)),
    ((306, 230), (306, 216), (420, 216), (420, 204)),
    ((520, 166), (566, 166)),
)


def _order() -> Drawing:
    """Which day uses which idea; an arrow is an idea, not code."""
    drawing = Drawing(
        720,
        330,
        "The ideas of week 3",
        "Day 3.1 comes first. 3.2, 3.3 and 3.4 use its tables. 3.5 uses 3.4's cache. 3.6 uses the "
        "batch manager of "
        "3.2 and the hashes of 3.4. 3.7 is the loop around all of them.",
    )
    for points in USES:
        drawing.arrow(points)
    for day, lines, x, y, hue in DAYS:
        drawing.box(x, y, 136, 72, hue, [day, *lines])
    note = "An arrow is an idea that you will meet again. No day needs the code of another day."
    drawing.label(16, 322, note, "small")
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {"pool": _pool, "order": _order}
