"""The map of the engine that returns in every chapter: today's boxes are lit, the others are dimmed."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from .drawing import Drawing

WIDTH, HEIGHT = 720, 520
ATTENTION = ("1.1", "1.2", "1.3", "2.5", "3.2")
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
        (196, 12, 508, 70),
        "blue",
    ),
    Box(("2.6", "2.7", "3.2"), "scheduler", ("what the next step", "computes"), (16, 110, 170, 88), "blue"),
    Box(("3.6",), "preemption, swap", ("what to do when", "blocks run out"), (196, 110, 170, 88), "blue"),
    Box(("3.4", "3.5"), "prefix cache", ("full blocks, found by", "content"), (376, 110, 158, 88), "blue"),
    Box(("3.2",), "beam search", ("hypotheses that", "share blocks"), (544, 110, 160, 88), "blue"),
    Box(
        ("3.1", "3.5"),
        "block tables, allocator",
        ("which block has which token",),
        (16, 226, 350, 70),
        "green",
    ),
    Box(("3.2", "3.3"), "packed step", ("all tokens of a step as one row",), (396, 226, 308, 70), "orange"),
    Box(("1.4", "1.5", "2.4"), "model", ("embedding, 30 blocks,", "logits"), (16, 324, 206, 88), "orange"),
    Box(
        ATTENTION,
        "attention",
        ("heads, positions, tiles,", "the paged kernel"),
        (250, 324, 206, 88),
        "orange",
    ),
    Box(CACHES, "keys and values", ("one cache, then a pool", "of pages"), (484, 324, 220, 88), "teal"),
    Box(("1.7",), "sampler", ("from logits to one token",), (16, 440, 206, 70), "violet"),
    Box(("1.6",), "text", ("tokens to text, streamed",), (250, 440, 206, 70), "violet"),
)
ARROWS = (
    ((166, 47), (194, 47)),
    ((280, 82), (280, 108)),
    ((100, 198), (100, 224)),
    ((281, 198), (281, 224)),
    ((455, 198), (455, 212), (330, 212), (330, 224)),
    ((366, 261), (394, 261)),
    ((560, 296), (560, 310), (120, 310), (120, 322)),
    ((222, 368), (248, 368)),
    ((456, 368), (482, 368)),
    ((119, 412), (119, 438)),
    ((222, 475), (248, 475)),
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
