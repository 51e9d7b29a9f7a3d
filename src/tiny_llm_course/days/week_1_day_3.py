"""Day 1.3: what `pdm run try` shows."""

from .shared import CAPITAL, Lines, likeliest


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
