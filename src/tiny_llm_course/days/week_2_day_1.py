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

    for prompt_len, gen_len in ((128, 100), (128, 1000)):
        without, kept = (
            attention_without_cache(prompt_len, gen_len),
            attention_with_cache(prompt_len, gen_len),
        )
        yield f"{prompt_len} + {gen_len} tokens: {without:,} keys computed without a cache, {kept:,} with one"
    loaded = load_model(None)
    tokens = loaded.tokenizer.encode(STORY * 16)
    answers = []
    for name, function in (("without", generate), ("with", generate_with_cache)):
        start = time.perf_counter()
        answers.append(list(islice(function(loaded.model, tokens, 24, ()), 24)))
        yield f"{name:7} a cache, {len(tokens)} + 24 tokens: {time.perf_counter() - start:.2f} s"
    yield "the same tokens" if answers[0] == answers[1] else "other tokens: rounding met a near-tie"


def work() -> Work:
    """Sixteen tokens of the real model, with a cache."""
    from tiny_llm.kv_cache import generate_with_cache
    from tiny_llm.loader import load_model

    loaded = load_model(None)
    tokens = loaded.tokenizer.encode("Once upon a time")
    return lambda: mx.array(list(generate_with_cache(loaded.model, tokens, 16, ())))
