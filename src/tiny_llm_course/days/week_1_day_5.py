"""Day 1.5: what `pdm run try` shows and `pdm run compare` times."""

import mlx.core as mx

from .shared import CAPITAL, Lines, Work, likeliest


def show() -> Lines:
    """Print a checkpoint's likeliest next tokens."""
    for text in (CAPITAL, "Water boils at a temperature of 100 degrees", "def fibonacci("):
        yield from likeliest(text)


def work() -> Work:
    """A forward pass of the real model over a short text."""
    from tiny_llm.grouped_attention import NoCacheContext
    from tiny_llm.loader import load_model

    loaded = load_model(None)
    tokens = loaded.tokenizer.encode("The capital of France is")
    scale = loaded.model.config.attention_scale
    return lambda: loaded.model(mx.array([tokens], mx.int32), NoCacheContext(len(tokens), scale))[0, -1]
