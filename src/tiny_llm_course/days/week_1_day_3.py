"""Day 1.3: what `pdm run try` shows and `pdm run compare` times."""

from .shared import CAPITAL, Lines, Work, likeliest, random_array


def show() -> Lines:
    """Three heads of keys and values serve nine of queries."""
    from tiny_llm.loader import load_model

    loaded = load_model(None)
    config = loaded.model.config
    shared = config.kv_bytes_per_token(2)
    own = shared * config.num_attention_heads // config.num_key_value_heads
    yield (
        f"{config.num_attention_heads} query heads share {config.num_key_value_heads} heads of keys and "
        f"values: {shared:,} bytes a token in float16 instead of {own:,}"
    )
    yield from likeliest(CAPITAL)


def work() -> Work:
    """64 queries of 9 heads over 256 keys of 3 heads."""
    from tiny_llm.grouped_attention import grouped_query_attention

    q, k, v = random_array(1, 9, 64, 64), random_array(1, 3, 256, 64), random_array(1, 3, 257, 64)[:, :, 1:]
    return lambda: grouped_query_attention(q, k, v, 0.125)
