"""The figures of day 1.4: the residual stream and a block, the gated MLP, and stacked matrices."""

from collections.abc import Callable

from .blocks import legend
from .drawing import Drawing

SCALE = 0.12  # pixels for each number of a token's vector
HIDDEN = 576 * SCALE


def _block() -> Drawing:
    """The stream as a line; each half branches off, is normalized, computed, and added."""
    drawing = Drawing(
        680,
        222,
        "A transformer block",
        "The residual stream passes from left to right. RMSNorm and attention read it, and their output is "
        "added to it; then RMSNorm and the MLP do the same.",
    )
    drawing.label(16, 34, "residual stream [B, L, E]", "small")
    drawing.arrow([(16, 48), (650, 48)])
    halves = (
        (56, "attention", "zone", "input_layernorm"),
        (362, "MLP", "orange", "post_attention_layernorm"),
    )
    for left, name, style, weight in halves:
        drawing.arrow([(left, 48), (left, 108)])
        drawing.cell(left - 26, 110, 92, 36, "orange", "RMSNorm")
        drawing.label(left - 26, 168, "weight:", "small")
        drawing.label(left - 26, 184, weight, "small")
        drawing.arrow([(left + 66, 128), (left + 100, 128)])
        drawing.cell(left + 102, 110, 92, 36, style, name)
        drawing.arrow([(left + 194, 128), (left + 236, 128), (left + 236, 58)])
        drawing.cell(left + 225, 37, 22, 22, "panel", "+")
    legend(drawing, 16, 214, {"orange": "written today", "zone": "days 1.1 to 1.3"})
    return drawing


def _mlp() -> Drawing:
    """The widths of the MLP's vectors for one token, in proportion."""
    drawing = Drawing(
        680,
        252,
        "The gated MLP",
        "A vector of 576 numbers is multiplied by the stacked gate and up matrix, which gives 1536 gates and "
        "1536 values. silu of the gates times the values is 1536 numbers. The down matrix makes 576 of them.",
    )
    middle = 120
    drawing.cell(16, middle - HIDDEN / 2, 40, HIDDEN, "blue", "x")
    drawing.label(36, middle + HIDDEN / 2 + 18, "576", "small", "middle")
    drawing.arrow([(60, middle), (94, middle)])
    drawing.cell(96, middle - 24, 108, 48, "orange", "gate_up_proj", "3072 x 576")
    for place, (name, hue) in enumerate((("gates", "violet"), ("values", "teal"))):
        top = 16 + place * 112
        drawing.arrow([(206, middle), (222, middle), (222, top + 48), (238, top + 48)])
        drawing.cell(240, top, 62, 96, hue, name, "1536")
    drawing.arrow([(304, 64), (330, 64)])
    drawing.cell(332, 46, 56, 36, "violet", "silu")
    drawing.arrow([(390, 64), (412, 64), (412, middle - 13)])
    drawing.arrow([(304, 176), (412, 176), (412, middle + 13)])
    drawing.cell(400, middle - 12, 24, 24, "panel", "*")
    drawing.arrow([(426, middle), (446, middle)])
    drawing.cell(448, middle - 48, 40, 96, "teal", "", "1536")
    drawing.arrow([(490, middle), (516, middle)])
    drawing.cell(518, middle - 24, 90, 48, "orange", "down_proj", "576 x 1536")
    drawing.arrow([(610, middle), (624, middle)])
    drawing.cell(626, middle - HIDDEN / 2, 38, HIDDEN, "blue")
    drawing.label(645, middle + HIDDEN / 2 + 18, "576", "small", "middle")
    legend(
        drawing,
        16,
        244,
        {
            "blue": "a token's vector",
            "orange": "matrix, outputs x inputs",
            "violet": "gates",
            "teal": "values",
        },
    )
    return drawing


def _stack() -> Drawing:
    """The matrices of a layer, to scale: outputs down, inputs to the right."""
    drawing = Drawing(
        688,
        410,
        "The matrices of a layer, separate and stacked",
        "In the checkpoint q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj. In the engine "
        "q, k and v are one matrix of 960 x 576, and gate and up are one of 3072 x 576.",
    )
    hidden, inner, keys = (size / 10 for size in (576, 1536, 192))
    attention = (("q", hidden, "blue"), ("k", keys, "green"), ("v", keys, "teal"))
    gated = (("gate", inner, "violet"), ("up", inner, "orange"))
    for left, title, gap in ((16, "checkpoint: 7 matrices", 8), (360, "engine: 4 matrices", 0)):
        drawing.label(left, 24, title, "head")
        for column, group in enumerate((attention, gated)):
            top = 40.0
            for name, height, hue in group:
                drawing.cell(left + column * 78, top, hidden, height, hue, name)
                top += height + gap
        drawing.cell(left, 190, hidden, hidden, "zone", "o")
        drawing.cell(left + 156, 40, inner, hidden, "zone", "down")
    lines = (
        (16, "q, o: 576 x 576; k, v: 192 x 576", "gate, up: 1536 x 576; down: 576 x 1536"),
        (360, "qkv_proj: 960 x 576", "gate_up_proj: 3072 x 576"),
    )
    for left, *texts in lines:
        for row, text in enumerate(texts):
            drawing.label(left, 376 + 18 * row, text, "small")
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {"block": _block, "mlp": _mlp, "stack": _stack}
