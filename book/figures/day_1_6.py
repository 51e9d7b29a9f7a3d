"""The figures of day 1.6: the loop, who asks whom for the next piece, and the bytes of a text."""

from collections.abc import Callable

from .drawing import Drawing

BYTE = 62  # pixels of a byte


def _loop() -> Drawing:
    """The chosen token returns to the list of tokens, and goes on to the detokenizer."""
    drawing = Drawing(
        690,
        176,
        "The loop that makes text",
        "All known tokens go through the model. The likeliest token of the last row is appended to the known "
        "tokens, and is given to the detokenizer, which returns text.",
    )
    boxes = (
        (16, 118, "blue", "known tokens", "[1, L]"),
        (174, 92, "orange", "model", ""),
        (306, 110, "panel", "last logits", "[1, 1, 49152]"),
        (456, 80, "violet", "argmax", "one id"),
        (576, 98, "teal", "detokenizer", "bytes held"),
    )
    for place, (left, width, hue, name, note) in enumerate(boxes):
        drawing.cell(left, 70, width, 46, hue, name, note)
        if place:
            before = boxes[place - 1]
            drawing.arrow([(before[0] + before[1] + 2, 93), (left - 2, 93)])
    drawing.arrow([(496, 68), (496, 30), (75, 30), (75, 68)])
    drawing.label(286, 22, "append, and run the model on everything again", "small", "middle")
    drawing.arrow([(625, 118), (625, 144)])
    drawing.label(625, 162, "pieces of text", "small", "middle")
    return drawing


def _pull() -> Drawing:
    """Requests go down, tokens and pieces come back up: two tokens for one character."""
    drawing = Drawing(
        690,
        286,
        "One piece of text on request",
        "The caller asks stream_text for a piece. stream_text asks generate for a token, which runs the "
        "model once. The token completes no character, so stream_text asks again. The second token completes "
        "it, and the piece goes to the caller.",
    )
    lanes = (
        (70, "caller", "panel"),
        (250, "stream_text", "teal"),
        (430, "generate", "blue"),
        (610, "model", "orange"),
    )
    for x, name, hue in lanes:
        drawing.cell(x - 54, 12, 108, 30, hue, name)
        drawing.line((x, 44), (x, 276), "grid")
    steps = (
        (0, 1, "next piece"),
        (1, 2, "next token"),
        (2, 3, "known tokens"),
        (3, 2, "logits"),
        (2, 1, "E4 BA"),
        (1, 2, "next token"),
        (2, 3, "known tokens"),
        (3, 2, "logits"),
        (2, 1, "AC"),
        (1, 0, "one character"),
    )
    for row, (start, end, text) in enumerate(steps):
        y = 70 + row * 22
        (x1, _, _), (x2, _, _) = lanes[start], lanes[end]
        gap = 4 if x2 > x1 else -4
        drawing.arrow([(x1 + gap, y), (x2 - gap, y)], dashed=x2 < x1)
        drawing.label((x1 + x2) / 2, y - 6, text, "small", "middle")
    return drawing


def _bytes() -> Drawing:
    """Characters, bytes and tokens of a text do not have the same borders."""
    drawing = Drawing(
        690,
        250,
        "Characters, bytes and tokens",
        "The text in, space and two Chinese characters has five characters, nine bytes and six tokens. The "
        "second token is the space and the first byte of a character; the last token is the third byte of "
        "another.",
    )
    rows = (
        (
            "characters",
            34,
            (
                (1, "i", "panel"),
                (1, "n", "panel"),
                (1, "space", "panel"),
                (3, "U+6771", "blue"),
                (3, "U+4EAC", "green"),
            ),
        ),
        (
            "bytes",
            84,
            tuple(
                (1, byte, hue)
                for byte, hue in zip(
                    ("69", "6E", "20", "E6", "9D", "B1", "E4", "BA", "AC"),
                    ("panel",) * 3 + ("blue",) * 3 + ("green",) * 3,
                    strict=True,
                )
            ),
        ),
        (
            "tokens",
            134,
            tuple(
                (count, text, "orange")
                for count, text in (
                    (2, "254"),
                    (2, "17097"),
                    (1, "247"),
                    (1, "126"),
                    (2, "16736"),
                    (1, "122"),
                )
            ),
        ),
    )
    for name, y, cells in rows:
        drawing.label(16, y + 22, name, "small")
        left = 110.0
        for count, text, hue in cells:
            drawing.cell(left, y, count * BYTE - 4, 34, hue, text)
            left += count * BYTE
    drawing.label(16, 206, "pieces", "small")
    for end, width, text, hue in (
        (2, 2, "in", "panel"),
        (4, 1, "space", "panel"),
        (6, 1, "U+6771", "blue"),
        (9, 1, "U+4EAC", "green"),
    ):
        left = 110 + (end - width) * BYTE
        drawing.cell(left, 184, width * BYTE - 4, 34, hue, text)
    drawing.label(110, 240, "A piece is under the last byte of the token that completes it.", "small")
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {"loop": _loop, "pull": _pull, "bytes": _bytes}
