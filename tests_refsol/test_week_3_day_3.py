"""Day 3.3: slot mappings, and a cache of named sequences on top of pages.

When these tests pass, you have the slot of every token as one number, for whole batches at once, and
PagedKVCache as a view of pool, allocator and tables: it grows without losing tokens, never writes to a block
that another sequence holds, and reads exactly the requested tokens.
"""

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_llm.errors import OutOfBlocksError
from tiny_llm.kv_pool import KVPool
from tiny_llm.paged_attention import BlockAllocator, BlockCopy, BlockTable
from tiny_llm.paged_cache import PagedKVCache
from tiny_llm.slot_mapping import flat_slots

HEADS, D = 2, 3


def make_table(num_tokens: int, block_size: int = 4, blocks: Sequence[int] = ()) -> BlockTable:
    """A table of `num_tokens` tokens; `blocks`, if given, replace the allocator's choice."""
    table = BlockTable(BlockAllocator(100), block_size)
    table.append_tokens(num_tokens)
    table.blocks = list(blocks) or table.blocks
    return table


def token(number: float) -> tuple[mx.array, mx.array]:
    """The key and value [HEADS, D] of a token: different numbers give different tokens, and heads differ."""
    k = number + mx.arange(HEADS * D, dtype=mx.float32).reshape(HEADS, D) / 16
    return k, -k


def make_cache(total_blocks: int = 12, block_size: int = 4) -> PagedKVCache:
    return PagedKVCache(total_blocks, block_size, HEADS, D, mx.float32)


def fill(cache: PagedKVCache, seq_id: str, start: int, numbers: Sequence[float]) -> None:
    """Write tokens to the slots of the sequence's table, without `write_token`."""
    slots = cache.tables[seq_id].slots(start, start + len(numbers))
    keys, values = (mx.stack(parts) for parts in zip(*map(token, numbers), strict=True))
    cache.pool.write(cache.layer, mx.array(slots, mx.int32), keys, values)


def add_sequence(cache: PagedKVCache, seq_id: str, numbers: Sequence[float]) -> None:
    """Add a new sequence with these tokens."""
    cache.allocate(seq_id, len(numbers))
    fill(cache, seq_id, 0, numbers)


def expect(read: tuple[mx.array, mx.array], numbers: Sequence[float]) -> None:
    """Assert that keys and values [HEADS, tokens, D] are exactly these tokens, in this order."""
    keys, values = read
    assert keys.shape == values.shape == (HEADS, len(numbers), D)
    expected = mx.array(list(numbers), mx.float32)[None, :, None] + token(0)[0][:, None]
    assert keys.tolist() == expected.tolist()
    assert values.tolist() == (-expected).tolist()


def expect_stored(cache: PagedKVCache, seq_id: str, numbers: Sequence[float]) -> None:
    """Assert that the sequence has these tokens: read from the pool by slot, without `read_blocks`."""
    table = cache.tables[seq_id]
    assert table.num_tokens == len(numbers)
    slots = mx.array(table.slots(0, len(numbers)), mx.int32)
    keys, values = cache.pool.read(cache.layer, slots)
    expect((keys.swapaxes(0, 1), values.swapaxes(0, 1)), numbers)


def expect_conserved(cache: PagedKVCache) -> None:
    """Assert that each block's reference count is the number of tables that contain it."""
    held = [block for table in cache.tables.values() for block in table.blocks]
    assert cache.allocator.num_free == cache.allocator.num_blocks - len(set(held))
    for block in set(held):
        assert cache.allocator.ref_count(block) == held.count(block)


# Task 1: flat_slots


def test_task_1_a_slot_is_block_times_block_size_plus_offset() -> None:
    """Oracle: by hand: blocks 23, 64 and 87 of 16 tokens; token 25 is in block 64 at offset 9."""
    slots = flat_slots([make_table(40, 16, [23, 64, 87])], [40]).tolist()
    assert slots[0] == 368
    assert slots[15] == 383
    assert slots[16] == 1024
    assert slots[25] == 1033
    assert slots[39] == 1399
    assert len(slots) == 40


