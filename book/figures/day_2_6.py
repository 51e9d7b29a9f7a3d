"""The figures of day 2.6: a stall and its cure, what a sequence wants, and a budget over three steps."""

from collections.abc import Callable, Sequence

from .blocks import legend
from .drawing import Drawing

HUE_OF = {"A": "blue", "B": "orange", "C": "green"}


def _stall() -> Drawing:
    """The same prompt in one step and in chunks; below each step, the token that the others get."""
    drawing = Drawing(
        700,
        286,
        "A long prompt in one step, and in chunks",
        "In one step, the prompt takes as long as many decode steps, and the others get no token in that "
        "time. In six chunks, each step takes a sixth of it, and the others get a token after each step.",
    )
    decode, whole, chunk = 18, 420, 76
    _steps(drawing, 30, "the whole prompt in one step", [decode] * 4 + [whole] + [decode] * 4, whole)
    _steps(drawing, 150, "six chunks", [decode] * 4 + [chunk] * 6 + [decode] * 3, chunk)
    drawing.arrow([(16, 252), (684, 252)])
    drawing.label(684, 244, "time", "small", "end")
    legend(
        drawing,
        16,
        276,
        {
            "orange": "decodes of the others",
            "blue": "the long prompt",
            "green": "each of the others gets a token",
        },
    )
    return drawing


def _steps(drawing: Drawing, y: float, title: str, widths: Sequence[int], prompt: int) -> None:
    """Draw steps of these widths; those as wide as `prompt` also compute a part of the prompt."""
    drawing.label(16, y, title, "head")
    x = 16.0
    for width in widths:
        drawing.cell(x, y + 12, width - 3, 16, "orange")
        if width == prompt:
            text = "1,600 tokens" if width > 200 else "chunk"
            drawing.cell(x, y + 30, width - 3, 30, "blue", text)
        drawing.cell(x + width - 13, y + 66, 11, 11, "green")
        x += width
    if prompt > 200:
        drawing.label(16 + 4 * 18 + 210, y + 76, "the others get no token", "small", "middle")


def _wants() -> Drawing:
    """A sequence with a prompt of 8 tokens at four moments: computed, known and not computed."""
    drawing = Drawing(
        680,
        216,
        "What a sequence wants",
        "A new prompt of 8 tokens wants 8. After a chunk of 5 it wants 3. When the prompt is computed and "
        "its first token is sampled, it wants 1, the new token. Each later step it wants 1 again.",
    )
    rows = (
        ("new", 8, 0),
        ("after a chunk of 5", 8, 5),
        ("after a chunk of 3", 9, 8),
        ("after a decode", 10, 9),
    )
    for row, (name, known, computed) in enumerate(rows):
        y = 12 + row * 42
        drawing.label(16, y + 20, name, "text")
        for place in range(known):
            hue = "blue" if place < computed else "orange"
            drawing.cell(170 + place * 36, y, 33, 30, hue, str(place))
        drawing.label(548, y + 20, f"wants {known - computed}", "text")
    drawing.line((170 + 8 * 36 - 1.5, 4), (170 + 8 * 36 - 1.5, 174))
    drawing.label(170 + 8 * 36 + 6, 70, "outputs", "small")
    legend(drawing, 170, 204, {"blue": "computed", "orange": "known, not computed"})
    return drawing


def _budget() -> Drawing:
    """Four steps of the example with a budget of 6 tokens."""
    drawing = Drawing(
        700,
        250,
        "A budget of six tokens, four steps",
        "Step 1: five tokens of A's prompt and B's decode. Step 2: the last three tokens of A's prompt, B's "
        "decode and two tokens of C's prompt. Step 3: decodes of A and B, and the last three tokens of C's "
        "prompt. Step 4: three decodes; half of the budget is not used.",
    )
    steps = (
        ("A0 A1 A2 A3 A4 B4", "C waits"),
        ("A5 A6 A7 B5 C0 C1", "A's first token"),
        ("A8 B6 C2 C3 C4", "C's first token"),
        ("A9 B7 C5", "three decodes"),
    )
    drawing.label(84, 22, "at most six tokens in a step", "small")
    for number, (tokens, note) in enumerate(steps):
        y = 32 + number * 46
        drawing.label(16, y + 22, f"step {number + 1}", "text")
        names = tokens.split()
        for place in range(6):
            text = names[place] if place < len(names) else ""
            drawing.cell(84 + place * 70, y, 66, 34, HUE_OF[text[0]] if text else "free", text)
        drawing.label(516, y + 22, note, "text")
    legend(drawing, 84, 236, {"blue": "A", "orange": "B", "green": "C", "free": "not used"})
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {"stall": _stall, "wants": _wants, "budget": _budget}
