"""Day 2.1: what `pdm run try` shows and `pdm run compare` times."""

import time
from itertools import islice

import mlx.core as mx

from .shared import STORY, Lines, Work


def show() -> Lines:
    """Counted, then gone."""
    from tiny_llm.generate import generate
    from tiny_llm.kv_cache import attention_with_cache, attention_without_cache, generate_with_cache
    from tiny_llm.loader import load_model

    loaded = load_model(None)
    tokens = loaded.tokenizer.encode(STORY * 16)
    for prompt_len, gen_len in ((128, 1000), (len(tokens), 24)):
        without = attention_without_cache(prompt_len, gen_len)
        cached = attention_with_cache(prompt_len, gen_len)
        yield (
            f"{prompt_len} + {gen_len} tokens, counted: {without:,} keys computed without a cache, "
            f"{cached:,} with one: {without / cached:.0f} times fewer"
        )
    answers, seconds = [], []
    for name, function in (("without", generate), ("with", generate_with_cache)):
        start = time.perf_counter()
        answers.append(list(islice(function(loaded.model, tokens, 24, ()), 24)))
        seconds.append(time.perf_counter() - start)
        yield f"{len(tokens)} + 24 tokens, {name} a cache: {seconds[-1]:.2f} s"
    times = seconds[0] / seconds[1]
    yield f"{times:.0f} times faster: a pass for one token still reads all of the model's weights"
    yield "the same tokens" if answers[0] == answers[1] else "other tokens: rounding met a near-tie"


def work() -> Work:
    """Sixteen tokens of the real model, with a cache."""
    from tiny_llm.kv_cache import generate_with_cache
    from tiny_llm.loader import load_model

    loaded = load_model(None)
    tokens = loaded.tokenizer.encode("Once upon a time")
    return lambda: mx.array(list(generate_with_cache(loaded.model, tokens, 16, ())))
