"""PrefixCachingKVCache: one copy of a prefix, correct counts; the oracle is a plain dict of NumPy arrays."""

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.errors import OutOfBlocksError
from tiny_llm.prefix_kv_cache import PrefixCachingKVCache

HEADS, D = 2, 4


def cache_of(total_blocks: int) -> PrefixCachingKVCache:
    return PrefixCachingKVCache(total_blocks, 4, HEADS, D, mx.float32)


def token(value: float) -> mx.array:
    return mx.full((HEADS, D), value)


def fill(cache: PrefixCachingKVCache, seq_id: str, start: int, stop: int, base: float) -> None:
    for position in range(start, stop):
        cache.write_token(seq_id, position, token(base + position), token(-base - position))


def keys(cache: PrefixCachingKVCache, seq_id: str) -> list[float]:
    read, _ = cache.read_blocks(seq_id, 0, cache.tables[seq_id].num_tokens)
    return np.array(read)[0, :, 0].tolist()


def test_fifty_users_of_one_prefix_share_one_copy() -> None:
    cache = cache_of(200)
    prefix = cache.get_or_create_prefix("sys", 10)  # two full blocks and a half-full one
    fill(cache, "sys", 0, 10, 100)
    for user in range(50):
        blocks = cache.allocate_with_prefix(f"user{user}", "sys", 10 + user % 7)
        assert blocks[:2] == prefix[:2]
        fill(cache, f"user{user}", 10, 10 + user % 7, 1000 * user)
    assert [cache.allocator.ref_count(block) for block in prefix[:2]] == [51, 51]
    idle = sum(user % 7 == 0 for user in range(50))  # they write nothing, so they share the last block too
    assert cache.allocator.ref_count(prefix[2]) == 1 + idle
    for user in range(50):
        own = [float(1000 * user + position) for position in range(10, 10 + user % 7)]
        assert keys(cache, f"user{user}") == [float(100 + i) for i in range(10)] + own
    assert keys(cache, "sys") == [float(100 + i) for i in range(10)]


def test_a_prefix_and_its_users_can_be_freed_in_any_order() -> None:
    cache = cache_of(10)
    cache.get_or_create_prefix("sys", 8)
    fill(cache, "sys", 0, 8, 0)
    cache.allocate_with_prefix("a", "sys", 9)
    cache.allocate_with_prefix("b", "sys", 9)
    cache.free_sequence("a")
    assert keys(cache, "sys") == [float(i) for i in range(8)]
    cache.free_sequence("sys")
    assert keys(cache, "b")[:8] == [float(i) for i in range(8)]
    cache.free_sequence("b")
    assert cache.allocator.num_free == 10


def test_requesting_a_prefix_again_allocates_no_block() -> None:
    cache = cache_of(4)
    first = cache.get_or_create_prefix("sys", 5)
    assert cache.get_or_create_prefix("sys", 5) == first
    assert cache.allocator.num_free == 2
    with pytest.raises(ValueError, match="has 5 tokens, not 6"):
        cache.get_or_create_prefix("sys", 6)


def test_a_call_that_does_not_fit_changes_nothing() -> None:
    cache = cache_of(4)
    cache.get_or_create_prefix("sys", 5)
    cache.allocate_with_prefix("a", "sys", 6)
    counts = [cache.allocator.ref_count(block) for block in range(4)]
    with pytest.raises(OutOfBlocksError):
        cache.allocate_with_prefix("b", "sys", 16)
    assert [cache.allocator.ref_count(block) for block in range(4)] == counts
    assert "b" not in cache.tables
    with pytest.raises(KeyError):
        cache.allocate_with_prefix("b", "other", 16)
    with pytest.raises(ValueError, match="fewer than the prefix's 5"):
        cache.allocate_with_prefix("b", "sys", 4)
    with pytest.raises(ValueError, match="'a' exists already"):
        cache.allocate_with_prefix("a", "sys", 6)
