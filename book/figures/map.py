"""The map of the engine that returns in every chapter: today's boxes are lit, the others are dimmed."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from .drawing import Drawing

WIDTH, HEIGHT = 720, 544
ATTENTION = ("1.1", "1.2", "1.3", "2.5", "3.2", "3.5")
CACHES = ("2.1", "2.2", "2.3", "3.2", "3.3")


class Box(NamedTuple):
    """A part of the engine: the days that build it, its text, and its place: x, y, width and height."""

    days: tuple[str, ...]
    name: str
    lines: tuple[str, ...]
    place: tuple[float, float, float, float]
    hue: str


BOXES = (
    Box((), "client, server", ("HTTP, OpenAI's API",), (16, 12, 150, 70), "panel"),
    Box(
        ("3.7",),
        "engine",
        ("one thread owns all arrays; an inbox and an outbox",),
        (196, 12, 496, 70),
        "blue",
    ),
    Box(
        ("2.6", "2.7", "3.2"),
        "batch manager",
        ("schedules, runs and", "commits each step"),
        (16, 112, 170, 88),
        "blue",
    ),
    Box(("3.6",), "preemption, swap", ("what to do when", "blocks run out"), (206, 112, 160, 88), "blue"),
    Box(("3.4", "3.5"), "prefix cache", ("full blocks, found by", "content"), (376, 112, 158, 88), "blue"),
    Box(("3.2",), "beam search", ("hypotheses that", "share blocks"), (544, 112, 148, 88), "blue"),
    Box(
        ("3.1", "3.2", "3.5"),
        "block tables, allocator",
        ("which blocks have which tokens;", "windows; compaction"),
        (16, 230, 350, 88),
        "green",
    ),
    Box(
        ("3.2", "3.3"),
        "packed step",
        ("all tokens of a step as one row,", "and a slot for each"),
        (396, 230, 296, 88),
        "orange",
    ),
    Box(("1.4", "1.5", "2.4"), "model", ("embedding, 30 layers,", "logits"), (16, 348, 206, 88), "orange"),
    Box(
        ATTENTION, "attention", ("heads, positions, tiles,", "pages, windows"), (250, 348, 206, 88), "orange"
    ),
    Box(CACHES, "keys and values", ("one cache, then a pool", "of pages"), (484, 348, 208, 88), "teal"),
    Box(("1.7",), "sampler", ("from logits to one token",), (16, 464, 206, 70), "violet"),
    Box(("1.6",), "text", ("tokens to text, streamed",), (250, 464, 206, 70), "violet"),
)
ARROWS = (
    ((166, 47), (194, 47)),
    ((220, 82), (220, 97), (100, 97), (100, 110)),
    ((186, 156), (204, 156)),
    ((100, 200), (100, 228)),
    ((281, 200), (281, 228)),
    ((455, 200), (455, 214), (330, 214), (330, 228)),
    ((618, 200), (618, 214), (330, 214), (330, 228)),
    ((366, 274), (394, 274)),
    ((560, 318), (560, 333), (120, 333), (120, 346)),
    ((222, 392), (248, 392)),
    ((456, 392), (482, 392)),
    ((119, 436), (119, 462)),
    ((222, 499), (248, 499)),
    ((16, 499), (6, 499), (6, 156), (14, 156)),  # the sampled token joins its sequence
    ((456, 499), (706, 499), (706, 47), (694, 47)),  # the text leaves by the outbox
)


def draw(day: str | None) -> Drawing:
    """The map with the boxes of one day lit; the whole map for None."""
    names = [box.name for box in BOXES if day in box.days]
    title = f"The engine, with day {day} lit" if day else "The engine"
    drawing = Drawing(
        WIDTH, HEIGHT, title, f"Lit: {', '.join(names)}." if day else "All parts of the engine."
    )
    for points in ARROWS:
        drawing.arrow(points)
    for box in BOXES:
        is_lit = day is None or day in box.days
        style = f"{box.hue} {'lit' if day and is_lit else '' if is_lit else 'dim'}".strip()
        x, y, _, height = box.place
        drawing.box(*box.place, style, [box.name, *box.lines])
        drawing.label(x + 14, y + height - 9, "  ".join(box.days), "note")
    return drawing


DAYS = sorted({day for box in BOXES for day in box.days})
FIGURES: dict[str, Callable[[], Drawing]] = {day or "all": partial(draw, day) for day in (None, *DAYS)}