def test_task_1_slots_of_several_tables_are_concatenated() -> None:
    """Oracle: by hand, blocks of 4: unused slots of a last block are skipped."""
    tables = [make_table(6, 4, [7, 2]), make_table(3, 4, [5]), make_table(8, 4, [0, 9])]
    assert flat_slots(tables, [6, 3, 8]).tolist() == [
        *(28, 29, 30, 31, 8, 9),
        *(20, 21, 22),
        *(0, 1, 2, 3, 36, 37, 38, 39),
    ]


@pytest.mark.parametrize("length", range(10))
def test_task_1_lengths_around_block_boundaries_are_mapped_exactly(length: int) -> None:
    """Oracle: by hand: the first `length` of nine slots; a length may be less than the table's tokens."""
    slots = flat_slots([make_table(9, 3, [4, 1, 6])], [length])
    assert slots.tolist() == [12, 13, 14, 3, 4, 5, 18, 19, 20][:length]


def test_task_1_slots_are_int32_even_if_there_are_none() -> None:
    """Oracle: the docstring, even for an empty list, which MLX would make float32."""
    for slots in (flat_slots([make_table(5)], [5]), flat_slots([make_table(5)], [0]), flat_slots([], [])):
        assert slots.dtype == mx.int32
    assert flat_slots([], []).shape == (0,)


def test_task_1_a_table_without_tokens_adds_no_slots() -> None:
    """Oracle: by hand."""
    tables = [make_table(2, 4, [3]), make_table(0), make_table(1, 4, [6])]
    assert flat_slots(tables, [2, 0, 1]).tolist() == [12, 13, 24]
    assert flat_slots(tables, [2, 0, 0]).tolist() == [12, 13]


@pytest.mark.parametrize("length", [-1, 6, 8, 9])
def test_task_1_a_length_outside_the_table_is_rejected(length: int) -> None:
    """Oracle: the docstring: the table has 5 tokens; the other slots of its two blocks of 4 are empty."""
    with pytest.raises(ValueError):
        flat_slots([make_table(3), make_table(5)], [3, length])


@pytest.mark.parametrize("lengths", [[], [3], [3, 5, 1]])
def test_task_1_a_different_number_of_lengths_and_tables_is_rejected(lengths: list[int]) -> None:
    """Oracle: the docstring."""
    with pytest.raises(ValueError):
        flat_slots([make_table(3), make_table(5)], lengths)


def test_task_1_tables_of_different_block_sizes_are_rejected() -> None:
    """Oracle: the docstring: one slot number would mean two tokens."""
    with pytest.raises(ValueError):
        flat_slots([make_table(3, 4), make_table(3, 8)], [3, 3])


