"""Day 3.4, tasks 12 and 13: the cache of named sequences, in which the caller names shared prefixes."""

from collections import Counter
from collections.abc import Sequence

import mlx.core as mx
import pytest
from tiny_llm.errors import OutOfBlocksError
from tiny_llm.prefix_kv_cache import PrefixCachingKVCache

from common.blocks import counts, holders

# Task 12: PrefixCachingKVCache.get_or_create_prefix

HEADS, D = 2, 3


def make_kv_cache(total_blocks: int = 8) -> PrefixCachingKVCache:
    """A cache with blocks of 4 tokens."""
    return PrefixCachingKVCache(total_blocks, 4, HEADS, D, mx.float32)


def write(cache: PrefixCachingKVCache, seq_id: str, start: int, numbers: Sequence[float]) -> None:
    """Write tokens from a position on: different numbers give different tokens."""
    for position, number in enumerate(numbers, start):
        cache.write_token(seq_id, position, mx.full((HEADS, D), number), mx.full((HEADS, D), -number))


def read(cache: PrefixCachingKVCache, seq_id: str) -> list[float]:
    """All tokens of a sequence, as numbers."""
    keys, values = cache.read_blocks(seq_id, 0, cache.tables[seq_id].num_tokens)
    assert keys.tolist() == (-values).tolist()
    return keys[0, :, 0].tolist()


def expect_conserved(cache: PrefixCachingKVCache) -> None:
    """Assert that each block's reference count is the number of sequences and prefixes that contain it."""
    held = Counter(block for table in cache.tables.values() for block in table.blocks)
    total = cache.allocator.num_blocks
    assert counts(cache.allocator) == [held[block] for block in range(total)]
    assert cache.allocator.num_free == total - len(held)


def test_task_12_a_new_prefix_allocates_its_blocks() -> None:
    """Oracle: by hand: 6 tokens in blocks of 4; it is a sequence that can be written and read."""
    cache = make_kv_cache()
    blocks = cache.get_or_create_prefix("sys", 6)
    assert len(set(blocks)) == 2
    assert cache.allocator.num_free == 6
    write(cache, "sys", 0, range(1, 7))
    assert read(cache, "sys") == [1, 2, 3, 4, 5, 6]


def test_task_12_requesting_a_prefix_again_changes_nothing() -> None:
    """Oracle: by hand. Common mistake: growing the prefix on every call."""
    cache = make_kv_cache()
    blocks = list(cache.get_or_create_prefix("sys", 6))
    write(cache, "sys", 0, range(1, 7))
    for _ in range(3):
        assert list(cache.get_or_create_prefix("sys", 6)) == blocks
    assert read(cache, "sys") == [1, 2, 3, 4, 5, 6]
    expect_conserved(cache)


def test_task_12_the_returned_list_is_a_copy() -> None:
    """Oracle: by hand: changing the returned list must not change the table."""
    cache = make_kv_cache()
    for _ in range(2):
        cache.get_or_create_prefix("sys", 6).clear()
    assert len(cache.tables["sys"].blocks) == 2


@pytest.mark.parametrize("length", [5, 7], ids="{} tokens instead of 6".format)
def test_task_12_a_different_length_for_the_same_name_is_rejected(length: int) -> None:
    """Oracle: the docstring."""
    cache = make_kv_cache()
    cache.get_or_create_prefix("sys", 6)
    with pytest.raises(ValueError):
        cache.get_or_create_prefix("sys", length)
    assert cache.tables["sys"].num_tokens == 6
    expect_conserved(cache)


def test_task_12_prefixes_share_no_blocks() -> None:
    """Oracle: by hand: prefixes with different names are never compared."""
    cache = make_kv_cache()
    assert set(cache.get_or_create_prefix("one", 6)).isdisjoint(cache.get_or_create_prefix("two", 6))


def test_task_12_a_prefix_that_does_not_fit_is_rejected_and_changes_nothing() -> None:
    """Oracle: the docstring: 9 tokens need three blocks, and two are free."""
    cache = make_kv_cache(4)
    cache.get_or_create_prefix("one", 5)
    with pytest.raises(OutOfBlocksError):
        cache.get_or_create_prefix("two", 9)
    assert set(cache.tables) == {"one"}
    expect_conserved(cache)


# Task 13: PrefixCachingKVCache.allocate_with_prefix


def with_prefix(total_blocks: int = 8, length: int = 6) -> PrefixCachingKVCache:
    """A cache with a prefix "sys" of the tokens 1, 2, 3, ..."""
    cache = make_kv_cache(total_blocks)
    cache.get_or_create_prefix("sys", length)
    write(cache, "sys", 0, range(1, length + 1))
    return cache


