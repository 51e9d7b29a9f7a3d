"""Day 2.2: what `pdm run try` shows and `pdm run compare` times."""

import random

import mlx.core as mx

from .shared import Lines, Work, random_array


def show() -> Lines:
    """What sixteen users reserve, and what they use."""
    from tiny_llm.loader import load_model
    from tiny_llm.naive_cache import NaiveKVCache

    config = load_model(None).model.config
    lengths = [random.Random(user).randint(100, 500) for user in range(16)]
    shape = (config.num_key_value_heads, config.head_dim)
    yield f"a simulation: caches of the real model for 16 users of {min(lengths)} to {max(lengths)} tokens"
    for reserved in (512, 2048, config.max_position_embeddings):
        allocated = used = 0
        for length in lengths:
            cache = NaiveKVCache(reserved, *shape)
            cache.update(mx.zeros((length, *shape)), mx.zeros((length, *shape)))
            allocated += config.num_hidden_layers * cache.allocated_bytes()
            used += config.num_hidden_layers * cache.used_bytes()
        yield (
            f"  room for {reserved:5,} tokens each: {allocated / 2**20:7,.0f} MiB taken, "
            f"{used / 2**20:4,.0f} MiB used, {1 - used / allocated:.0%} wasted"
        )


def work() -> Work:
    """256 tokens stored one by one in a contiguous cache with room for 512."""
    from tiny_llm.naive_cache import NaiveKVCache

    tokens = random_array(256, 3, 64)

    def work() -> mx.array:
        cache = NaiveKVCache(512, 3, 64, mx.float32)
        for token in tokens:
            stored = cache.update(token, 2 * token)
        return mx.concatenate(list(stored))

    return work
