"""The figure of week 1's overview: from token ids to text, with the day of each part."""

from collections.abc import Callable

from .drawing import Drawing


def _path() -> Drawing:
    """Ids, vectors, 30 layers with attention and MLP, logits, a token, text."""
    drawing = Drawing(
        680,
        352,
        "From token ids to text",
        "Ids become vectors by the embedding. Each of 30 layers adds the outputs of attention and of an MLP "
        "to each token's vector; both read a normalized copy. The last vector gives logits, the "
        "sampler chooses a token, which becomes text and joins the ids.",
    )
    drawing.cell(16, 20, 110, 44, "panel", "token ids", "from a tokenizer")
    drawing.arrow([(126, 42), (158, 42)])
    drawing.cell(160, 20, 110, 44, "teal", "embedding", "1.5")
    drawing.arrow([(215, 64), (215, 94)])
    drawing.box(150, 96, 514, 152, "zone")
    drawing.label(652, 116, "a layer, 30 times", "small", "end")
    drawing.line((215, 96), (215, 236))
    drawing.arrow([(215, 236), (215, 276)])
    drawing.label(158, 118, "vectors", "small")
    for y, norm, what, note in (
        (126, "RMSNorm", "attention: rotate, heads, attend", "1.3 with 1.2 and 1.1"),
        (190, "RMSNorm", "MLP: each token separately", "1.4"),
    ):
        drawing.arrow([(215, y + 12), (246, y + 12)])
        drawing.cell(248, y, 84, 42, "panel", norm, "1.4")
        drawing.arrow([(332, y + 20), (354, y + 20)])
        drawing.cell(356, y, 256, 42, "orange", what, note)
        drawing.line((612, y + 20), (632, y + 20))
        drawing.line((632, y + 20), (632, y + 49))
        drawing.arrow([(632, y + 49), (219, y + 49)])
        drawing.label(208, y + 54, "+", "head", "end")
    drawing.cell(150, 278, 130, 44, "teal", "norm, logits", "1.5")
    drawing.arrow([(280, 300), (312, 300)])
    drawing.cell(314, 278, 130, 44, "violet", "sampler", "1.7")
    drawing.arrow([(444, 300), (476, 300)])
    drawing.cell(478, 278, 130, 44, "violet", "text", "1.6")
    drawing.arrow([(379, 322), (379, 340), (70, 340), (70, 66)])
    drawing.label(78, 262, "new token", "small")
    return drawing


FIGURES: dict[str, Callable[[], Drawing]] = {"path": _path}
