"""The figures of day 1.5: from names to parts, the forward pass, and shares of the size."""

from collections.abc import Callable

from .blocks import legend
from .drawing import Drawing

VOCABULARY, HIDDEN, INNER, KEYS, LAYERS = 49_152, 576, 1536, 192, 30


def _names() -> Drawing:
    """The tensors of a layer, and the parts of a block that they become."""
    drawing = Drawing(
        700,
        372,
        "From names to parts",
        "The nine tensors of a layer. q_proj, k_proj and v_proj become qkv_proj of the Attention, gate_proj "
        "and up_proj become gate_up_proj of the MLP. The other four keep their names.",
    )
    drawing.label(16, 24, "checkpoint: model.layers.3.", "head")
    drawing.label(420, 24, "engine: layers[3]", "head")
    drawing.box(404, 38, 280, 318, "zone", ["TransformerBlock"])
    drawing.box(420, 100, 248, 96, "blue", ["self_attn: Attention"])
    drawing.box(420, 246, 248, 96, "violet", ["mlp: MLP"])
    rows: tuple[tuple[str, str, str, int], ...] = (
        ("input_layernorm", "green", "input_layernorm", 70),
        ("self_attn.q_proj", "blue", "qkv_proj", 134),
        ("self_attn.k_proj", "blue", "", 134),
        ("self_attn.v_proj", "blue", "", 134),
        ("self_attn.o_proj", "blue", "o_proj", 164),
        ("post_attention_layernorm", "green", "post_attention_layernorm", 208),
        ("mlp.gate_proj", "violet", "gate_up_proj", 280),
        ("mlp.up_proj", "violet", "", 280),
        ("mlp.down_proj", "violet", "down_proj", 310),
    )
    for place, (name, hue, part, y) in enumerate(rows):
        top = 44 + place * 34
        drawing.cell(16, top, 200, 26, hue, name)
        left = 434 if "proj" in name else 420
        drawing.arrow([(218, top + 13), (250, top + 13), (left - 34, y + 12), (left - 2, y + 12)])
        if part:
            drawing.cell(left, y, 220 if left == 434 else 200, 24, "panel", part)
    return drawing


def _model() -> Drawing:
    """The forward pass over five tokens, with shapes; the same matrix at both ends."""
    drawing = Drawing(
        700,
        286,
        "The forward pass",
        "Token ids [1, 5] become vectors [1, 5, 576], which pass through 30 blocks. One row is chosen, "
        "[1, 1, 576], normalized, and multiplied to logits [1, 1, 49152]. The first and the last step use "
        "the same matrix.",
    )
    steps = (
        ("ids", "panel", "[1, 5]"),
        ("rows", "blue", "[1, 5, 576]"),
        ("30 blocks", "orange", "[1, 5, 576]"),
        ("logit_rows", "panel", "[1, 1, 576]"),
        ("norm", "green", "[1, 1, 576]"),
        ("lm_head", "blue", "[1, 1, 49152]"),
    )
    for place, (name, hue, shape) in enumerate(steps):
        left = 16 + place * 115
        drawing.cell(left, 60, 92, 40, hue, name)
        drawing.label(left + 46, 120, shape, "small", "middle")
        if place:
            drawing.arrow([(left - 21, 80), (left - 2, 80)])
    for place, text in enumerate(("The", "capital", "of", "France", "is")):
        drawing.label(62, 148 + 18 * place, text, "small", "middle")
    drawing.box(210, 200, 316, 60, "blue", ["embed_tokens [49152, 576]", "one object, in memory once"])
    drawing.arrow([(176, 100 + 30), (176, 230), (208, 230)], dashed=True)
    drawing.arrow([(637, 100 + 30), (637, 230), (528, 230)], dashed=True)
    drawing.label(184, 176, "looks up rows", "small")
    drawing.label(628, 176, "multiplies", "small", "end")
    drawing.cell(476, 10, 92, 32, "teal", "context")
    drawing.arrow([(292, 58), (292, 26), (474, 26)])
    drawing.label(304, 18, "queries, keys, values", "small")
    return drawing


def _shares() -> Drawing:
    """Parameters and bytes in memory of the embedding, attention and the MLPs, as bars."""
    attention = LAYERS * HIDDEN * (2 * HIDDEN + 2 * KEYS)
    mlp = LAYERS * 3 * HIDDEN * INNER
    embedding = VOCABULARY * HIDDEN
    kinds = (("embedding", "blue"), ("attention", "orange"), ("MLPs", "violet"))
    bars = (
        ("parameters", (embedding, attention, mlp)),
        ("bytes", (embedding // 32 * 36, attention // 32 * 20, mlp // 32 * 20)),
    )
    drawing = Drawing(
        700,
        150,
        "Where the parameters and the bytes are",
        "; ".join(
            f"{name}: "
            + ", ".join(
                f"{kind} {part / sum(parts):.0%}" for (kind, _), part in zip(kinds, parts, strict=True)
            )
            for name, parts in bars
        ),
    )
    for row, (name, parts) in enumerate(bars):
        y, left = 20 + row * 48, 110.0
        drawing.label(16, y + 22, name, "small")
        for (_, hue), part in zip(kinds, parts, strict=True):
            width = 570 * part / sum(parts)
            drawing.cell(left, y, width - 2, 34, hue, f"{part / sum(parts):.0%}")
            left += width
    legend(drawing, 110, 136, {hue: name for name, hue in kinds})
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {"names": _names, "model": _model, "shares": _shares}