def test_task_13_a_sequence_starts_with_the_prefix() -> None:
    """Oracle: by hand: 6 tokens and 3 more: one full block is shared, the half-full one is a copy."""
    cache = with_prefix()
    blocks = cache.allocate_with_prefix("a", "sys", 9)
    assert len(blocks) == len(set(blocks)) == 3
    assert blocks[0] == cache.tables["sys"].blocks[0]
    assert blocks[1] != cache.tables["sys"].blocks[1]
    write(cache, "a", 6, [7, 8, 9])
    assert read(cache, "a") == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert read(cache, "sys") == [1, 2, 3, 4, 5, 6]
    assert cache.allocator.num_free == 8 - 4
    expect_conserved(cache)


def test_task_13_full_blocks_are_shared_without_a_copy() -> None:
    """Oracle: by hand: a prefix of two full blocks, and three sequences with 1, 4 and 5 further tokens."""
    cache = with_prefix(length=8)
    for seq_id, total in (("a", 9), ("b", 12), ("c", 13)):
        assert cache.allocate_with_prefix(seq_id, "sys", total)[:2] == cache.tables["sys"].blocks
    assert cache.allocator.num_free == 8 - 2 - 1 - 1 - 2
    assert holders(cache.tables["sys"]) == [4, 4]


def test_task_13_a_sequence_without_further_tokens_shares_every_block() -> None:
    """Oracle: by hand: the half-full block too, until one of them writes."""
    cache = with_prefix()
    cache.allocate_with_prefix("a", "sys", 6)
    assert cache.tables["a"].blocks == cache.tables["sys"].blocks
    assert cache.allocator.num_free == 8 - 2
    write(cache, "a", 5, [60])
    assert read(cache, "sys") == [1, 2, 3, 4, 5, 6]
    assert read(cache, "a") == [1, 2, 3, 4, 5, 60]
    expect_conserved(cache)


def test_task_13_fifty_sequences_share_one_copy_of_the_prefix() -> None:
    """Oracle: by hand: 64 tokens take 16 blocks, and each sequence one more: 66 instead of 850."""
    cache = with_prefix(16 + 50, length=64)
    for user in range(50):
        cache.allocate_with_prefix(f"user {user}", "sys", 65 + user % 4)
    assert cache.allocator.num_free == 0
    assert holders(cache.tables["sys"]) == [51] * 16


def test_task_13_a_prefix_and_its_sequences_can_be_freed_in_any_order() -> None:
    """Oracle: by hand."""
    cache = with_prefix()
    cache.allocate_with_prefix("a", "sys", 7)
    cache.allocate_with_prefix("b", "sys", 7)
    write(cache, "b", 6, [7])
    cache.free_sequence("a")
    assert read(cache, "sys") == [1, 2, 3, 4, 5, 6]
    cache.free_sequence("sys")
    assert read(cache, "b") == [1, 2, 3, 4, 5, 6, 7]
    expect_conserved(cache)
    cache.free_sequence("b")
    assert cache.allocator.num_free == 8


@pytest.mark.parametrize(
    ("seq_id", "prefix", "total", "error"),
    [
        pytest.param("b", "other", 9, KeyError, id="unknown prefix"),
        pytest.param("a", "other", 9, KeyError, id="unknown prefix, existing sequence"),
        pytest.param("b", "other", -1, KeyError, id="unknown prefix, -1 tokens"),
        pytest.param("a", "sys", 9, ValueError, id="existing sequence"),
        pytest.param("sys", "sys", 9, ValueError, id="sequence id of the prefix itself"),
        pytest.param("b", "sys", 5, ValueError, id="5 tokens, prefix of 6"),
    ],
)
def test_task_13_invalid_prefixes_ids_and_lengths_are_rejected(
    seq_id: str, prefix: str, total: int, error: type[Exception]
) -> None:
    """Oracle: the docstring: an unknown prefix, an existing sequence, fewer tokens than the prefix."""
    cache = with_prefix()
    cache.allocate_with_prefix("a", "sys", 7)
    before = {name: list(table.blocks) for name, table in cache.tables.items()}
    with pytest.raises(error):
        cache.allocate_with_prefix(seq_id, prefix, total)
    assert {name: list(table.blocks) for name, table in cache.tables.items()} == before
    expect_conserved(cache)


@pytest.mark.parametrize("total", [7, 8, 9, 40], ids="{} tokens".format)
def test_task_13_a_sequence_that_does_not_fit_is_rejected_and_changes_nothing(total: int) -> None:
    """Oracle: the docstring: no block is free, and the copy needs one.

    Common mistake: leaking references.
    """
    cache = with_prefix(2)
    with pytest.raises(OutOfBlocksError):
        cache.allocate_with_prefix("a", "sys", total)
    assert set(cache.tables) == {"sys"}
    assert holders(cache.tables["sys"]) == [1, 1]
    cache.free_sequence("sys")
    assert cache.allocator.num_free == 2
