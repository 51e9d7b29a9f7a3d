"""Day 2.1: what `pdm run try` shows and `pdm run compare` times."""

import time
from itertools import islice

import mlx.core as mx

from .shared import STORY, Lines, Work

GENERATED = 24


def show() -> Lines:
    """Count the keys that are computed with and without a cache, then time the same passes."""
    from tiny_llm.generate import generate
    from tiny_llm.kv_cache import attention_with_cache, attention_without_cache, generate_with_cache
    from tiny_llm.loader import load_model

    without, cached = attention_without_cache(128, 1000), attention_with_cache(128, 1000)
    yield (
        f"by the formula, for 128 + 1,000 tokens: {without:,} keys computed per head and layer without a "
        f"cache, {cached:,} with a cache: {without / cached:.0f} times fewer"
    )
    loaded = load_model(None)
    tokens = loaded.tokenizer.encode(STORY * 16)
    last = GENERATED - 1  # the last token is chosen, but does not pass through the model
    counts = [count(len(tokens), last) for count in (attention_without_cache, attention_with_cache)]
    answers, seconds = [], []
    for name, function, count in zip(
        ("without", "with"), (generate, generate_with_cache), counts, strict=True
    ):
        start = time.perf_counter()
        answers.append(list(islice(function(loaded.model, tokens, GENERATED, ()), GENERATED)))
        seconds.append(time.perf_counter() - start)
        yield (
            f"{len(tokens)} + {GENERATED} tokens, {GENERATED} passes {name} a cache: {count:,} keys computed "
            f"per head and layer, {seconds[-1]:.2f} s"
        )
    yield (
        f"{counts[0] / counts[1]:.0f} times fewer keys, {seconds[0] / seconds[1]:.0f} times faster; a pass "
        "for one token still reads all weights of the model"
    )
    if answers[0] == answers[1]:
        yield "both gave the same tokens"
    else:
        yield "the tokens differ: two logits were almost equal, and rounding decided"


def work() -> Work:
    """Sixteen tokens of the real model, with a cache."""
    from tiny_llm.kv_cache import generate_with_cache
    from tiny_llm.loader import load_model

    loaded = load_model(None)
    tokens = loaded.tokenizer.encode("Once upon a time")
    return lambda: mx.array(list(generate_with_cache(loaded.model, tokens, 16, ())))
