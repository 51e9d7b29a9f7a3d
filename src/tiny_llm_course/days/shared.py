"""Shared by the days' demonstrations: texts, types, fixed random input, and the likeliest next tokens."""

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from tiny_llm.model import Model

CAPITAL = "The capital of France is"
STORY = "Once upon a time"
Lines = Iterator[str]
Work = Callable[[], mx.array]


def random_array(*shape: int) -> mx.array:
    """Normally distributed numbers of that shape, the same in every process."""
    return mx.random.normal(shape, key=mx.random.key(sum(shape)))


def likeliest(text: str, change: Callable[["Model"], "Model"] | None = None, count: int = 5) -> Lines:
    """The likeliest next tokens of a text, without a cache; change: what is done to the model before."""
    from tiny_llm.grouped_attention import NoCacheContext
    from tiny_llm.loader import load_model

    loaded = load_model(None)
    model = loaded.model if change is None else change(loaded.model)
    tokens = loaded.tokenizer.encode(text)
    context = NoCacheContext(len(tokens), model.config.attention_scale)
    start = time.perf_counter()
    row = model(mx.array([tokens], mx.int32), context)[0, -1]
    probabilities = mx.softmax(row)
    best = mx.argsort(-probabilities)[:count]
    mx.eval(best)
    seconds = time.perf_counter() - start
    words = ", ".join(
        f"{loaded.tokenizer.token_text(int(token))!r} {float(probabilities[token]):.0%}" for token in best
    )
    yield f"{text!r}: {words} ({1000 * seconds:.0f} ms)"
