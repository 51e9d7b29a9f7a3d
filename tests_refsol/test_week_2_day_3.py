"""Day 2.3: blocks on demand, from a pool that all sequences share.

When these tests pass, you have an allocator and a cache of blocks: a sequence wastes at most part of one
block, and you have seen why its blocks should not have to be contiguous (external fragmentation). The tests
of task 6 use the whole cache, and also `free`, which is given.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.dynamic_cache import DynamicKVCache, GlobalAllocator
from tiny_llm.errors import OutOfBlocksError
from tiny_llm.naive_cache import KeysValues


def make_pool(total_blocks: int, block_size: int = 2) -> GlobalAllocator:
    """A pool for one head of size 2 in float32."""
    return GlobalAllocator(total_blocks, block_size, num_heads=1, head_dim=2, dtype=mx.float32)


def leave_free(allocator: GlobalAllocator, free: Sequence[int]) -> None:
    """Allocate the whole pool and free these blocks: the only way to choose which blocks are free."""
    allocator.alloc_blocks(allocator.total_blocks)
    allocator.free_blocks_ids(free)


# Task 1: GlobalAllocator.alloc_blocks


def test_task_1_allocated_blocks_are_distinct_and_in_the_pool() -> None:
    """Oracle: by hand. The allocator may choose any of them."""
    allocator = make_pool(3)
    taken = allocator.alloc_blocks(2)
    assert len(taken) == 2
    assert len(set(taken)) == 2
    assert set(taken) <= {0, 1, 2}


def test_task_1_an_allocated_block_is_not_allocated_again() -> None:
    """Oracle: by hand: 2, 1 and 2 blocks are the whole pool."""
    allocator = make_pool(5)
    taken = [*allocator.alloc_blocks(2), *allocator.alloc_blocks(1), *allocator.alloc_blocks(2)]
    assert sorted(taken) == [0, 1, 2, 3, 4]


def test_task_1_the_whole_pool_can_be_allocated() -> None:
    """Oracle: by hand: the whole pool, at once and one by one."""
    assert sorted(make_pool(4).alloc_blocks(4)) == [0, 1, 2, 3]
    allocator = make_pool(4)
    assert sorted(allocator.alloc_blocks(1)[0] for _ in range(4)) == [0, 1, 2, 3]
    assert len(allocator.free_blocks) == 0


def test_task_1_a_request_for_more_blocks_than_are_free_is_rejected_and_takes_none() -> None:
    """Oracle: the docstring. Common mistake: taking the free blocks before the error is raised."""
    allocator = make_pool(4)
    with pytest.raises(OutOfBlocksError):
        allocator.alloc_blocks(5)
    assert len(allocator.free_blocks) == 4
    first = allocator.alloc_blocks(2)
    with pytest.raises(OutOfBlocksError):
        allocator.alloc_blocks(3)
    assert len(allocator.free_blocks) == 2
    assert sorted(first + allocator.alloc_blocks(2)) == [0, 1, 2, 3]


def test_task_1_a_full_pool_rejects_a_request_for_one_block_but_not_for_zero() -> None:
    """Oracle: the docstring: zero blocks can always be allocated."""
    allocator = make_pool(2)
    allocator.alloc_blocks(2)
    with pytest.raises(OutOfBlocksError):
        allocator.alloc_blocks(1)
    assert allocator.alloc_blocks(0) == []


# Task 2: GlobalAllocator.free_blocks_ids


def test_task_2_a_freed_block_can_be_allocated_again() -> None:
    """Oracle: by hand: the freed block is the only free one."""
    allocator = make_pool(3)
    allocator.alloc_blocks(3)
    allocator.free_blocks_ids([1])
    assert sorted(allocator.alloc_blocks(1)) == [1]


def test_task_2_several_blocks_can_be_freed_in_any_order() -> None:
    """Oracle: by hand."""
    allocator = make_pool(5)
    allocator.alloc_blocks(5)
    allocator.free_blocks_ids([4, 0, 2])
    assert len(allocator.free_blocks) == 3
    assert sorted(allocator.alloc_blocks(3)) == [0, 2, 4]
    with pytest.raises(OutOfBlocksError):
        allocator.alloc_blocks(1)


def test_task_2_freeing_an_empty_list_changes_nothing() -> None:
    """Oracle: by hand: nothing changes."""
    allocator = make_pool(2)
    allocator.alloc_blocks(1)
    allocator.free_blocks_ids([])
    assert len(allocator.free_blocks) == 1


WRONG = {
    "a_free_block": [0],
    "a_negative_id": [-1],
    "an_id_past_the_end": [4],
    "a_duplicate": [2, 2],
    "an_allocated_and_a_free_block": [2, 0],
    "a_free_and_an_allocated_block": [0, 2],
    "an_allocated_block_and_an_id_past_the_end": [2, 7],
    "a_duplicate_among_others": [3, 2, 3],
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_task_2_freeing_a_block_that_is_not_allocated_is_rejected_and_frees_no_block(
    wrong: list[int],
) -> None:
    """Oracle: the docstring: blocks 0 and 1 are free, 2 and 3 are allocated, -1, 4 and 7 are not in the pool.

    Common mistake, found by the mixed lists: freeing valid blocks before the invalid one is noticed.
    """
    allocator = make_pool(4)
    leave_free(allocator, [0, 1])
    with pytest.raises(ValueError):
        allocator.free_blocks_ids(wrong)
    assert len(allocator.free_blocks) == 2
    allocator.free_blocks_ids([2, 3])
    assert sorted(allocator.alloc_blocks(4)) == [0, 1, 2, 3]


def test_task_2_freeing_a_block_twice_is_rejected() -> None:
    """Oracle: the docstring: after the first time the block is free."""
    allocator = make_pool(2)
    taken = allocator.alloc_blocks(1)
    allocator.free_blocks_ids(taken)
    with pytest.raises(ValueError):
        allocator.free_blocks_ids(taken)
    assert len(allocator.free_blocks) == 2


def test_task_2_no_block_has_two_owners_in_a_long_random_run() -> None:
    """Oracle: a Python set of the allocated blocks."""
    rng, allocator = np.random.default_rng(11), make_pool(12)
    owners: list[list[int]] = []
    for _ in range(400):
        held = {block for blocks in owners for block in blocks}
        assert len(allocator.free_blocks) == 12 - len(held)
        if owners and rng.random() < 0.5:
            allocator.free_blocks_ids(owners.pop(int(rng.integers(len(owners)))))
            continue
        count = int(rng.integers(1, 5))
        if count > 12 - len(held):
            with pytest.raises(OutOfBlocksError):
                allocator.alloc_blocks(count)
        else:
            owners.append(allocator.alloc_blocks(count))
            assert len(owners[-1]) == count
            assert held.isdisjoint(owners[-1])
    for blocks in owners:
        allocator.free_blocks_ids(blocks)
    assert sorted(allocator.alloc_blocks(12)) == list(range(12))


# Task 3: GlobalAllocator.alloc_contiguous


def test_task_3_the_block_ids_are_consecutive() -> None:
    """Oracle: by hand: three consecutive ids, starting anywhere."""
    taken = make_pool(4).alloc_contiguous(3)
    assert taken in ([0, 1, 2], [1, 2, 3])


def test_task_3_the_whole_pool_is_one_contiguous_run() -> None:
    """Oracle: by hand."""
    allocator = make_pool(5)
    assert allocator.alloc_contiguous(5) == [0, 1, 2, 3, 4]
    with pytest.raises(OutOfBlocksError):
        allocator.alloc_contiguous(1)


def test_task_3_an_allocated_block_is_not_allocated_again() -> None:
    """Oracle: by hand: the rest of the pool can still be allocated."""
    allocator = make_pool(6)
    taken = [*allocator.alloc_contiguous(3), *allocator.alloc_contiguous(1)]
    assert len(allocator.free_blocks) == 2
    assert sorted(taken + allocator.alloc_blocks(2)) == [0, 1, 2, 3, 4, 5]


def test_task_3_two_contiguous_blocks_do_not_fit_if_only_every_second_block_is_free() -> None:
    """Oracle: by hand: external fragmentation: half the pool is free, but no two adjacent blocks."""
    allocator = make_pool(10)
    leave_free(allocator, range(0, 10, 2))
    with pytest.raises(OutOfBlocksError):
        allocator.alloc_contiguous(2)
    assert len(allocator.free_blocks) == 5, "a rejected call must take no blocks"
    anywhere = allocator.alloc_blocks(2)
    assert len(anywhere) == 2
    assert set(anywhere) <= {0, 2, 4, 6, 8}


def test_task_3_a_single_free_block_is_a_run_of_one() -> None:
    """Oracle: by hand: block 3 is the only free one."""
    allocator = make_pool(5)
    leave_free(allocator, [3])
    assert allocator.alloc_contiguous(1) == [3]


RUNS_OF_TWO = {
    "at_the_start_of_the_pool": ([0, 1], [0, 1]),
    "at_the_end_of_the_pool": ([4, 5], [4, 5]),
    "between_runs_that_are_too_short": ([0, 2, 3, 5], [2, 3]),
    "the_last_run_of_several": ([0, 2, 4, 5], [4, 5]),
    "the_first_run_of_several": ([0, 1, 3, 5], [0, 1]),
}


@pytest.mark.parametrize(("free", "want"), RUNS_OF_TWO.values(), ids=RUNS_OF_TWO)
def test_task_3_the_only_run_of_sufficient_length_is_found(free: list[int], want: list[int]) -> None:
    """Oracle: by hand: the pool has exactly one free run of two."""
    allocator = make_pool(6)
    leave_free(allocator, free)
    assert allocator.alloc_contiguous(2) == want
    with pytest.raises(OutOfBlocksError):
        allocator.alloc_contiguous(2)


def test_task_3_the_last_and_the_first_block_are_not_adjacent() -> None:
    """Oracle: by hand. Common mistake: wrapping around at the end of the pool."""
    allocator = make_pool(5)
    leave_free(allocator, [0, 4])
    with pytest.raises(OutOfBlocksError):
        allocator.alloc_contiguous(2)


def test_task_3_more_blocks_than_the_pool_has_are_rejected() -> None:
    """Oracle: by hand."""
    allocator = make_pool(3)
    with pytest.raises(OutOfBlocksError):
        allocator.alloc_contiguous(4)
    assert len(allocator.free_blocks) == 3


def test_task_3_a_run_is_found_if_and_only_if_one_exists() -> None:
    """Oracle: string search for n dots in the pool written as a string, for random pools."""
    rng = np.random.default_rng(12)
    for _ in range(300):
        total = int(rng.integers(1, 12))
        is_free = rng.random(total) < 0.7
        count = int(rng.integers(1, 6))
        allocator = make_pool(total)
        leave_free(allocator, [block for block in range(total) if is_free[block]])
        text = "".join("." if free else "x" for free in is_free)
        if "." * count in text:
            taken = allocator.alloc_contiguous(count)
            assert taken == list(range(taken[0], taken[0] + count)), "the ids must be consecutive"
            assert text[taken[0] : taken[0] + count] == "." * count, "the blocks must have been free"
            assert len(allocator.free_blocks) == text.count(".") - count
        else:
            with pytest.raises(OutOfBlocksError):
                allocator.alloc_contiguous(count)
            assert len(allocator.free_blocks) == text.count(".")


# Task 4: DynamicKVCache.allocate_for_prompt


@pytest.mark.parametrize(("prompt_len", "blocks"), [(1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3), (40, 10)])
def test_task_4_the_number_of_blocks_for_a_prompt_is_rounded_up(prompt_len: int, blocks: int) -> None:
    """Oracle: by hand, blocks of 4: rounding down, or adding a block for exact multiples, is off by one."""
    allocator = make_pool(12, block_size=4)
    cache = DynamicKVCache(allocator, "a")
    cache.allocate_for_prompt(prompt_len)
    assert len(cache.blocks) == len(set(cache.blocks)) == blocks
    assert len(allocator.free_blocks) == 12 - blocks


def test_task_4_an_empty_prompt_takes_no_blocks() -> None:
    """Oracle: by hand, in a full pool."""
    allocator = make_pool(1)
    allocator.alloc_blocks(1)
    cache = DynamicKVCache(allocator, "a")
    cache.allocate_for_prompt(0)
    assert cache.blocks == []


def test_task_4_allocating_for_a_prompt_stores_no_tokens() -> None:
    """Oracle: the docstring: no token is stored yet. Common mistake: counting the prompt as stored."""
    cache = DynamicKVCache(make_pool(4), "a")
    cache.allocate_for_prompt(5)
    assert cache.current_len == 0


def test_task_4_a_prompt_that_does_not_fit_is_rejected_and_takes_no_blocks() -> None:
    """Oracle: the docstring: 7 tokens need 4 blocks of 2, and 3 are free."""
    allocator = make_pool(3, block_size=2)
    cache = DynamicKVCache(allocator, "a")
    with pytest.raises(OutOfBlocksError):
        cache.allocate_for_prompt(7)
    assert cache.blocks == []
    assert len(allocator.free_blocks) == 3
    cache.allocate_for_prompt(6)
    assert sorted(cache.blocks) == [0, 1, 2]


def test_task_4_two_sequences_share_no_block() -> None:
    """Oracle: by hand: 2 blocks and 3 are the whole pool."""
    allocator = make_pool(5, block_size=2)
    first, second = DynamicKVCache(allocator, "a"), DynamicKVCache(allocator, "b")
    first.allocate_for_prompt(4)
    second.allocate_for_prompt(5)
    assert sorted(first.blocks + second.blocks) == [0, 1, 2, 3, 4]


def test_task_4_blocks_need_not_be_contiguous() -> None:
    """Oracle: by hand: three blocks are free and no two of them are adjacent."""
    allocator = make_pool(6, block_size=2)
    leave_free(allocator, [0, 2, 4])
    cache = DynamicKVCache(allocator, "a")
    cache.allocate_for_prompt(6)
    assert sorted(cache.blocks) == [0, 2, 4]


def test_task_4_a_second_prompt_adds_blocks_after_the_existing_ones() -> None:
    """Oracle: by hand. Replacing the list leaks the old blocks."""
    allocator = make_pool(6, block_size=2)
    cache = DynamicKVCache(allocator, "a")
    cache.allocate_for_prompt(4)
    first = list(cache.blocks)
    cache.allocate_for_prompt(2)
    assert cache.blocks[:2] == first
    assert len(cache.blocks) == 3
    assert len(allocator.free_blocks) == 3


def test_task_4_a_second_prompt_does_not_use_free_slots_of_existing_blocks() -> None:
    """Oracle: by hand: 5 and 3 tokens take 2 and 1 blocks of 4, although the second has 3 free slots."""
    cache = DynamicKVCache(make_pool(6, block_size=4), "a")
    cache.allocate_for_prompt(5)
    append(cache, [1, 2, 3, 4, 5])
    cache.allocate_for_prompt(3)
    assert len(cache.blocks) == 3


# Task 5: DynamicKVCache.append_token


def token(number: float) -> tuple[mx.array, mx.array]:
    """The key and value of a token of one head of size 2; each number is another token."""
    return mx.array([[number, number + 0.5]]), mx.array([[-number, number + 0.25]])


def append(cache: DynamicKVCache, numbers: Sequence[float]) -> None:
    """Append one token for each number."""
    for number in numbers:
        cache.append_token(*token(number))


def is_in_block(cache: DynamicKVCache, place: int, number: float) -> bool:
    """Whether block `place` of the sequence holds the key and the value of this token."""
    key, value = (x.tolist() for x in token(number))
    block, pool = cache.blocks[place], cache.allocator
    keys, values = (x[block].swapaxes(0, 1).tolist() for x in (pool.keys, pool.values))  # token by token
    return key in keys and value in values


def test_task_5_the_first_token_takes_a_block_and_is_stored_in_it() -> None:
    """Oracle: by hand."""
    allocator = make_pool(3, block_size=2)
    cache = DynamicKVCache(allocator, "a")
    append(cache, [7])
    assert cache.current_len == 1
    assert len(cache.blocks) == 1
    assert len(allocator.free_blocks) == 2
    assert is_in_block(cache, 0, 7)


def test_task_5_a_new_block_is_taken_only_when_all_others_are_full() -> None:
    """Oracle: by hand, blocks of 3: only tokens 1, 4 and 7 take one."""
    cache = DynamicKVCache(make_pool(5, block_size=3), "a")
    counts = []
    for number in range(1, 8):
        append(cache, [number])
        counts.append(len(cache.blocks))
    assert counts == [1, 1, 1, 2, 2, 2, 3]
    assert cache.current_len == 7
    assert all(is_in_block(cache, i // 3, i + 1) for i in range(7))


def test_task_5_with_blocks_of_one_token_every_token_takes_a_block() -> None:
    """Oracle: by hand: every token takes one block."""
    cache = DynamicKVCache(make_pool(3, block_size=1), "a")
    append(cache, [1, 2, 3])
    assert sorted(cache.blocks) == [0, 1, 2]
    assert all(is_in_block(cache, i, i + 1) for i in range(3))


def test_task_5_appended_tokens_fill_the_blocks_allocated_for_the_prompt() -> None:
    """Oracle: the invariant: token i is in block blocks[i // 2]; three blocks hold six tokens.

    Common mistake: writing into the last of the prompt's blocks and leaving the others empty.
    """
    allocator = make_pool(6, block_size=2)
    cache = DynamicKVCache(allocator, "a")
    cache.allocate_for_prompt(5)
    taken = list(cache.blocks)
    append(cache, [1, 2, 3, 4, 5, 6])
    assert cache.blocks == taken, "the prompt's blocks must be used before a new one is allocated"
    assert all(is_in_block(cache, i // 2, i + 1) for i in range(6))
    append(cache, [7])
    assert cache.blocks[:3] == taken
    assert len(cache.blocks) == 4
    assert is_in_block(cache, 3, 7)
    assert len(allocator.free_blocks) == 2


def test_task_5_a_token_that_needs_a_block_is_rejected_by_a_full_pool_and_not_stored() -> None:
    """Oracle: the docstring. Common mistake: counting the token before a block is allocated."""
    allocator = make_pool(2, block_size=2)
    (of_another,) = allocator.alloc_blocks(1)
    cache = DynamicKVCache(allocator, "a")
    append(cache, [1, 2])
    for _ in range(2):
        with pytest.raises(OutOfBlocksError):
            cache.append_token(*token(3))
    assert cache.current_len == 2
    assert len(cache.blocks) == 1
    allocator.free_blocks_ids([of_another])
    append(cache, [3])
    assert cache.current_len == 3
    assert cache.blocks[1] == of_another
    assert is_in_block(cache, 0, 1)
    assert is_in_block(cache, 0, 2)
    assert is_in_block(cache, 1, 3)


def test_task_5_a_full_pool_still_takes_tokens_into_partly_filled_blocks() -> None:
    """Oracle: by hand: no block is free, and the third token needs none."""
    allocator = make_pool(1, block_size=3)
    cache = DynamicKVCache(allocator, "a")
    append(cache, [1, 2, 3])
    assert cache.current_len == 3
    with pytest.raises(OutOfBlocksError):
        append(cache, [4])


# Task 6: DynamicKVCache.read


def expect_tokens(cache: DynamicKVCache, numbers: Sequence[float]) -> None:
    """Assert that exactly these tokens are read, in this order."""
    stored = cache.read()
    assert stored.keys.shape == stored.values.shape == (1, len(numbers), 2), "[Hkv, current_len, D]"
    assert stored.keys.swapaxes(0, 1).tolist() == [token(number)[0].tolist() for number in numbers]
    assert stored.values.swapaxes(0, 1).tolist() == [token(number)[1].tolist() for number in numbers]


def test_task_6_appended_tokens_are_read_in_order() -> None:
    """Oracle: by hand: three tokens in two blocks of two; the fourth slot is not read."""
    cache = DynamicKVCache(make_pool(4, block_size=2), "a")
    append(cache, [1, 2, 3])
    expect_tokens(cache, [1, 2, 3])


@pytest.mark.parametrize("count", range(1, 8))
def test_task_6_lengths_around_block_boundaries_are_read_completely(count: int) -> None:
    """Oracle: a Python list of what was appended."""
    cache = DynamicKVCache(make_pool(4, block_size=3), "a")
    append(cache, range(count))
    expect_tokens(cache, range(count))


def test_task_6_empty_slots_of_prompt_blocks_are_not_read() -> None:
    """Oracle: by hand: the blocks have slots for five tokens, but only appended tokens are read."""
    cache = DynamicKVCache(make_pool(4, block_size=2), "a")
    cache.allocate_for_prompt(5)
    expect_tokens(cache, [])
    append(cache, [1])
    expect_tokens(cache, [1])
    append(cache, [2, 3, 4, 5])
    expect_tokens(cache, [1, 2, 3, 4, 5])


def test_task_6_tokens_are_read_in_token_order_not_in_block_id_order() -> None:
    """Oracle: by hand: block 2 is free first, then 1, then 0, and each is the only free one."""
    allocator = make_pool(3, block_size=1)
    cache = DynamicKVCache(allocator, "a")
    allocator.alloc_blocks(3)
    for number, free_next in ((1, 2), (2, 1), (3, 0)):
        allocator.free_blocks_ids([free_next])
        append(cache, [number])
    expect_tokens(cache, [1, 2, 3])


def test_task_6_keys_and_values_of_several_heads_are_read_back() -> None:
    """Oracle: a Python list of what was appended, rounded to the pool's dtype by MLX."""
    allocator = GlobalAllocator(5, 4, num_heads=3, head_dim=8)
    cache = DynamicKVCache(allocator, "a")
    noise = mx.random.normal((2, 10, 3, 8), key=mx.random.key(6))
    for i in range(10):
        cache.append_token(noise[0, i], noise[1, i])
    rounded = noise.swapaxes(1, 2).astype(mx.bfloat16)  # heads first; bfloat16 is the default dtype
    stored = cache.read()
    assert mx.array_equal(stored.keys, rounded[0])
    assert mx.array_equal(stored.values, rounded[1])


def test_task_6_sequences_that_grow_alternately_read_back_what_they_wrote() -> None:
    """Oracle: a Python list for each sequence; their blocks are interleaved in the pool."""
    rng, allocator = np.random.default_rng(13), make_pool(20, block_size=3)
    caches = [DynamicKVCache(allocator, name) for name in "abcd"]
    written: list[list[int]] = [[] for _ in caches]
    caches[1].allocate_for_prompt(7)
    for number in range(45):
        i = int(rng.integers(4))
        append(caches[i], [number])
        written[i].append(number)
    for cache, numbers in zip(caches, written, strict=True):
        expect_tokens(cache, numbers)


def test_task_6_reading_a_cache_without_tokens_gives_empty_arrays() -> None:
    """Oracle: by hand: nothing was appended, with and without blocks."""
    cache = DynamicKVCache(make_pool(3), "a")
    for prompt_len in (0, 2):
        cache.allocate_for_prompt(prompt_len)
        read = cache.read()
        assert isinstance(read, KeysValues), "read() must return KeysValues(keys, values)"
        assert read.keys.shape == read.values.shape == (1, 0, 2)


def test_task_6_freeing_a_cache_returns_every_block() -> None:
    """Oracle: by hand: the whole pool can be allocated again."""
    allocator = make_pool(4, block_size=2)
    cache = DynamicKVCache(allocator, "a")
    append(cache, [1, 2, 3])
    cache.free()
    assert len(allocator.free_blocks) == 4
    assert sorted(allocator.alloc_blocks(4)) == [0, 1, 2, 3]


def test_task_6_freeing_a_cache_returns_unused_prompt_blocks_too() -> None:
    """Oracle: by hand: 4 blocks for 7 tokens, one of which was appended."""
    allocator = make_pool(5, block_size=2)
    cache = DynamicKVCache(allocator, "a")
    cache.allocate_for_prompt(7)
    append(cache, [1])
    cache.free()
    assert len(allocator.free_blocks) == 5


def test_task_6_a_freed_cache_is_empty_and_can_be_used_again() -> None:
    """Oracle: by hand: the sequence is empty, and reads only tokens appended later."""
    cache = DynamicKVCache(make_pool(4, block_size=2), "a")
    append(cache, [1, 2, 3])
    cache.free()
    assert cache.current_len == 0
    assert cache.blocks == []
    append(cache, [4])
    expect_tokens(cache, [4])


def test_task_6_freeing_a_cache_twice_frees_no_block_of_another_sequence() -> None:
    """Oracle: by hand: a sequence without blocks frees nothing. Common mistake: blocks that stay in the list
    are freed again when another sequence holds them."""
    allocator = make_pool(2, block_size=2)
    first, second = DynamicKVCache(allocator, "a"), DynamicKVCache(allocator, "b")
    first.free()
    append(first, [1, 2, 3])
    first.free()
    append(second, [4, 5, 6])
    first.free()
    assert len(allocator.free_blocks) == 0
    expect_tokens(second, [4, 5, 6])


def test_task_6_freeing_one_cache_does_not_affect_the_others() -> None:
    """Oracle: by hand: one sequence overwrites the blocks that another freed; the third is not affected."""
    allocator = make_pool(4, block_size=2)
    first, second, third = (DynamicKVCache(allocator, name) for name in "abc")
    append(first, [1, 2, 3])
    append(second, [4, 5, 6])
    first.free()
    append(third, [7, 8, 9])
    expect_tokens(second, [4, 5, 6])
    expect_tokens(third, [7, 8, 9])


def test_task_6_a_long_random_run_keeps_all_tokens_and_loses_no_block() -> None:
    """Oracle: a Python list for each sequence; at the end all blocks are free."""
    rng, allocator = np.random.default_rng(14), make_pool(10, block_size=3)
    living: list[tuple[DynamicKVCache, list[int]]] = []
    for number in range(300):
        held = sum(len(cache.blocks) for cache, _ in living)
        assert len(allocator.free_blocks) == 10 - held
        if held == 10 or (living and rng.random() < 0.1):
            cache, numbers = living.pop(int(rng.integers(len(living))))
            expect_tokens(cache, numbers)
            cache.free()
        elif len(living) < 3 and rng.random() < 0.3:
            cache = DynamicKVCache(allocator, f"sequence {number}")
            cache.allocate_for_prompt(int(rng.integers(1, 3 * (10 - held) + 1)))
            living.append((cache, []))
        elif living:
            cache, numbers = living[int(rng.integers(len(living)))]
            append(cache, [number])
            numbers.append(number)
    for cache, numbers in living:
        expect_tokens(cache, numbers)
        cache.free()
    assert sorted(allocator.alloc_blocks(10)) == list(range(10))
