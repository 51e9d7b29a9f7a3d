"""The figures of day 1.3: heads that share keys and values, the layer, and what a reshape alone does."""

from collections.abc import Callable, Sequence

from .blocks import legend
from .drawing import Drawing

HUES = ("blue", "orange", "green")


def _heads() -> Drawing:
    """Nine query heads with nine, three and one heads of keys and values."""
    drawing = Drawing(
        680,
        310,
        "Nine query heads on nine, three and one heads of keys and values",
        "With nine KV heads each query head has its own. With three KV heads, query heads 0 to 2 share KV "
        "head 0, heads 3 to 5 head 1, heads 6 to 8 head 2. With one KV head all share it.",
    )
    kinds = (
        ("multi-head: each has its own", 9),
        ("grouped-query: three share one (the embedded model)", 3),
        ("multi-query: all share one", 1),
    )
    for row, (title, kv_heads) in enumerate(kinds):
        y = 34 + row * 100
        group = 9 // kv_heads
        drawing.label(16, y - 10, title, "head")
        drawing.label(16, y + 18, "queries", "small")
        drawing.label(16, y + 56, "keys, values", "small")
        for head in range(9):
            hue = HUES[head // group % 3]
            drawing.cell(110 + head * 62, y, 56, 26, hue, f"q{head}")
        for head in range(kv_heads):
            left, width = 110 + head * group * 62, 56 + (group - 1) * 62
            hue = HUES[head % 3]
            middle = (width - 4) / 2
            drawing.cell(left, y + 38, middle, 26, hue, f"k{head}")
            drawing.cell(left + middle + 4, y + 38, middle, 26, hue, f"v{head}")
            for one in range(group):
                drawing.line((left + 28 + one * 62, y + 26), (left + 28 + one * 62, y + 38))
    return drawing


def _row(drawing: Drawing, y: float, cells: Sequence[tuple[str, str]], width: float, gap_every: int) -> None:
    for place, (text, hue) in enumerate(cells):
        drawing.cell(16 + place * (width + 4) + place // gap_every * 18, y, width, 30, hue, text)


def _order() -> Drawing:
    """Two tokens with three heads: as projected, after a reshape only, and after the exchange."""
    drawing = Drawing(
        680,
        344,
        "From tokens with heads to heads with tokens",
        "The projection gives the heads of token 0, then those of token 1. A reshape to three heads puts "
        "heads 0 and 1 of token 0 into head 0. After a reshape and an exchange of axes, head 0 has head 0 of "
        "both tokens.",
    )
    projected = [(head, token) for token in range(2) for head in range(3)]
    wanted = [(head, token) for head in range(3) for token in range(2)]
    rows = (
        (
            "qkv_proj gives [L, heads * D]: all heads of token 0, then of token 1",
            projected,
            3,
            "token",
        ),
        (
            "only a reshape to [heads, L, D]: the same order, cut into three",
            projected,
            2,
            "head",
        ),
        ("reshape to [L, heads, D], then exchange the axes: [heads, L, D]", wanted, 2, "head"),
    )
    for line, (title, order, per_part, part) in enumerate(rows):
        y = 46 + line * 112
        drawing.label(16, y - 28, title, "head")
        cells = [(f"h{head} t{token}", HUES[head]) for head, token in order]
        _row(drawing, y, cells, 78, per_part)
        for place in range(6 // per_part):
            left = 16 + place * (per_part * 82 + 18)
            drawing.label(left + (per_part * 82 - 4) / 2, y - 7, f"{part} {place}", "note", "middle")
    drawing.label(16, 96, "each cell is D numbers", "small")
    drawing.label(16, 208, "“head 0” has two heads of token 0: wrong, and no error", "small")
    legend(drawing, 16, 328, {"blue": "head 0", "orange": "head 1", "green": "head 2"})
    return drawing


def _layer() -> Drawing:
    """The attention layer from x to its output, with the shapes of the embedded model."""
    drawing = Drawing(
        680,
        330,
        "The attention layer",
        "x [B, L, 576] goes through qkv_proj to 15 heads of 64. The first 9 are queries, then 3 keys and 3 "
        "values. Queries and keys are normalized, if the model does that, and rotated. The context's attend "
        "gives 9 heads, which are put side by side, and o_proj gives [B, L, 576].",
    )
    drawing.label(16, 24, "project", "head")
    drawing.cell(16, 44, 112, 40, "panel", "x", "[B, L, 576]")
    drawing.arrow([(128, 64), (158, 64)])
    drawing.cell(160, 44, 118, 40, "violet", "qkv_proj", "[B, L, 960]")
    drawing.arrow([(278, 64), (308, 64)])
    for head in range(15):
        hue = "blue" if head < 9 else "orange" if head < 12 else "green"
        drawing.cell(310 + head * 24, 44, 22, 40, hue)
    drawing.label(310, 36, "15 heads of 64: [B, 15, L, 64]", "note")
    drawing.label(417, 102, "9 queries", "small", "middle")
    drawing.label(561, 102, "3 keys", "small", "middle")
    drawing.label(633, 102, "3 values", "small", "middle")
    drawing.line((310, 108), (594, 108))
    drawing.arrow([(452, 108), (452, 126)])
    drawing.cell(330, 128, 244, 34, "panel", "normalize (some models), rotate")
    drawing.label(16, 190, "__call__", "head")
    drawing.arrow([(395, 162), (395, 200)])
    drawing.label(388, 186, "q", "small", "end")
    drawing.arrow([(500, 162), (500, 200)])
    drawing.label(508, 186, "k", "small")
    drawing.arrow([(633, 110), (633, 200)])
    drawing.label(641, 186, "v", "small")
    drawing.cell(
        310, 202, 358, 44, "teal", "context.attend(layer, q, k, v)", "the context knows where older keys are"
    )
    drawing.arrow([(310, 224), (278, 224)])
    drawing.cell(130, 202, 146, 44, "blue", "9 heads", "[B, 9, L, 64]")
    drawing.arrow([(203, 246), (203, 268)])
    drawing.cell(130, 270, 146, 44, "blue", "side by side", "[B, L, 576]")
    drawing.arrow([(276, 292), (308, 292)])
    drawing.cell(310, 270, 118, 44, "violet", "o_proj", "[B, L, 576]")
    drawing.arrow([(428, 292), (460, 292)])
    drawing.label(468, 296, "output", "small")
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {"heads": _heads, "order": _order, "layer": _layer}
