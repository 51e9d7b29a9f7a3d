"""Day 1.5: what `pdm run try` shows and `pdm run compare` times."""

import time
from typing import Any

import mlx.core as mx

from .shared import CAPITAL, STORY, Lines, Work, likeliest

PROMPT = 128  # tokens
REPETITIONS = 5


def show() -> Lines:
    """Print a checkpoint's likeliest next tokens, and what the logits of all rows cost."""
    from tiny_llm.loader import load_model

    for text in (CAPITAL, "Water boils at a temperature of 100 degrees", "def fibonacci("):
        yield from likeliest(text)
    loaded = load_model(None)
    tokens = (loaded.tokenizer.encode(STORY) * PROMPT)[:PROMPT]
    for name, rows in (("all rows", None), ("the last row", mx.array([PROMPT - 1]))):
        logits, seconds = _timed(loaded.model, tokens, rows)
        yield (
            f"a prompt of {PROMPT} tokens, logits of {name}: {list(logits.shape)}, "
            f"{logits.nbytes:,} bytes, {1000 * seconds:.0f} ms"
        )


def _timed(model: Any, tokens: list[int], rows: mx.array | None) -> tuple[mx.array, float]:
    """The logits of some rows, and the seconds of the fastest of some passes."""
    from tiny_llm.grouped_attention import NoCacheContext

    times = []
    for _ in range(REPETITIONS):
        context = NoCacheContext(len(tokens), model.config.attention_scale)
        context.logit_rows = rows
        start = time.perf_counter()
        logits = model(mx.array([tokens], mx.int32), context)
        mx.eval(logits)
        times.append(time.perf_counter() - start)
    return logits, min(times)


def work() -> Work:
    """A forward pass of the real model over a short text."""
    from tiny_llm.grouped_attention import NoCacheContext
    from tiny_llm.loader import load_model

    loaded = load_model(None)
    tokens = loaded.tokenizer.encode("The capital of France is")
    scale = loaded.model.config.attention_scale
    return lambda: loaded.model(mx.array([tokens], mx.int32), NoCacheContext(len(tokens), scale))[0, -1]