def test_task_1_many_random_tables_match_the_definition() -> None:
    """Oracle: the definition, for each token: its table's block, times the block size, plus its offset."""
    rng = np.random.default_rng(1)
    for block_size in (1, 3, 16):
        totals = [int(total) for total in rng.integers(0, 60, 20)]
        allocator = BlockAllocator(sum(-(-total // block_size) for total in totals))
        tables = [BlockTable(allocator, block_size) for _ in totals]
        for row in rng.permutation(np.repeat(np.arange(20), totals)):
            tables[row].append_tokens(1)  # alternating, so that no table has contiguous blocks
        lengths = [int(rng.integers(0, total + 1)) for total in totals]
        expected = [
            table.blocks[i // block_size] * block_size + i % block_size
            for table, length in zip(tables, lengths, strict=True)
            for i in range(length)
        ]
        assert flat_slots(tables, lengths).tolist() == expected


def num_instructions(run: Callable[[], object]) -> int:
    """The number of Python instructions that a call takes, without those inside C and MLX."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any]:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


def test_task_1_the_number_of_python_instructions_does_not_grow_with_the_block_size() -> None:
    """Oracle: by count: two tables of two blocks, of 4 and of 512 tokens.

    Common mistake: one token at a time. `BlockTable.slots` gives the right slots, with over a hundred times
    as many instructions.
    """
    counts = []
    for block_size in (4, 512):
        tables, lengths = [make_table(2 * block_size, block_size) for _ in range(2)], [2 * block_size] * 2
        counts.append(num_instructions(lambda t=tables, n=lengths: flat_slots(t, n)))  # type: ignore[misc]
    small, large = counts
    assert large <= 2 * small, f"{large} Python instructions for 512 tokens per block, {small} for 4"


# Task 2: PagedKVCache.allocate


def test_task_2_a_new_sequence_gets_blocks_for_its_tokens() -> None:
    """Oracle: by hand, blocks of 16: 30 tokens are 2 blocks. The allocator may choose any."""
    cache = make_cache(100, 16)
    blocks = cache.allocate("A", 30)
    assert len(blocks) == len(set(blocks)) == 2
    assert cache.tables["A"].num_tokens == 30
    assert cache.tables["A"].physical_indices() == blocks
    expect_conserved(cache)


def test_task_2_new_sequences_share_no_blocks() -> None:
    """Oracle: by hand: 2 blocks and 3 are the whole pool."""
    cache = make_cache(5)
    taken = cache.allocate("a", 8) + cache.allocate("b", 9)
    assert sorted(taken) == [0, 1, 2, 3, 4]


def test_task_2_a_known_sequence_grows() -> None:
    """Oracle: by hand, blocks of 4. The lab replaces the table, which loses blocks and tokens."""
    cache = make_cache()
    add_sequence(cache, "a", [1, 2, 3, 4, 5])
    before = cache.tables["a"].physical_indices()
    after = cache.allocate("a", 4)
    assert after[:2] == before
    assert len(after) == 3
    fill(cache, "a", 5, [6, 7, 8, 9])
    expect_stored(cache, "a", [1, 2, 3, 4, 5, 6, 7, 8, 9])
    expect_conserved(cache)


def test_task_2_allocate_returns_all_blocks_of_the_sequence() -> None:
    """Oracle: by hand, blocks of 4: 3 tokens, then 1 that fits into the same block, then 1 that does not."""
    cache = make_cache()
    counts = [len(cache.allocate("a", more)) for more in (3, 1, 1, 0, 7)]
    assert counts == [1, 1, 2, 2, 3]


def test_task_2_the_returned_list_is_a_copy() -> None:
    """Oracle: by hand: changing the returned list must not change the table."""
    cache = make_cache()
    cache.allocate("a", 5).clear()
    assert len(cache.tables["a"].blocks) == 2


def test_task_2_a_sequence_may_start_without_tokens() -> None:
    """Oracle: by hand."""
    cache = make_cache(1)
    cache.allocate("full", 4)
    assert cache.allocate("none", 0) == []
    assert "none" in cache.tables


def test_task_2_too_many_tokens_are_rejected_and_take_no_blocks() -> None:
    """Oracle: the docstring: one of 3 blocks of 4 is held, and 9 tokens need three."""
    cache = make_cache(3)
    add_sequence(cache, "a", [1, 2, 3, 4])
    for seq_id in ("new", "a"):
        with pytest.raises(OutOfBlocksError):
            cache.allocate(seq_id, 9)
        assert list(cache.tables) == ["a"], "a rejected sequence must not be added"
        expect_stored(cache, "a", [1, 2, 3, 4])
        expect_conserved(cache)
    assert len(cache.allocate("new", 8)) == 2


def test_task_2_a_negative_number_is_rejected() -> None:
    """Oracle: the docstring, for a new and for an existing sequence."""
    cache = make_cache()
    cache.allocate("a", 5)
    for seq_id in ("a", "b"):
        with pytest.raises(ValueError):
            cache.allocate(seq_id, -2)
    assert list(cache.tables) == ["a"]
    assert cache.tables["a"].num_tokens == 5


def test_task_2_a_fork_that_grows_copies_the_shared_last_block() -> None:
    """Oracle: by hand: the last block is copied with its tokens, and the other table does not change.

    Without the copy the new block holds zeros.
    """
    cache = make_cache()
    add_sequence(cache, "a", [1, 2, 3, 4, 5, 6])
    cache.tables["b"] = cache.tables["a"].fork()
    cache.allocate("b", 1)
    fill(cache, "b", 6, [70])
    cache.allocate("a", 1)
    fill(cache, "a", 6, [7])
    expect_stored(cache, "b", [1, 2, 3, 4, 5, 6, 70])
    expect_stored(cache, "a", [1, 2, 3, 4, 5, 6, 7])
    expect_conserved(cache)
    assert cache.allocator.num_free == 12 - 3, "the full first block must stay shared"


def test_task_2_freeing_a_sequence_frees_its_blocks_and_its_id() -> None:
    """Oracle: by hand: the whole pool can be allocated again, with the same id."""
    cache = make_cache(3)
    add_sequence(cache, "a", [1, 2, 3, 4, 5])
    cache.free_sequence("a")
    assert "a" not in cache.tables
    assert cache.allocator.num_free == 3
    add_sequence(cache, "a", list(range(12)))
    expect_stored(cache, "a", list(range(12)))


def test_task_2_freeing_a_sequence_keeps_blocks_that_others_hold() -> None:
    """Oracle: by hand. The lab frees blocks that another sequence still
    reads, and the next sequence overwrites them."""
    cache = make_cache(3)
    add_sequence(cache, "a", [1, 2, 3, 4, 5])
    cache.tables["b"] = cache.tables["a"].fork()
    cache.free_sequence("a")
    assert cache.allocator.num_free == 1
    add_sequence(cache, "c", [7, 8, 9])
    expect_stored(cache, "b", [1, 2, 3, 4, 5])
    expect_conserved(cache)
    cache.free_sequence("b")
    assert cache.allocator.num_free == 2


def test_task_2_the_slot_mapping_finds_the_tokens_of_a_batch() -> None:
    """Oracle: Python lists: three sequences that grew alternately; a prefix of each, one of them twice."""
    cache = make_cache()
    for start in (0, 3):
        for seq_id, first in (("a", 100), ("b", 200), ("c", 300)):
            cache.allocate(seq_id, 3)
            fill(cache, seq_id, start, [first + start + i for i in range(3)])
    mapping = cache.build_flat_slot_mapping([("b", 5), ("a", 6), ("c", 0), ("b", 1)])
    keys, values = cache.pool.read(0, mapping)
    expect(
        (keys.swapaxes(0, 1), values.swapaxes(0, 1)),
        [200, 201, 202, 203, 204, 100, 101, 102, 103, 104, 105, 200],
    )


def test_task_2_the_slot_mapping_is_int32_with_one_slot_per_token() -> None:
    """Oracle: the docstring, for a batch of 30 tokens and for an empty one."""
    cache = make_cache(100, 16)
    cache.allocate("A", 30)
    for batch, total in (([("A", 30)], 30), ([], 0)):
        mapping = cache.build_flat_slot_mapping(batch)
        assert mapping.shape == (total,)
        assert mapping.dtype == mx.int32


# Task 3: PagedKVCache.write_token


def test_task_3_tokens_are_stored_at_their_positions() -> None:
    """Oracle: a Python list; written in random order, blocks of 4."""
    cache = make_cache()
    cache.allocate("a", 10)
    for position in (9, 0, 4, 3, 7, 1, 8, 2, 6, 5):
        cache.write_token("a", position, *token(10 + position))
    expect_stored(cache, "a", list(range(10, 20)))


def test_task_3_a_position_can_be_written_again() -> None:
    """Oracle: by hand; no other position changes."""
    cache = make_cache()
    add_sequence(cache, "a", [1, 2, 3, 4, 5])
    cache.write_token("a", 3, *token(40))
    expect_stored(cache, "a", [1, 2, 3, 40, 5])


def test_task_3_sequences_do_not_overwrite_each_other() -> None:
    """Oracle: by hand: they grow alternately, so their blocks are interleaved."""
    cache = make_cache(block_size=2)
    for position in range(5):
        for seq_id, first in (("a", 10), ("b", 20), ("c", 30)):
            cache.allocate(seq_id, 1)
            cache.write_token(seq_id, position, *token(first + position))
    for seq_id, first in (("a", 10), ("b", 20), ("c", 30)):
        expect_stored(cache, seq_id, list(range(first, first + 5)))


def test_task_3_nothing_else_in_the_pool_changes() -> None:
    """Oracle: the whole pool, before and after: one of 48 slots differs."""
    cache = make_cache()
    add_sequence(cache, "a", [1, 2, 3, 4, 5])
    before = cache.pool.read(0, mx.arange(48))
    cache.write_token("a", 4, *token(99))
    after = cache.pool.read(0, mx.arange(48))
    for old, new in zip(before, after, strict=True):
        assert mx.sum(mx.any(old != new, axis=(1, 2))).item() == 1


def test_task_3_keys_and_values_are_rounded_to_the_dtype_of_the_pool() -> None:
    """Oracle: MLX's own rounding to bfloat16, the default dtype."""
    cache = PagedKVCache(4, 4, HEADS, D)
    cache.allocate("a", 2)
    k, v = mx.random.normal((2, HEADS, D), key=mx.random.key(3))
    cache.write_token("a", 1, k, v)
    keys, values = cache.pool.read(0, mx.array(cache.tables["a"].slots(1, 2), mx.int32))
    assert mx.array_equal(keys[0], k.astype(mx.bfloat16)).item()
    assert mx.array_equal(values[0], v.astype(mx.bfloat16)).item()


@pytest.mark.parametrize("position", [0, 3, 4, 7, 8, 9])
def test_task_3_a_shared_block_is_copied_before_it_is_written(position: int) -> None:
    """Oracle: a Python list for each sequence. Any block may be shared, not only the last one."""
    numbers = list(range(1, 11))
    changed = [*numbers[:position], 99, *numbers[position + 1 :]]
    for writer, reader in (("a", "b"), ("b", "a")):
        cache = make_cache()
        add_sequence(cache, "a", numbers)
        cache.tables["b"] = cache.tables["a"].fork()
        cache.write_token(writer, position, *token(99))
        expect_stored(cache, writer, changed)
        expect_stored(cache, reader, numbers)
        expect_conserved(cache)


def test_task_3_only_shared_blocks_are_copied_and_only_once() -> None:
    """Oracle: by hand: 3 blocks shared by two: the first write to each makes a copy, later ones do not."""
    cache = make_cache()
    add_sequence(cache, "a", list(range(10)))
    cache.write_token("a", 0, *token(0))
    assert cache.allocator.num_free == 9
    cache.tables["b"] = cache.tables["a"].fork()
    for position, num_free in ((5, 8), (6, 8), (0, 7), (3, 7), (9, 6)):
        cache.write_token("b", position, *token(50 + position))
        assert cache.allocator.num_free == num_free
    cache.write_token("a", 5, *token(5))
    assert cache.allocator.num_free == 6, "the first sequence no longer shares this block"
    expect_conserved(cache)


def test_task_3_an_unshared_block_is_written_in_place_even_in_a_full_pool() -> None:
    """Oracle: by hand: nothing is shared, so nothing is copied, and no block has to be free."""
    cache = make_cache(2)
    add_sequence(cache, "a", [1, 2, 3, 4, 5])
    for position in range(5):
        cache.write_token("a", position, *token(10 + position))
    expect_stored(cache, "a", [10, 11, 12, 13, 14])


class RecordingPool(KVPool):
    """A pool that records the requested copies."""

    copies: tuple[BlockCopy, ...] = ()

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Record them, and copy."""
        self.copies += tuple(copies)
        super().copy_blocks(copies)


@pytest.mark.parametrize("position", [0, 3, 4, 5])
def test_task_3_a_copy_covers_the_whole_block(position: int) -> None:
    """Oracle: by hand: 4, even for the last block, which has 2 tokens. The pool copies whole blocks."""
    pool, allocator = RecordingPool(4, 4, HEADS, D, dtype=mx.float32), BlockAllocator(4)
    cache = PagedKVCache.of(pool, allocator, {"a": BlockTable(allocator, 4)})
    shared = cache.allocate("a", 6)[position // 4]
    cache.tables["b"] = cache.tables["a"].fork()
    cache.write_token("b", position, *token(9))
    assert pool.copies == (BlockCopy(shared, cache.tables["b"].blocks[position // 4], 4),)


def test_task_3_three_sequences_that_share_a_block_write_independently() -> None:
    """Oracle: a Python list for each: after the second copy only the third holds the block."""
    cache = make_cache()
    add_sequence(cache, "a", [1, 2, 3])
    for seq_id in ("b", "c"):
        cache.tables[seq_id] = cache.tables["a"].fork()
    for seq_id, number in (("a", 10), ("b", 20), ("c", 30)):
        cache.write_token(seq_id, 1, *token(number))
    for seq_id, number in (("a", 10), ("b", 20), ("c", 30)):
        expect_stored(cache, seq_id, [1, number, 3])
    assert cache.allocator.num_free == 9
    expect_conserved(cache)


def test_task_3_a_write_that_needs_a_copy_in_a_full_pool_is_rejected_and_changes_nothing() -> None:
    """Oracle: the docstring: two blocks, both shared, none free."""
    cache = make_cache(2)
    add_sequence(cache, "a", [1, 2, 3, 4, 5])
    cache.tables["b"] = cache.tables["a"].fork()
    with pytest.raises(OutOfBlocksError):
        cache.write_token("b", 4, *token(9))
    for seq_id in ("a", "b"):
        expect_stored(cache, seq_id, [1, 2, 3, 4, 5])
    expect_conserved(cache)


@pytest.mark.parametrize("position", [-1, 5, 7, 8])
def test_task_3_a_position_outside_the_sequence_is_rejected(position: int) -> None:
    """Oracle: the docstring: 5 tokens. -1 is the last one in a Python list, and 7 is an empty slot."""
    cache = make_cache()
    add_sequence(cache, "a", [1, 2, 3, 4, 5])
    with pytest.raises(ValueError):
        cache.write_token("a", position, *token(9))
    expect_stored(cache, "a", [1, 2, 3, 4, 5])


@pytest.mark.parametrize("shape", [(D,), (1, D), (HEADS, 1), (D, HEADS), (1, HEADS, D), (HEADS, D + 1)])
def test_task_3_a_token_of_the_wrong_shape_is_rejected(shape: tuple[int, ...]) -> None:
    """Oracle: the docstring. Most of these would be broadcast; no block is copied for them."""
    cache = make_cache()
    add_sequence(cache, "a", [1, 2])
    cache.tables["b"] = cache.tables["a"].fork()
    good, wrong = mx.ones((HEADS, D)), mx.ones(shape)
    for k, v in ((wrong, good), (good, wrong)):
        with pytest.raises(ValueError):
            cache.write_token("b", 0, k, v)
    expect_stored(cache, "b", [1, 2])
    assert cache.allocator.num_free == 11


def test_task_3_a_copy_covers_all_layers_of_the_pool() -> None:
    """Oracle: by hand: all layers share the tables, so a new block needs the contents of every layer."""
    pool, allocator = KVPool(6, 2, HEADS, D, num_layers=3, dtype=mx.float32), BlockAllocator(6)
    tables = {"a": BlockTable(allocator, 2)}
    layers = [PagedKVCache.of(pool, allocator, tables, layer) for layer in range(3)]
    layers[0].allocate("a", 3)
    for layer, cache in enumerate(layers):
        fill(cache, "a", 0, [10 * layer + i for i in range(3)])
    tables["b"] = tables["a"].fork()
    layers[1].write_token("b", 0, *token(99))
    expect_stored(layers[0], "b", [0, 1, 2])
    expect_stored(layers[1], "b", [99, 11, 12])
    expect_stored(layers[2], "b", [20, 21, 22])
    expect_stored(layers[1], "a", [10, 11, 12])


# Task 4: PagedKVCache.read_blocks


@pytest.mark.parametrize("start", [0, 3, 4, 5, 9])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5])
def test_task_4_any_range_of_tokens_can_be_read(start: int, count: int) -> None:
    """Oracle: a slice of a Python list: 14 tokens in blocks of 4."""
    cache = make_cache()
    add_sequence(cache, "a", list(range(14)))
    expect(cache.read_blocks("a", start, count), list(range(14))[start : start + count])


def test_task_4_the_example_of_the_lab_reads_tokens_20_to_29() -> None:
    """Oracle: by hand: tokens 20 to 29 are in the second block of 16, at offsets 4 to 13."""
    cache = make_cache(100, 16)
    add_sequence(cache, "A", list(range(30)))
    expect(cache.read_blocks("A", 20, 10), list(range(20, 30)))


def test_task_4_tokens_are_read_in_token_order_not_in_block_id_order() -> None:
    """Oracle: Python lists: three sequences grow alternately and are read completely."""
    cache = make_cache(block_size=2)
    for position in range(7):
        for first in (10, 20, 30):
            cache.allocate(str(first), 1)
            fill(cache, str(first), position, [first + position])
    for first in (30, 10, 20):
        expect(cache.read_blocks(str(first), 0, 7), list(range(first, first + 7)))


def test_task_4_a_later_write_does_not_change_arrays_that_were_read() -> None:
    """Oracle: by hand: the returned arrays are copies."""
    cache = make_cache()
    add_sequence(cache, "a", [1, 2, 3])
    read = cache.read_blocks("a", 0, 3)
    fill(cache, "a", 0, [7, 8, 9])
    expect(read, [1, 2, 3])


@pytest.mark.parametrize(("start", "count"), [(0, 6), (5, 1), (-1, 1), (-2, 2), (3, -1), (6, 0), (4, 3)])
def test_task_4_a_range_outside_the_sequence_is_rejected(start: int, count: int) -> None:
    """Oracle: the docstring: 5 tokens, although the blocks have 8 slots."""
    cache = make_cache()
    add_sequence(cache, "a", [1, 2, 3, 4, 5])
    with pytest.raises(ValueError):
        cache.read_blocks("a", start, count)


def test_task_4_each_layer_reads_its_own_keys_and_values() -> None:
    """Oracle: by hand: views on two layers of one pool, with the same tables."""
    pool, allocator = KVPool(4, 2, HEADS, D, num_layers=2, dtype=mx.float32), BlockAllocator(4)
    tables = {"a": BlockTable(allocator, 2)}
    layers = [PagedKVCache.of(pool, allocator, tables, layer) for layer in range(2)]
    layers[0].allocate("a", 3)
    fill(layers[0], "a", 0, [1, 2, 3])
    fill(layers[1], "a", 0, [4, 5, 6])
    expect(layers[0].read_blocks("a", 0, 3), [1, 2, 3])
    expect(layers[1].read_blocks("a", 0, 3), [4, 5, 6])


# Task 5: PagedKVCache.read_sparse


def test_task_5_the_example_of_the_lab_reads_a_window_of_53_tokens() -> None:
    """Oracle: by hand: token 500 is in block 31 of 16 tokens; 4 blocks start at 448, and tokens after 500 are
    not read: 53 tokens. Whole blocks would be 64 tokens, 11 too many."""
    cache = make_cache(40, 16)
    add_sequence(cache, "A", list(range(512)))
    expect(cache.read_sparse("A", 500, 4), list(range(448, 501)))


@pytest.mark.parametrize(
    ("token_idx", "window_blocks", "first"),
    [(0, 1, 0), (3, 1, 0), (4, 1, 4), (7, 1, 4), (8, 2, 4), (11, 2, 4), (12, 2, 8), (13, 4, 0), (13, 9, 0)],
)
def test_task_5_a_window_starts_at_a_block_boundary_and_ends_with_the_token(
    token_idx: int, window_blocks: int, first: int
) -> None:
    """Oracle: by hand, blocks of 4: whole blocks before the token's, and the token is the last one read.

    A window that is longer than the sequence starts at its first token.
    """
    cache = make_cache()
    add_sequence(cache, "a", list(range(14)))
    expect(cache.read_sparse("a", token_idx, window_blocks), list(range(first, token_idx + 1)))


def test_task_5_the_size_of_a_read_does_not_depend_on_the_length_of_the_sequence() -> None:
    """Oracle: by hand: 3 blocks of 4 that end with a full one are 12 tokens, for every length."""
    cache = make_cache(40)
    add_sequence(cache, "a", list(range(160)))
    for token_idx in (11, 51, 159):
        expect(cache.read_sparse("a", token_idx, 3), list(range(token_idx - 11, token_idx + 1)))


@pytest.mark.parametrize(("token_idx", "window_blocks"), [(-1, 2), (5, 2), (7, 1), (3, 0), (3, -1)])
def test_task_5_an_invalid_window_is_rejected(token_idx: int, window_blocks: int) -> None:
    """Oracle: the docstring: the sequence has 5 tokens, and a window has at least one block."""
    cache = make_cache()
    add_sequence(cache, "a", [1, 2, 3, 4, 5])
    with pytest.raises(ValueError):
        cache.read_sparse("a", token_idx, window_blocks)


def test_task_5_a_long_random_run_keeps_all_tokens_and_loses_no_block() -> None:
    """Oracle: a Python list for each sequence, through every method; at the end all blocks are free."""
    rng, cache = np.random.default_rng(7), make_cache(10, block_size=3)
    written: dict[str, list[int]] = {}
    for number in range(200):
        action = rng.choice(["grow", "write", "fork", "free"], p=[0.4, 0.4, 0.1, 0.1])
        seq_id = str(rng.choice(list(written))) if written and action != "grow" else f"{rng.integers(3)}"
        try:
            if action == "grow":
                cache.allocate(seq_id, 1)
                written.setdefault(seq_id, []).append(number)
                fill_last = len(written[seq_id]) - 1
                cache.write_token(seq_id, fill_last, *token(number))
            elif action == "write" and written:
                position = int(rng.integers(len(written[seq_id])))
                cache.write_token(seq_id, position, *token(number))
                written[seq_id][position] = number
            elif action == "fork" and written and f"fork of {seq_id}" not in written and len(written) < 5:
                cache.tables[f"fork of {seq_id}"] = cache.tables[seq_id].fork()
                written[f"fork of {seq_id}"] = list(written[seq_id])
            elif action == "free" and written:
                cache.free_sequence(seq_id)
                del written[seq_id]
        except OutOfBlocksError:
            assert cache.allocator.num_free == 0
        expect_conserved(cache)
        for name, numbers in written.items():
            expect(cache.read_blocks(name, 0, len(numbers)), numbers)
            expect(cache.read_sparse(name, len(numbers) - 1, 1), numbers[(len(numbers) - 1) // 3 * 3 :])
    for name in list(written):
        cache.free_sequence(name)
    assert cache.allocator.num_free == 10
