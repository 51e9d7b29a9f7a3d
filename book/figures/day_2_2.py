"""The figures of day 2.2: reserved and used memory, an update of a contiguous cache, and growth."""

from collections.abc import Callable

from .blocks import legend
from .drawing import Drawing


def _reserved() -> Drawing:
    """Four caches that are as long as the longest answer, and a user who must wait."""
    drawing = Drawing(
        660,
        250,
        "Caches for the longest answer",
        "Four caches of 2,048 tokens hold 300, 120, 480 and 200 tokens. The memory is full, and a fifth user "
        "waits.",
    )
    users = (("A", "blue", 300), ("B", "orange", 120), ("C", "green", 480), ("D", "violet", 200))
    drawing.label(16, 24, "memory for four caches, each with 2,048 places", "small")
    for row, (name, hue, used) in enumerate(users):
        y = 36 + row * 40
        drawing.label(16, y + 20, name, "name")
        width = 520 * used / 2048
        drawing.cell(40, y, 520, 30, "free")
        drawing.cell(40, y, width, 30, hue)
        drawing.label(572, y + 20, f"{used} tokens", "small")
    drawing.label(16, 216, "E", "name")
    drawing.label(40, 216, "must wait, although most of the memory is empty", "text")
    legend(drawing, 16, 242, {"free": "reserved, no token stored", "blue": "A's tokens"})
    return drawing


def _update() -> Drawing:
    """A cache of 8 places with 2 heads: three tokens, then an update with two more."""
    drawing = Drawing(
        660,
        226,
        "An update of a contiguous cache",
        "k_cache has the shape [2, 8, D]. It holds tokens 0 to 2 of both heads. An update with two tokens "
        "writes places 3 and 4 of both heads, and current_len becomes 5.",
    )
    for left, title, stored, new in (
        (16, "before: current_len = 3", 3, 0),
        (346, "after: current_len = 5", 3, 2),
    ):
        drawing.label(left, 24, title, "head")
        for place in range(8):
            drawing.label(left + 74 + place * 28, 46, str(place), "note", "middle")
        for head in range(2):
            y = 54 + head * 38
            drawing.label(left, y + 18, f"head {head}", "small")
            for place in range(8):
                style = "blue" if place < stored else "orange" if place < stored + new else "free"
                drawing.cell(left + 61 + place * 28, y, 26, 28, style)
    drawing.label(16, 152, "k_cache: [2, 8, D] before and after; v_cache is the same", "text")
    drawing.label(16, 174, "returned: the first 5 places of both arrays, [2, 5, D]", "text")
    legend(
        drawing, 16, 208, {"blue": "stored before", "orange": "written by this update", "free": "no meaning"}
    )
    return drawing


def _growth() -> Drawing:
    """Eight tokens one by one: what each growth policy copies."""
    drawing = Drawing(
        660,
        236,
        "Three ways to grow to eight tokens",
        "Concatenating each token copies 1 + 2 + ... + 7 = 28 tokens. Steps of 4 copy 4. Blocks copy none.",
    )
    ways = (
        ("concatenate each token", [n - 1 for n in range(1, 9)]),
        ("steps of 4", [0, 0, 0, 0, 4, 0, 0, 0]),
        ("blocks of 4", [0] * 8),
    )
    drawing.label(200, 24, "old tokens copied when token 0, 1, ... 7 arrives", "small")
    for row, (name, copies) in enumerate(ways):
        y = 44 + row * 62
        drawing.label(16, y + 24, name, "text")
        for place, count in enumerate(copies):
            style = "rose" if count else "green"
            drawing.cell(200 + place * 42, y, 38, 38, style, str(count))
        drawing.label(548, y + 24, f"{sum(copies)} in all", "text")
    legend(drawing, 200, 226, {"rose": "old tokens are copied", "green": "nothing is copied"})
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {"reserved": _reserved, "update": _update, "growth": _growth}
