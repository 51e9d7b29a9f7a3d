"""Day 1.3: what `pdm run try` shows."""

from .shared import CAPITAL, Lines, likeliest


def show() -> Lines:
    """Print what shared heads save: nine query heads use three heads of keys and values."""
    from tiny_llm.loader import load_model

    loaded = load_model(None)
    config = loaded.model.config
    layers, heads, size = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    shared = config.kv_bytes_per_token(2)
    own = shared * config.num_attention_heads // heads
    yield (
        f"{config.num_attention_heads} query heads share {heads} heads of keys and values: "
        f"{shared:,} bytes per token in float16 instead of {own:,}"
    )
    yield f"  {layers} layers x {heads} heads x {size} values x 2 (key and value) x 2 bytes = {shared:,}"
    yield from likeliest(CAPITAL)
