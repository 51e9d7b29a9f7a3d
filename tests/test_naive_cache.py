"""The contiguous cache's size in bytes, and its state after a reset: the parts of day 2.2 that are given."""

import mlx.core as mx
import pytest
from tiny_llm.naive_cache import NaiveKVCache


def filled(num_tokens: int, max_seq_len: int = 7, dtype: mx.Dtype = mx.float32) -> NaiveKVCache:
    """A cache with 3 heads of size 5 that holds some tokens."""
    cache = NaiveKVCache(max_seq_len, num_heads=3, head_dim=5, dtype=dtype)
    if num_tokens:
        cache.update(mx.ones((3, num_tokens, 5)), mx.ones((3, num_tokens, 5)))
    return cache


@pytest.mark.parametrize(("dtype", "size"), [(mx.bfloat16, 2), (mx.float16, 2), (mx.float32, 4)])
@pytest.mark.parametrize("num_tokens", [0, 4, 7])
def test_bytes_are_counted_in_the_type_of_the_cache(num_tokens: int, dtype: mx.Dtype, size: int) -> None:
    cache = filled(num_tokens, dtype=dtype)
    assert cache.allocated_bytes() == 2 * 7 * 3 * 5 * size
    assert cache.used_bytes() == 2 * num_tokens * 3 * 5 * size


def test_a_token_of_32_heads_of_128_in_bfloat16_takes_16_kib() -> None:
    assert NaiveKVCache(1, num_heads=32, head_dim=128).allocated_bytes() == 16 * 1024


def test_a_reset_drops_the_tokens_and_keeps_the_memory() -> None:
    cache = filled(7)
    cache.reset()
    assert (cache.current_len, cache.used_bytes()) == (0, 0)
    assert cache.k_cache.shape == cache.v_cache.shape == (3, 7, 5)
    new = 2 * mx.ones((3, 1, 5))
    assert cache.update(new, new).keys.tolist() == new.tolist()
