"""Day 1.2: what `pdm run try` shows and `pdm run compare` times."""

import mlx.core as mx

from .shared import Lines, Work, random_array


def show() -> Lines:
    """Show that only the distances between tokens matter."""
    from tiny_llm.grouped_attention import NoCacheContext
    from tiny_llm.loader import load_model

    loaded = load_model(None)
    text = "Monday, Tuesday, Wednesday, Thursday, Friday,"
    tokens = loaded.tokenizer.encode(text)
    inputs, places = mx.array([tokens], mx.int32), mx.arange(len(tokens), dtype=mx.int32)
    rows = []
    for name, positions in (
        ("0, 1, 2, ...", places),
        ("1000, 1001, 1002, ...", places + 1000),
        ("0, 0, 0, ...", places * 0),
    ):
        context = NoCacheContext(len(tokens), loaded.model.config.attention_scale)
        context.positions = positions
        rows.append(loaded.model(inputs, context)[0, -1])
        best = loaded.tokenizer.token_text(int(mx.argmax(rows[-1])))
        difference = float(mx.max(mx.abs(rows[-1] - rows[0])))
        yield f"positions {name:22} {text!r} continues with {best!r}; change in logits: {difference:.4f}"
    yield "change in logits: the largest difference from the first line"
    yield "shifting all positions keeps the distances, and so the answer; with one position for all tokens,"
    yield "the model cannot see their order"


def work() -> Work:
    """9 heads of 64 values, rotated at 512 positions."""
    from tiny_llm.rope import inverse_frequencies, rope

    x, positions = random_array(1, 9, 512, 64), mx.arange(512, dtype=mx.int32)
    return lambda: rope(x, positions, inverse_frequencies(64, 10_000.0))
