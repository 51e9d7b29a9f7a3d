"""Day 2.2: what `pdm run try` shows and `pdm run compare` times."""

import random

import mlx.core as mx

from .shared import Lines, Work, random_array

USERS, MEMORY = 16, 512 * 2**20


def show() -> Lines:
    """Print how many users are refused and how much memory is wasted, for caches of several lengths."""
    from tiny_llm.loader import load_model
    from tiny_llm.naive_cache import NaiveKVCache, reserve

    config = load_model(None).model.config
    lengths = [random.Random(user).randint(100, 500) for user in range(USERS)]
    shape = (config.num_key_value_heads, config.head_dim)
    token_bytes = config.num_hidden_layers * NaiveKVCache(1, *shape).allocated_bytes()
    yield (
        f"a simulation: {USERS} users with {min(lengths)} to {max(lengths)} tokens each; {token_bytes:,} "
        f"bytes per token, the size in the real model; {MEMORY / 2**20:.0f} MiB for caches"
    )
    for max_seq_len in (256, 512, 2048, config.max_position_embeddings):
        found = reserve(lengths, max_seq_len, token_bytes, MEMORY)
        yield (
            f"  caches of {max_seq_len:5,} tokens: {found.num_caches:3} fit, {found.num_refused:2} users are "
            f"refused, {found.wasted:.0%} of the memory of the other users' caches is wasted"
        )
    used = sum(lengths)
    yield f"  without waste, all {USERS} users need {used * token_bytes / 2**20:.0f} MiB"


def work() -> Work:
    """256 tokens stored one by one in a contiguous cache for 512."""
    from tiny_llm.naive_cache import NaiveKVCache

    tokens = random_array(256, 3, 64)

    def work() -> mx.array:
        cache = NaiveKVCache(512, 3, 64, mx.float32)
        for token in tokens:
            stored = cache.update(token, 2 * token)
        return mx.concatenate(list(stored))

    return work
