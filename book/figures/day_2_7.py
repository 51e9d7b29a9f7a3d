"""The figures of day 2.7: three ways to serve four requests, a packed step, reserved slots, one step."""

from collections.abc import Callable, Sequence

from .blocks import legend
from .drawing import Drawing

HUE_OF = {"A": "blue", "B": "orange", "C": "green", "D": "violet"}
ANSWERS = {"A": 7, "B": 2, "C": 3, "D": 4}
STEP, LEFT = 33, 96  # the width of a step, and where the first one is


def _ways() -> Drawing:
    """Four requests in two slots: one at a time, in static batches, and with continuous batching."""
    drawing = Drawing(
        660,
        330,
        "Three ways to serve four requests",
        "A, B, C and D get 7, 2, 3 and 4 tokens. One at a time takes 16 steps. In static batches of two, "
        "slot 0 is empty in steps 3 to 7 and slot 1 in step 11; that takes 11 steps. With continuous "
        "batching C starts in step 3 and D in step 6; that takes 9 steps.",
    )
    for step in range(16):
        drawing.label(LEFT + step * STEP + STEP / 2, 24, str(step + 1), "note", "middle")
    drawing.label(16, 24, "step", "small")
    _timeline(drawing, 56, "one at a time: 16 steps", ["AAAAAAABBCCCDDDD"])
    _timeline(drawing, 136, "static batches: 11 steps", ["AAAAAAACCC.", "BB.....DDDD"])
    _timeline(drawing, 242, "continuous batching: 9 steps", ["AAAAAAA..", "BBCCCDDDD"])
    return drawing


def _timeline(drawing: Drawing, y: float, title: str, slots: Sequence[str]) -> None:
    """Draw a row for each slot: the request that computes in each step; a dot is an empty slot."""
    drawing.label(16, y, title, "text")
    for slot, row in enumerate(slots):
        top = y + 10 + slot * 34
        drawing.label(16, top + 20, f"slot {len(slots) - 1 - slot}", "small")
        for step, name in enumerate(row):
            style = HUE_OF.get(name, "free")
            drawing.cell(LEFT + step * STEP, top, STEP - 3, 30, style, name.strip("."))


def _packed() -> Drawing:
    """Step 3 of the example: the row of five tokens, and the slots that its spans write and read."""
    drawing = Drawing(
        700,
        296,
        "Step 3 as one packed row",
        "The row has five tokens: A's token at position 4 and C's prompt at positions 0 to 3. Indices 0 and "
        "4 need logits. A's query reads the five tokens in slot 1, C's queries those in slot 0.",
    )
    hues = ["blue"] + ["green"] * 4
    rows = (
        ("index", ["0", "1", "2", "3", "4"]),
        ("token", ["A4", "C0", "C1", "C2", "C3"]),
        ("position", ["4", "0", "1", "2", "3"]),
        ("logits", ["yes", "", "", "", "yes"]),
    )
    for number, (name, values) in enumerate(rows):
        y = 16 + number * 34
        drawing.label(16, y + 19, name, "name")
        for place, (value, hue) in enumerate(zip(values, hues, strict=True)):
            drawing.cell(110 + place * 90, y, 86, 30, hue if number else "panel", value)
    drawing.label(570, 36, "T = 5 tokens", "small")
    drawing.label(570, 70, "A: a decode", "small")
    drawing.label(570, 87, "C: its prompt", "small")
    drawing.arrow([(153, 148), (153, 198)])
    drawing.label(162, 178, "A writes 1 key, and sees 5", "small")
    drawing.arrow([(423, 148), (423, 198)])
    drawing.label(432, 178, "C writes 4 keys, and sees 4", "small")
    for left, slot, hue, name, count in ((16, 1, "blue", "A", 5), (366, 0, "green", "C", 4)):
        for place in range(10):
            text = f"{name}{place}" if place < count else ""
            drawing.cell(left + place * 32, 202, 30, 32, hue if text else "free", text)
        drawing.label(left, 254, f"slot {slot}: a cache of 10 places for each layer", "small")
    legend(
        drawing, 16, 282, {"blue": "A", "green": "C", "free": "no meaning: empty, or of an earlier sequence"}
    )
    return drawing


def _reserved() -> Drawing:
    """Four slots: two leaders run, two slots are reserved for their forks, a third request waits."""
    drawing = Drawing(
        680,
        206,
        "Reserved slots",
        "A manager has four slots. The leaders a/0 and b/0 compute their prompts in two of them. The other "
        "two are free but reserved for a/1 and b/1. So c waits. After both forks all four slots are in use.",
    )
    columns = (
        ("while the prompts are computed", ("a/0", "b/0", "reserved", "reserved")),
        ("after the forks", ("a/0", "b/0", "a/1", "b/1")),
    )
    for column, (title, names) in enumerate(columns):
        left = 16 + column * 340
        drawing.label(left, 24, title, "head")
        for place, name in enumerate(names):
            x = left + place * 74
            hue = {"a": "blue", "b": "orange"}.get(name[0], "free")
            drawing.cell(x, 36, 70, 50, hue, name)
            drawing.label(x + 35, 104, f"slot {3 - place}", "note", "middle")
    drawing.label(16, 138, "free: 2   reserved: 2   available: 0", "text")
    drawing.label(356, 138, "free: 0   reserved: 0   available: 0", "text")
    drawing.label(16, 178, "waits:", "text")
    drawing.cell(70, 162, 70, 26, "green", "c")
    drawing.label(154, 179, "needs one slot; none is available before a completion ends", "small")
    return drawing


def _step() -> Drawing:
    """The four calls of process_batch, and what the caller does with its result."""
    drawing = Drawing(
        720,
        330,
        "One step",
        "process_batch admits waiting sequences, plans chunks, computes them in one pass, and concludes: it "
        "forks leaders and assigns rows of logits. The caller samples a token for each ready sequence, "
        "commits it, and finishes sequences that are complete. Then the next step begins.",
    )
    drawing.box(214, 16, 300, 276, "zone", ["process_batch"])
    steps = (
        ("admit", "waiting sequences get free slots", "blue"),
        ("plan_chunks", "which tokens (day 2.6)", "blue"),
        ("compute", "one pass; writes keys and values", "orange"),
        ("conclude", "counts tokens; forks leaders", "violet"),
    )
    for number, (name, what, hue) in enumerate(steps):
        y = 50 + number * 58
        drawing.box(230, y, 268, 48, hue, [name, what])
    drawing.box(16, 44, 160, 80, "panel", ["queues", "waiting sequences,", "running sequences"])
    drawing.box(552, 138, 152, 80, "teal", ["slots", "a cache for each", "layer"])
    drawing.box(16, 196, 160, 88, "panel", ["the caller", "samples a token of", "each ready one"])
    drawing.arrow([(176, 68), (227, 68)])
    drawing.arrow([(498, 184), (549, 184)])
    drawing.arrow([(96, 196), (96, 127)])
    drawing.label(104, 150, "add_request,", "small")
    drawing.label(104, 166, "commit,", "small")
    drawing.label(104, 182, "finish", "small")
    drawing.arrow([(364, 272), (364, 310), (96, 310), (96, 287)], dashed=True)
    drawing.label(376, 314, "StepLogits: a row for each sequence that is ready", "small")
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {
    "ways": _ways,
    "packed": _packed,
    "reserved": _reserved,
    "step": _step,
}
